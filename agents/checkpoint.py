"""Checkpoints: all that a training needs to go on, to the bit, as if it had never stopped.

A checkpoint is these files, side by side in one folder:

| file | holds |
|---|---|
| `000002.json` | the manifest: a line with the checksum of what follows, then JSON |
| `000002.pt` | tensors and plain values, written by `torch.save` |
| `replay-10000-20000.f32` | transitions 10000 to 19999 of every seed, as `Replay.dump` has them |

Transitions are written by the first checkpoint that sees them and shared by those that come after,
so a checkpoint costs what is new, and files whose transitions the ring has overwritten go away.
Each file is written beside its place, flushed and renamed, the manifest last: a checkpoint is there
whole or not at all. The last two are kept.

Reading goes the other way round. The manifest's checksum is verified before it is parsed, then its
schema, then the SHA-256 of every file that it names, and only then are tensors read, as data
(`weights_only`). A checkpoint that fails gives way to the one before it. A checksum tells damage,
not intent: whoever can write to the folder can write a checkpoint.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agents.environments import carries_state
from agents.evaluation import Evaluation
from agents.optimizers import Descent
from agents.seeding import Streams
from agents.training import Training
from agents.vector import EpisodeSeeds
from agents.versions import versions
from polyak_rl import PolicyAverages
from polyak_rl.files import write_whole

SCHEMA = 5

State = dict[str, Any]

CLOCKS = ("step", "updates", "skipped", "evaluated_at")
ARRAYS = {  # in a checkpoint -> of a training
    "obs": "obs",
    "ended": "ended",
    "return": "episode_return",
    "length": "episode_length",
    "latest_return": "latest_return",
    "logged_at": "episode_logged_at",
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read from disk, every file of it verified."""

    folder: Path
    number: int  # its place among the run's checkpoints
    about: State  # what `Checkpoints` was told about the run
    training: State  # what was trained, as `describe` says it
    versions: dict[str, str]  # of what decided its bits
    # First and one past the last transition of each replay file; None without replay.
    pieces: list[tuple[int, int]] | None
    sha256: dict[str, str]  # file name -> checksum
    state: State  # the tensors and plain values

    @property
    def step(self) -> int:
        """Environment steps taken, per seed."""
        return int(self.state["clocks"]["step"])

    @property
    def extra(self) -> State:
        """What `Checkpoints.save` was given besides."""
        return dict(self.state.get("extra", {}))

    def transitions(self, piece: tuple[int, int]) -> bytes:
        """What is in a replay file.

        Raises:
            OSError: It cannot be read.
            ValueError: It has changed since the checkpoint was read.
        """
        data = (self.folder / _piece_name(piece)).read_bytes()
        if hashlib.sha256(data).hexdigest() != self.sha256[_piece_name(piece)]:
            raise ValueError(f"{self.folder / _piece_name(piece)} has changed while it was read")
        return data


