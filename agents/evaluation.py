"""Deterministic evaluation of several policies at once, on fixed episodes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from agents.environments import Interface, make_env


class Evaluation(NamedTuple):
    """What M policies reached in E episodes each."""

    returns: NDArray[np.float64]  # [M, E]
    lengths: NDArray[np.int64]  # [M, E]


@torch.inference_mode()
def play(
    policy: nn.Module,
    envs: Sequence[gym.Env[Any, Any]],
    interface: Interface,
    episode_seeds: NDArray[Any],
    device: torch.device | str = "cpu",
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
    """
    members, episodes = episode_seeds.shape
    slots, shape = members * episodes, interface.obs_shape
    obs = np.zeros((slots, *shape), dtype=interface.obs_dtype)
    for slot, seed in enumerate(episode_seeds.ravel().tolist()):
        obs[slot] = envs[slot].reset(seed=seed)[0]
    returns = np.zeros(slots)
    lengths = np.zeros(slots, dtype=np.int64)
    playing = np.ones(slots, dtype=bool)
    while playing.any():
        batch = torch.from_numpy(obs).to(device).view(members, episodes, *shape)
        action = policy.act(batch).flatten(0, 1).cpu().numpy()  # type: ignore[operator]
        action = interface.to_env(action)
        for slot in np.flatnonzero(playing).tolist():
            obs[slot], reward, terminated, truncated, _ = envs[slot].step(action[slot])
            returns[slot] += float(reward)
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
    """

    def __init__(
        self, env_id: str, interface: Interface, device: torch.device | str = "cpu"
    ) -> None:
        self.env_id = env_id
        self.interface = interface
        self.device = torch.device(device)
        self.envs: list[gym.Env[Any, Any]] = []

    def evaluate(self, policy: nn.Module, episode_seeds: NDArray[Any]) -> Evaluation:
        """`play` the episodes of these seeds [M, E] with a policy of M members."""
        while len(self.envs) < episode_seeds.size:
            self.envs.append(make_env(self.env_id))
        return play(policy, self.envs, self.interface, episode_seeds, self.device)

    def close(self) -> None:
        """Close the environments."""
        for env in self.envs:
            env.close()
        self.envs.clear()
