"""What an environment looks like to an agent: sizes, and the form of its actions."""

import importlib
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Interface:
    """Sizes of observations and actions, and the range of the environment's actions.

    Attributes:
        obs_dim: Size of an observation; of a stack of images (frames, height, width).
        action_dim: Number of discrete actions, or size of a continuous one.
        discrete: Which of the two.
        low: The first discrete action, or the smallest continuous one [A].
        high: The largest continuous action [A].
    """

    obs_dim: int | tuple[int, int, int]
    action_dim: int
    discrete: bool
    low: NDArray[Any]
    high: NDArray[Any]

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """Shape of an observation."""
        return self.obs_dim if isinstance(self.obs_dim, tuple) else (self.obs_dim,)

    @property
    def obs_dtype(self) -> type[np.uint8] | type[np.float32]:
        """What agents take observations as: images as they are, all else as float32."""
        return np.uint8 if isinstance(self.obs_dim, tuple) else np.float32

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
        ValueError: Observations are not a one-dimensional Box (for "dqn" stacks of images neither),
            or actions not what `algo` takes: Discrete for "dqn", a one-dimensional finite Box for
            the others.
    """
    obs_dim: int | tuple[int, int, int]
    match obs_space:
        case spaces.Box(shape=(size,)):
            obs_dim = size
        case spaces.Box(shape=(frames, height, width), dtype=np.uint8) if algo == "dqn":
            obs_dim = (frames, height, width)
        case _:
            images = "; dqn also takes images, a uint8 Box (frames, height, width)"
            raise ValueError(
                f"observations must be a one-dimensional Box, got {obs_space}"
                + (images if algo == "dqn" else "")
            )
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

    Atari games are seen as in Mnih et al. 2015, with the changes of Machado et al. 2018
    (https://arxiv.org/abs/1709.06009) that the ids `ALE/*-v5` stand for: the last four frames, each
    84 x 84 and gray, four steps of the console apart; an action is stuck to with probability 1/4,
    and an episode ends with the game, not with a life.

    Raises:
        ValueError: There is no such environment, or what it needs is not installed.
    """
    try:
        if not env_id.startswith("ALE/"):
            return gym.make(env_id, disable_env_checker=True, **kwargs)
        gym.register_envs(importlib.import_module("ale_py"))
        screen = gym.make(env_id, disable_env_checker=True, frameskip=1, **kwargs)
        return FrameStackObservation(AtariPreprocessing(screen), stack_size=4)
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        atari = "; pip install -c constraints.txt --group atari"
        hint = atari if env_id.startswith("ALE/") else ""
        raise ValueError(f"cannot make the environment {env_id!r}: {error}{hint}") from error
    except gym.error.Error as error:
        raise ValueError(f"cannot make the environment {env_id!r}: {error}") from error
