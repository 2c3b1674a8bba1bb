"""Deterministic evaluation of several policies at once, on fixed episodes."""

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from agents.spaces import Interface, make_env


class Evaluation(NamedTuple):
    """What M policies reached in E episodes each."""

    returns: NDArray[np.float64]  # [M, E]
    lengths: NDArray[np.int64]  # [M, E]


class Evaluator:
    """Plays fixed episodes with the deterministic actions of policies.

    Each (member, episode) has an environment of its own, reset with that episode's seed and played
    to its end once, so short episodes are not favoured. The batch keeps its shape until the last
    episode has ended, so a member's result does not depend on the others'. No random number is
    drawn, so training goes on as if there had been no evaluation.

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
        self.envs: list[gym.Env[Any, Any]] = []  # made when first needed, then used again

    @torch.inference_mode()
    def evaluate(self, policy: nn.Module, episode_seeds: NDArray[Any]) -> Evaluation:
        """Play E episodes with each of M members of a policy.

        Args:
            policy: A network with `act(obs [M, E, O])`, of M members.
            episode_seeds: [M, E], the seed of each episode.
        """
        members, episodes = episode_seeds.shape
        slots = members * episodes
        while len(self.envs) < slots:
            self.envs.append(make_env(self.env_id))

        shape = self.interface.obs_shape
        obs = np.zeros((slots, *shape), dtype=self.interface.obs_dtype)
        for slot, seed in enumerate(episode_seeds.ravel().tolist()):
            obs[slot] = self.envs[slot].reset(seed=seed)[0]
        returns = np.zeros(slots)
        lengths = np.zeros(slots, dtype=np.int64)
        playing = np.ones(slots, dtype=bool)
        while playing.any():
            batch = torch.from_numpy(obs).to(self.device).view(members, episodes, *shape)
            action = policy.act(batch).flatten(0, 1).cpu().numpy()  # type: ignore[operator]
            action = self.interface.to_env(action)
            for slot in np.flatnonzero(playing).tolist():
                obs[slot], reward, terminated, truncated, _ = self.envs[slot].step(action[slot])
                returns[slot] += float(reward)
                lengths[slot] += 1
                playing[slot] = not (terminated or truncated)
        by_member = (members, episodes)
        return Evaluation(returns.reshape(by_member), lengths.reshape(by_member))

    def close(self) -> None:
        """Close the environments."""
        for env in self.envs:
            env.close()
        self.envs.clear()
