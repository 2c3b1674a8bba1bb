"""Deterministic evaluation of several policies at once, on fixed episodes."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from agents.environments import Interface
from agents.players import Players, Slots

MAX_STEPS = 100_000
"""Steps after which an evaluation episode is cut, where nothing else is said."""


class Evaluation(NamedTuple):
    """What M policies reached in E episodes each."""

    returns: NDArray[np.float64]  # [M, E]
    lengths: NDArray[np.int64]  # [M, E]


class Stopped(RuntimeError):
    """An evaluation was given up."""


@torch.inference_mode()
def play(
    policy: nn.Module,
    players: Slots | Players,
    interface: Interface,
    episode_seeds: NDArray[Any],
    device: torch.device | str = "cpu",
    max_steps: int = MAX_STEPS,
    stopping: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Play E episodes with the deterministic actions of each of M members of a policy.

    Each (member, episode) has an environment of its own, reset with that episode's seed and played
    to its end once, so short episodes are not favoured. The batch keeps its shape until the last
    episode has ended, so a member's result does not depend on the others'. No random number is
    drawn, so training goes on as if there had been no evaluation.

    Args:
        policy: A network with `act(obs [M, E, O])`, of M members.
        players: What holds the environments.
        interface: Their sizes and action range.
        episode_seeds: [M, E], the seed of each episode.
        device: Where the policy lives.
        max_steps: An episode is cut after so many, with a warning.
        stopping: Asked at every step whether to give up.

    Raises:
        EnvironmentFault: An environment raised, or returned what its spaces do not allow; the
            message says which seed and step reproduce it.
        Stopped: `stopping` said so.
    """
    members, episodes = episode_seeds.shape
    obs = players.reset(episode_seeds.ravel().tolist())  # [M * E, O]
    slots = len(obs)
    returns, lengths = np.zeros(slots), np.zeros(slots, dtype=np.int64)
    playing = np.arange(slots)
    step = 0
    while len(playing):
        if stopping():
            raise Stopped("the evaluation was stopped")
        if step == max_steps:
            warnings.warn(
                f"{len(playing)} of {slots} evaluation episodes did not end in {max_steps} "
                "steps and were cut there",
                stacklevel=2,
            )
            break
        step += 1
        batch = torch.from_numpy(obs).to(device).view(members, episodes, *interface.obs_shape)
        action = policy.act(batch).flatten(0, 1).cpu().numpy()  # type: ignore[operator]
        rows = players.step(interface.to_env(action)[playing])
        obs[playing] = rows["obs"]
        returns[playing] += rows["reward"]
        lengths[playing] += 1
        playing = playing[~rows["ended"]]
    by_member = (members, episodes)
    return Evaluation(returns.reshape(by_member), lengths.reshape(by_member))


class Evaluator:
    """Plays episodes on environments that it makes when they are first needed, and keeps.

    Args:
        env_id: Gymnasium's name of the environment.
        interface: Its sizes and action range.
        device: Where the policies live.
        wrap: Wrappers, as in `make_env`.
        max_steps: As in `play`.
        processes: As in `agents.players.Players`. In others an environment is what its id and
            wrappers say, and not what this process has done to its classes since.

    Raises:
        ValueError: `processes` is below 1.
    """

    def __init__(
        self,
        env_id: str,
        interface: Interface,
        device: torch.device | str = "cpu",
        wrap: Sequence[str] = (),
        max_steps: int = MAX_STEPS,
        processes: int | None = 1,
    ) -> None:
        if processes is not None and processes < 1:
            raise ValueError(f"processes must be at least 1, or None, got {processes}")
        self.interface = interface
        self.device = torch.device(device)
        self.max_steps = max_steps
        slots = Slots(env_id, wrap, interface.obs_shape, interface.obs_dtype)
        self.players = Players(slots, processes)

    def evaluate(
        self,
        policy: nn.Module,
        episode_seeds: NDArray[Any],
        stopping: Callable[[], bool] = lambda: False,
    ) -> Evaluation:
        """`play` the episodes of these seeds [M, E] with a policy of M members."""
        common = (self.players, self.interface, episode_seeds, self.device, self.max_steps)
        return play(policy, *common, stopping)

    def close(self) -> None:
        """Close the environments."""
        self.players.close()
