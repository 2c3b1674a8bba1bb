"""Deterministic evaluation of several policies at once, on fixed episodes."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from agents.environments import Interface, fault, make_env, observed, stepped

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
    envs: Sequence[gym.Env[Any, Any]],
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
        envs: M * E environments or more.
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
    slots, shape = members * episodes, interface.obs_shape
    obs = np.zeros((slots, *shape), dtype=interface.obs_dtype)
    seeds = episode_seeds.ravel().tolist()

    def where() -> str:
        return f"step {lengths[slot] + 1} of the evaluation episode of reset(seed={seeds[slot]})"

    lengths = np.zeros(slots, dtype=np.int64)
    for slot, seed in enumerate(seeds):
        try:
            obs[slot] = observed(envs[slot].reset(seed=seed), shape, obs.dtype)
        except Exception as error:
            raise fault(error, "reset", where()) from error
    returns = np.zeros(slots)
    playing = np.ones(slots, dtype=bool)
    step = 0
    while playing.any():
        if stopping():
            raise Stopped("the evaluation was stopped")
        if step == max_steps:
            warnings.warn(
                f"{int(playing.sum())} of {slots} evaluation episodes did not end in {max_steps} "
                "steps and were cut there",
                stacklevel=2,
            )
            break
        step += 1
        batch = torch.from_numpy(obs).to(device).view(members, episodes, *shape)
        action = policy.act(batch).flatten(0, 1).cpu().numpy()  # type: ignore[operator]
        action = interface.to_env(action)
        for slot in np.flatnonzero(playing).tolist():
            try:
                values = envs[slot].step(action[slot])
                obs[slot], reward, terminated, truncated, _ = stepped(values, shape, obs.dtype)
            except Exception as error:
                raise fault(error, "step", where()) from error
            returns[slot] += reward
            lengths[slot] += 1
            playing[slot] = not (terminated or truncated)
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
    """

    def __init__(
        self,
        env_id: str,
        interface: Interface,
        device: torch.device | str = "cpu",
        wrap: Sequence[str] = (),
        max_steps: int = MAX_STEPS,
    ) -> None:
        self.env_id, self.wrap = env_id, tuple(wrap)
        self.interface = interface
        self.device = torch.device(device)
        self.max_steps = max_steps
        self.envs: list[gym.Env[Any, Any]] = []

    def evaluate(
        self,
        policy: nn.Module,
        episode_seeds: NDArray[Any],
        stopping: Callable[[], bool] = lambda: False,
    ) -> Evaluation:
        """`play` the episodes of these seeds [M, E] with a policy of M members."""
        while len(self.envs) < episode_seeds.size:
            self.envs.append(make_env(self.env_id, self.wrap))
        common = (self.envs, self.interface, episode_seeds, self.device, self.max_steps, stopping)
        return play(policy, *common)

    def close(self) -> None:
        """Close the environments."""
        while self.envs:
            try:
                self.envs.pop().close()
            except Exception as error:
                raise fault(error, "close", "after evaluations") from error
