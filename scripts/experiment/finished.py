"""A run that has ended, as its folder has it: the weights that it left, by name.

| file | holds |
|---|---|
| `config.json` | what was trained |
| `policy.pt` | the last iterate |
| `timeline.pt` | what gives tails, windows and all rules that are not too fine for it |
| `candidates.pt` | what the timeline cannot give: the EMA, and the target actor |
| `shipped.pt`, `shipped.json` | what `scripts.ship` chose among them, and how |

All of it is data, and is checked before it is used.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agents.environments import Interface, interface, make_env
from agents.evaluation import Evaluator
from agents.networks import stack_members
from agents.presets import ALGORITHMS
from polyak_rl import Timeline, parse_rule
from polyak_rl.files import verify_archive
from scripts.experiment.schemes import SCHEMES
from scripts.experiment.trust import require_trusted

CANDIDATES = "candidates.pt"
SHIPPED, CHOICE = "shipped.pt", "shipped.json"

Weights = Mapping[str, Tensor]


class AbsentError(ValueError):
    """A run did not keep these weights."""


@dataclass(frozen=True)
class FinishedRun:
    """What a run left, as `read` finds it."""

    path: Path  # its folder
    algo: str
    seed: int
    env_id: str
    wrap: tuple[str, ...]
    max_steps: int  # after which an evaluation episode is cut
    network: nn.Module  # a policy of one member with some weights, of the run's names and shapes
    interface: Interface
    has_target: bool  # the algorithm has a target network of the policy

    def evaluator(self) -> Evaluator:
        """What plays episodes with its policies."""
        common = (self.env_id, self.interface, "cpu", self.wrap, self.max_steps)
        return Evaluator(*common, processes=None)

    @property
    def default(self) -> str:
        """What is played unless something else is asked for."""
        return "shipped" if (self.path / CHOICE).is_file() else "last"

    @cached_property
    def timeline(self) -> Timeline:
        """The course of the policy's weights.

        Raises:
            ValueError: There is none, or it is damaged.
        """
        path = self.path / "timeline.pt"
        if not path.is_file():
            raise ValueError(
                f"{self.path} has no timeline.pt: it was trained without one, or has not ended"
            )
        try:
            # At least half of its segments are full, in float32; of a short run, fewer, but little.
            most = max(8 * path.stat().st_size, 1 << 30)
            return Timeline.load(path, self.network, max_bytes=most)
        except OSError:
            raise
        except Exception as error:  # a file that was made up raises anything
            raise ValueError(f"{path} cannot be read: {error}") from error

    @cached_property
    def kept(self) -> dict[str, Weights]:
        """The weights that no timeline gives; none where an older version did not keep them.

        Raises:
            ValueError: They are damaged, or of another network.
        """
        path = self.path / CANDIDATES
        if not path.is_file():
            return {}
        kept = _load(path)
        for weights in kept.values() if isinstance(kept, dict) else [kept]:
            self._require_fit(weights, path)
        return dict(kept)

    @property
    def choice(self) -> dict[str, Any]:
        """What `scripts.ship` wrote about the shipped weights.

        Raises:
            ValueError: Nothing was shipped, or the weights are not those that it is about.
        """
        try:
            record = json.loads((self.path / CHOICE).read_bytes())
            data = (self.path / SHIPPED).read_bytes()
            fits = hashlib.sha256(data).hexdigest() == record["sha256"]
            record["choice"]["winner"]  # as a choice has it
        except FileNotFoundError as error:
            missing = Path(error.filename).name
            raise ValueError(f"nothing was shipped of {self.path}: it has no {missing}") from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{self.path / CHOICE} cannot be read: {error!r}") from error
        if not fits:
            raise ValueError(f"{self.path / SHIPPED} is not what {CHOICE} is about: ship once more")
        return dict(record)

    def weights(self, which: str) -> Weights:
        """Weights of the policy by name.

        Args:
            which: "last", "shipped", the name of a scheme, or a rule as `parse_rule` takes it.

        Raises:
            AbsentError: The run did not keep them, or the timeline is too coarse for them.
            ValueError: There are none of this name, or a file is missing, damaged, or of another
                network.
        """
        if which in ("last", "shipped"):
            if which == "shipped":
                _ = self.choice  # the weights are those that it is about
            path = self.path / ("policy.pt" if which == "last" else SHIPPED)
            if not path.is_file():
                raise ValueError(f"{self.path} has no {path.name}")
            weights: Weights = _load(path)
            self._require_fit(weights, path)
            return weights
        if which in self.kept:
            return self.kept[which]
        scheme = SCHEMES.get(which)
        if scheme and scheme.rule is None:
            raise AbsentError(f"{scheme.label} was not kept in {self.path}")
        updates = self.timeline.expected or self.timeline.clock
        rule = scheme.rule(updates) if scheme and scheme.rule else parse_rule(which)
        try:
            return self.timeline.average(rule)
        except ValueError as error:
            raise AbsentError(str(error)) from error

    def policy(self, which: str) -> nn.Module:
        """A policy of one member with these `weights`."""
        return stack_members(self.network, [self.weights(which)])

    def _require_fit(self, weights: Any, path: Path) -> None:
        """Raise ValueError where a file holds something else than weights of the policy."""
        ours = {name: x.shape for name, x in self.network.named_parameters()}
        given = weights if isinstance(weights, dict) else {}
        theirs = {name: x.shape for name, x in given.items() if isinstance(x, Tensor)}
        if any(theirs.get(name) != shape for name, shape in ours.items()):
            raise ValueError(f"{path} holds weights of another policy than config.json describes")


def read(path: Path, *, trust: bool = False) -> FinishedRun:
    """A run that has ended, or the folder that `scripts.ship` made of one.

    With `trust` the modules that its environment and its wrappers name are imported.

    Raises:
        ValueError: The folder does not hold a run that has ended, a file is damaged, or it names a
            module that is not to be imported.
    """
    policy = path / "policy.pt"
    if not policy.is_file() and (path / CHOICE).is_file():
        policy = path / SHIPPED
    for file in (path / "config.json", policy):
        if not file.is_file():
            raise ValueError(f"{path} is not the folder of a finished run: it has no {file.name}")
    try:
        record = json.loads((path / "config.json").read_text())
        for name in (record["run"]["env_id"], *record["run"]["wrap"]):
            require_trusted(name, path, trust=trust)
        return _described(path, record, sum(x.numel() for x in _load(policy).values()))
    except Exception as error:  # damaged files raise anything
        raise ValueError(f"the run in {path} cannot be read: {error}") from error


def _described(path: Path, record: dict[str, Any], size: int) -> FinishedRun:
    """The run that a config.json describes, whose policy has no more weights than its file."""
    config_class: Any
    algo, seed, run = str(record["algo"]), int(record["seed"]), record["run"]
    agent_class, config_class = ALGORITHMS[algo]
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in record["agent"].items()}
    if any(a * b > size for a, b in pairwise(values["hidden"])):
        raise ValueError(f"layers of {values['hidden']} units have more than its {size:,} weights")
    env_id, wrap, max_steps = str(run["env_id"]), tuple(run["wrap"]), int(run["max_episode_steps"])
    with closing(make_env(env_id, wrap)) as env:
        face = interface(env.observation_space, env.action_space, algo)
    agent = agent_class(face.obs_dim, face.action_dim, config_class(**values), [seed], "cpu", 1)
    about = (path, algo, seed, env_id, wrap, max_steps)
    return FinishedRun(*about, agent.policy, face, "actor" in agent.targets)


def _load(path: Path) -> Any:
    """What `torch.save` wrote, its checksums compared, read as data.

    Raises:
        ValueError: It is damaged, or something else.
    """
    verify_archive(path)
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except OSError:
        raise
    except Exception as error:  # whatever an unpickler raises
        raise ValueError(f"{path} cannot be read: {error}") from error