@dataclasses.dataclass(eq=False)
class Checkpoints:
    """Writes the checkpoints of one training.

    Attributes:
        step: Environment steps of the last checkpoint that was written, None before the first.

    Raises:
        ValueError: The training is on environments that it did not make itself.
    """

    folder: Path  # made if it is not there
    training: Training
    averages: PolicyAverages | None = None  # that are recorded of it
    about: State = dataclasses.field(default_factory=dict)  # how to build it again, in plain values
    _: dataclasses.KW_ONLY
    replay: bool = True  # keep it too: without it a run can be resumed, but not to the bit
    after: dataclasses.InitVar[Checkpoint | None] = None  # that the training was restored from

    def __post_init__(self, after: Checkpoint | None) -> None:
        _own_environments(self.training)
        self.about = dict(self.about)
        self.number = after.number if after else 0
        self.step = after.step if after else None
        self.pieces = list(after.pieces or []) if after else []
        self.sha256 = dict(after.sha256) if after else {}

    def save(self, extra: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint, and remove what neither it nor the one before it needs.

        Args:
            extra: Tensors and plain values of the caller's, for `Checkpoint.extra`.

        Raises:
            OSError: It cannot be written; the checkpoints that were there still are.
            NonFiniteError: A gradient was not finite since the one before.
        """
        self.training.require_finite()
        self.folder.mkdir(exist_ok=True)
        number, sums, pieces = self.number + 1, dict[str, str](), list[tuple[int, int]]()
        if self.replay:
            pieces = self._write_new_transitions(sums)
        name = f"{number:06d}.pt"
        state = training_state(self.training, self.averages) | {"extra": dict(extra or {})}
        with write_whole(self.folder / name) as file:
            torch.save(state, file)
        sums[name] = _digest(self.folder / name)
        record = {
            "schema": SCHEMA,
            "number": number,
            "about": self.about,
            "training": describe(self.training, self.averages),
            "versions": versions(self.training.device),
            "replay": pieces if self.replay else None,
            "sha256": sums,
        }
        body = json.dumps(record, indent=1).encode()
        line = hashlib.sha256(body).hexdigest().encode() + b"\n"
        with write_whole(self.folder / f"{number:06d}.json") as file:
            file.write(line + body)

        kept = {f"{n:06d}.json" for n in (number, self.number)} | {*sums, *self.sha256}
        self.number, self.pieces, self.sha256 = number, pieces, sums
        self.step = self.training.step
        for pattern in ("*.json", "*.pt", "replay-*.f32", "*.partial"):
            for path in self.folder.glob(pattern):
                if path.name not in kept:
                    path.unlink(missing_ok=True)

    def _write_new_transitions(self, sums: dict[str, str]) -> list[tuple[int, int]]:
        """Write what was added since the last checkpoint; the pieces that the ring consists of."""
        replay = self.training.replay
        pieces = [p for p in self.pieces if p[1] > replay.added - replay.capacity]
        sums |= {_piece_name(piece): self.sha256[_piece_name(piece)] for piece in pieces}
        written = self.pieces[-1][1] if self.pieces else 0
        new = min(replay.added - written, replay.capacity)
        if new:
            piece = (replay.added - new, replay.added)
            data = replay.dump(new)
            with write_whole(self.folder / _piece_name(piece)) as file:
                file.write(data)
            sums[_piece_name(piece)] = hashlib.sha256(data).hexdigest()
            pieces.append(piece)
        return pieces


def newest(folder: Path) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that is whole, and a sentence on each newer one that is not.

    Nothing is written, and nothing that was read is run.

    Raises:
        ValueError: There is none, or the newest whole one has a schema that is not known here.
    """
    manifests = sorted(folder.glob("*.json"), reverse=True)
    if not manifests:
        raise ValueError(f"there is no checkpoint in {folder}")
    damaged: list[str] = []
    for path in manifests:
        try:
            return _read(path), damaged
        except _DamagedError as error:
            damaged.append(f"{path} cannot be used: {error}")
    raise ValueError("; ".join(damaged))


def restore(
    checkpoint: Checkpoint, training: Training, averages: PolicyAverages | None = None
) -> list[str]:
    """Bring a training to where a checkpoint was written.

    Environments come back by the seed of their episode and its actions, which the replay buffer
    has, and are compared with the observation and the return of then.

    Args:
        checkpoint: From `newest`.
        training: A new training, built like the one that was saved.
        averages: Built like those that were saved; None if none were.

    Returns:
        Why the run may not go on to the bit as if it had never stopped, a sentence each.

    Raises:
        ValueError: The checkpoint is of another run, algorithm, configuration or architecture;
            nothing has changed.
    """
    _own_environments(training)
    if training.step or training.replay.added:
        raise ValueError(f"a checkpoint is restored into a new training, got step {training.step}")
    for key, ours in describe(training, averages).items():
        theirs = checkpoint.training.get(key)
        if theirs != ours:
            raise ValueError(
                f"the checkpoint is of another training: its {key} is {theirs}, here it is {ours}"
            )
    new = training_state(training, averages)
    for key in ("clocks", "agent", "sampling", "environments"):
        _require_fit(key, new[key], checkpoint.state.get(key))
    try:
        _load(training, averages, checkpoint.state)
        for piece in checkpoint.pieces or []:
            if not training.replay.added:
                training.replay.added = piece[0]
            training.replay.load(checkpoint.transitions(piece), piece[1] - piece[0])
    except Exception as error:  # a file that was made up raises anything
        _load(training, averages, new)
        training.replay.added = 0
        raise ValueError(f"the checkpoint does not fit this training: {error}") from error
    training.logged_at = (training.step, time.perf_counter())

    notes = [
        f"{name} was {checkpoint.versions.get(name)}, now it is {version}"
        for name, version in versions(training.device).items()
        if checkpoint.versions.get(name) != version
    ]
    if checkpoint.pieces is None:
        notes.append("the replay buffer was not saved: training goes on with an empty one")
    return notes + _restore_environments(training, checkpoint.state["environments"])


def describe(training: Training, averages: PolicyAverages | None) -> State:
    """What has to be equal for a checkpoint to fit, as plain values of JSON."""
    spaces = training.interface
    record = {
        "algorithm": type(training.agent).__name__,
        "seeds": training.seeds,
        # A run may go on elsewhere: `versions` has where it was.
        "run": {k: v for k, v in dataclasses.asdict(training.config).items() if k != "device"},
        "agent": dataclasses.asdict(training.agent.config),
        "observation size": spaces.obs_dim,
        "action size": spaces.action_dim,
        "averages": [*averages.rules] if averages else None,
        "segments": averages.timeline.capacity if averages and averages.timeline else None,
    }
    plain: State = json.loads(json.dumps(record))
    return plain


def training_state(training: Training, averages: PolicyAverages | None = None) -> State:
    """All that changes in a training but its replay rows, as tensors and plain values."""
    envs = _own_environments(training)
    return {
        "clocks": {name: getattr(training, name) for name in CLOCKS},
        "agent": {name: part.state_dict() for name, part in _parts(training.agent).items()},
        "sampling": training.learner.sampling.state_dict(),
        "averages": averages.state_dict() if averages else None,
        "losses": {tag: loss.clone() for tag, loss in training.losses.items()},
        "evaluations": {
            scheme: [torch.from_numpy(x.copy()) for x in result]
            for scheme, result in training.evaluations.items()
        },
        "environments": {"episode": [env.episode for env in envs]}
        | {key: torch.from_numpy(getattr(training, name).copy()) for key, name in ARRAYS.items()},
    }


class _DamagedError(ValueError):
    """A checkpoint is not what was written."""


def _read(path: Path) -> Checkpoint:
    """Read the checkpoint of a manifest, each thing verified before it is parsed."""
    try:
        line, _, body = path.read_bytes().partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != line:
            raise _DamagedError("its checksum does not fit")
        record = json.loads(body)
        schema = record["schema"]
        if schema == SCHEMA:
            return _read_files(path, record)
    except OSError as error:
        raise _DamagedError(f"{error.filename}: {error.strerror}") from error
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise _DamagedError(str(error)) from error
    raise ValueError(f"{path} has schema {schema}; this program reads schema {SCHEMA}")


def _read_files(path: Path, record: State) -> Checkpoint:
    sha256, pieces = record["sha256"], record["replay"]
    if pieces is not None:
        pieces = [(int(first), int(last)) for first, last in pieces]
    state_file = path.with_name(f"{record['number']:06d}.pt")
    for name in (state_file.name, *map(_piece_name, pieces or [])):
        if _digest(path.with_name(name)) != sha256[name]:
            raise _DamagedError(f"the checksum of {name} does not fit")
    try:
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        state["clocks"]["step"]
    except Exception as error:  # a file that was made up raises anything
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise _DamagedError(f"{state_file.name} is not a state: {reason}") from error
    about, training, then = record["about"], record["training"], record["versions"]
    return Checkpoint(path.parent, record["number"], about, training, then, pieces, sha256, state)


def _piece_name(piece: tuple[int, int]) -> str:
    return f"replay-{piece[0]}-{piece[1]}.f32"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parts(agent: Any) -> dict[str, Any]:
    """What changes in an agent, by attribute: modules, descents and streams."""
    parts: dict[int, tuple[str, Any]] = {}
    for name, value in vars(agent).items():
        if isinstance(value, nn.Module | Descent | Streams):
            parts.setdefault(id(value), (name, value))  # `policy` is another name
    return dict(parts.values())


def _load(training: Training, averages: PolicyAverages | None, state: State) -> None:
    """Put what `training_state` returned back, but for the environments."""
    for name, part in _parts(training.agent).items():
        part.load_state_dict(state["agent"][name])
    training.learner.sampling.load_state_dict(state["sampling"])
    if averages:
        averages.load_state_dict(state["averages"])
    training.losses = {tag: x.to(training.device) for tag, x in state["losses"].items()}
    training.evaluations = {
        scheme: Evaluation(returns.numpy(), lengths.numpy())
        for scheme, (returns, lengths) in state["evaluations"].items()
    }
    for name in CLOCKS:
        setattr(training, name, state["clocks"][name])


def _require_fit(name: str, ours: Any, theirs: Any) -> None:
    """Raise ValueError where a saved value has not the form of the one it is to replace."""
    if _form(ours) != _form(theirs):
        raise ValueError(
            f"the checkpoint does not fit this training at {name}: {_form(theirs)} there, "
            f"{_form(ours)} here"
        )
    if isinstance(ours, Mapping):
        for key, value in ours.items():
            _require_fit(f"{name}.{key}", value, theirs[key])
    elif isinstance(ours, list | tuple):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            _require_fit(f"{name}.{i}", *pair)


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a mapping of {', '.join(sorted(map(repr, value)))}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _own_environments(training: Training) -> list[EpisodeSeeds]:
    envs: list[EpisodeSeeds] = getattr(training.envs, "envs", [])
    if not envs or not all(isinstance(env, EpisodeSeeds) for env in envs):
        raise ValueError("a training on environments of your own has no checkpoints")
    return envs


def _restore_environments(training: Training, saved: State) -> list[str]:
    """Bring every environment back into its episode, or begin the next one and say so."""
    for key, name in ARRAYS.items():
        setattr(training, name, saved[key].numpy().copy())
    notes = []
    envs = _own_environments(training)
    for i, env in enumerate(envs):
        member, place = divmod(i, training.config.n_envs)
        where = f"environment {place} of seed {training.seeds[member]}"
        env.episode = saved["episode"][i] - 1  # the reset counts it again
        why = _replay_episode(training, env, i)
        if why:
            observed, _ = env.reset()
            training.obs[member, place] = observed
            training.episode_return[i] = training.episode_length[i] = 0
            notes.append(f"{where} begins its next episode: {why}")
    if carries_state(envs[0]):
        notes.append(
            f"{training.config.env_id} carries state from one episode to the next (Box2D): "
            "it cannot be restored exactly"
        )
    return notes


def _replay_episode(training: Training, env: EpisodeSeeds, i: int) -> str:
    """Play an environment's episode again up to where it was; why that failed, or nothing."""
    n, length = training.config.n_envs, int(training.episode_length[i])
    member, place = divmod(i, n)
    if length * n > training.replay.size:
        return f"the replay buffer does not hold the {length} actions of its episode"
    first, action_dim = training.replay.widths[:2]
    rows = training.replay.last(length * n)[member, place::n]
    actions = rows[:, first : first + action_dim].numpy()
    if training.interface.discrete:
        actions = actions[:, 0].astype(np.int64)

    observed, _ = env.reset()
    total, ended = 0.0, False
    for action in training.interface.to_env(actions):
        if ended:
            return "played again, its episode ends earlier"
        observed, reward, terminated, truncated, _ = env.step(action)
        total += float(reward)
        ended = terminated or truncated
    expected = training.obs[member, place]
    same = np.asarray(observed, expected.dtype).tobytes() == expected.tobytes()
    if ended or not same or total != training.episode_return[i]:
        return f"played again, its episode is another one after {length} steps"
    return ""
