"""What an environment looks like to an agent: sizes, and the form of its actions."""

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Interface:
    """Sizes of observations and actions, and the range of the environment's actions.

    Attributes:
        obs_dim: Size of an observation.
        action_dim: Number of discrete actions, or size of a continuous one.
        discrete: Which of the two.
        low: The first discrete action, or the smallest continuous one [A].
        high: The largest continuous action [A].
    """

    obs_dim: int
    action_dim: int
    discrete: bool
    low: NDArray[Any]
    high: NDArray[Any]

    def to_env(self, action: NDArray[Any]) -> NDArray[Any]:
        """The environment's form of an agent's actions [..., A] in [-1, 1], or indices [...]."""
        if self.discrete:
            return action + self.low if self.low.item() else action
        scaled = self.low + (action + 1) * (0.5 * (self.high - self.low))
        # rounding may pass a bound by a unit in the last place
        clipped: NDArray[Any] = np.clip(scaled, self.low, self.high)
        return clipped


def interface(obs_space: gym.Space[Any], action_space: gym.Space[Any], algo: str) -> Interface:
    """Check that an algorithm can train on these spaces, and describe them.

    Raises:
        ValueError: Observations are not a one-dimensional Box, or actions not what `algo` takes:
            Discrete for "dqn", a one-dimensional finite Box for the others.
    """
    if not isinstance(obs_space, spaces.Box) or len(obs_space.shape) != 1:
        raise ValueError(f"observations must be a one-dimensional Box, got {obs_space}")
    obs_dim = obs_space.shape[0]
    if algo == "dqn":
        if not isinstance(action_space, spaces.Discrete):
            raise ValueError(f"dqn needs Discrete actions, got {action_space}")
        start = np.asarray(action_space.start)
        return Interface(obs_dim, int(action_space.n), True, start, start)
    if not isinstance(action_space, spaces.Box) or len(action_space.shape) != 1:
        raise ValueError(f"{algo} needs actions in a one-dimensional Box, got {action_space}")
    if not action_space.is_bounded():
        raise ValueError(f"{algo} needs actions with finite bounds, got {action_space}")
    low, high = action_space.low, action_space.high
    return Interface(obs_dim, action_space.shape[0], False, low, high)


def make_env(env_id: str, **kwargs: Any) -> gym.Env[Any, Any]:
    """`gymnasium.make` without its checker, which costs as much as a small environment's step.

    Raises:
        ValueError: There is no such environment, or what it needs is not installed.
    """
    try:
        return gym.make(env_id, disable_env_checker=True, **kwargs)
    except (gym.error.Error, ImportError) as error:
        raise ValueError(f"cannot make the environment {env_id!r}: {error}") from error
