"""Environments: how they look to an agent, seeds of their episodes, and what they must return."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from numpy.typing import NDArray

from agents.nonfinite import NonFiniteError
from agents.seeding import episode_seed


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
        extra = "; pip install 'polyak-rl[atari]'" if env_id.startswith("ALE/") else ""
        raise ValueError(f"cannot make the environment {env_id!r}: {error}{extra}") from error
    except gym.error.Error as error:
        raise ValueError(f"cannot make the environment {env_id!r}: {error}") from error


class EnvironmentFault(RuntimeError):
    """An environment raised, or returned what its spaces do not allow."""


class EpisodeSeeds(gym.Wrapper[Any, Any, Any, Any]):
    """Gives every episode a seed of its own, so that any episode can be played again alone.

    Raises:
        EnvironmentFault: The environment raised, or returned an observation or a reward of another
            shape; the message says which seed and step reproduce it.
    """

    def __init__(self, env: gym.Env[Any, Any], seed: int, env_index: int) -> None:
        super().__init__(env)
        self.seed = seed
        self.env_index = env_index
        self.episode = 0
        self.reset_seed: int | None = None
        self.steps = 0
        self.before = ""  # `where` at the end of the episode before

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin the next episode, with its own seed unless one is given."""
        if seed is None:
            seed = episode_seed(self.seed, self.env_index, self.episode)
        self.episode += 1
        self.before = self.where()
        self.reset_seed, self.steps = seed, 0
        try:
            obs, info = self.env.reset(seed=seed, options=options)
        except Exception as error:
            raise self._fault(f"raised {type(error).__name__} in reset: {error}") from error
        self._check_shape("observation", obs, self.observation_space.shape)
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the environment; what goes wrong is named."""
        self.steps += 1
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
        except Exception as error:
            raise self._fault(f"raised {type(error).__name__} in step: {error}") from error
        self._check_shape("observation", obs, self.observation_space.shape)
        self._check_shape("reward", reward, ())
        return obs, reward, terminated, truncated, info

    def where(self) -> str:
        """What plays the episode again up to now."""
        return (
            f"environment {self.env_index} of seed {self.seed}, step {self.steps} of the episode "
            f"that reset(seed={self.reset_seed}) begins"
        )

    def _check_shape(self, what: str, value: Any, shape: tuple[int, ...] | None) -> None:
        if np.shape(value) != shape:
            raise self._fault(f"returned {what} of shape {np.shape(value)}, not {shape}")

    def _fault(self, what: str) -> EnvironmentFault:
        return EnvironmentFault(f"the environment {what} ({self.where()})")


class SameStep(SyncVectorEnv):
    """Environments side by side that reset in the step that ends an episode.

    As Gymnasium's own, whose step costs several of CartPole's: observations are written to a new
    array once, not copied, and of what else environments tell only `final_obs` is passed on.
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env[Any, Any]]]) -> None:
        super().__init__(env_fns, autoreset_mode=AutoresetMode.SAME_STEP)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step every environment; those whose episode ends begin the next one."""
        space, n = self.single_observation_space, self.num_envs
        obs = np.empty((n, *(space.shape or ())), dtype=space.dtype)
        rewards = np.empty(n)
        terminated, truncated = np.empty((2, n), dtype=bool)
        final: dict[int, Any] = {}
        for i, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            observed, rewards[i], terminated[i], truncated[i], _ = env.step(action)
            if terminated[i] or truncated[i]:
                final[i] = observed
                observed, _ = env.reset()
            obs[i] = observed
        return obs, rewards, terminated, truncated, {"final_obs": final}


def vector_env(env_id: str, seeds: Sequence[int], n_envs: int) -> SameStep:
    """`n_envs` environments for each seed, every episode of which can be played again alone."""

    def build(seed: int, env_index: int) -> Callable[[], gym.Env[Any, Any]]:
        return lambda: EpisodeSeeds(make_env(env_id), seed, env_index)

    return SameStep([build(seed, i) for seed in seeds for i in range(n_envs)])


def autoreset_of(envs: VectorEnv[Any, Any, Any], expected: int) -> AutoresetMode:
    """How a vector environment resets.

    Raises:
        ValueError: It does not reset by itself, or does not hold `expected` environments.
    """
    mode = envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
    if envs.num_envs != expected:
        raise ValueError(f"the vector environment must hold {expected}, got {envs.num_envs}")
    if mode not in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
        raise ValueError(f"the vector environment must reset by itself, got {mode}")
    return AutoresetMode(mode)


def finite(obs: NDArray[Any]) -> NDArray[np.bool_]:
    """Which of the observations [S, n_envs, ...] are finite, [S * n_envs]; images always are."""
    n = obs.shape[0] * obs.shape[1]
    if obs.dtype == np.uint8:
        return np.ones(n, dtype=bool)
    result: NDArray[np.bool_] = np.isfinite(obs.reshape(n, -1)).all(1)
    return result


def require_finite(
    envs: VectorEnv[Any, Any, Any],
    step: int,
    obs: NDArray[Any],
    next_obs: NDArray[Any],
    reward: NDArray[np.float64],
    ended: NDArray[np.bool_],
) -> None:
    """Look at what environments returned.

    Args:
        envs: The environments, of which those made by `vector_env` can say what they play.
        step: Environment steps taken before.
        obs: What they observe now [S, n, ...].
        next_obs: The same, but the last observation of an episode where one ended.
        reward: [S * n].
        ended: Where an episode ended [S * n].

    Raises:
        NonFiniteError: A number is not finite; the message says what plays the episode again.
    """
    if all(
        np.isfinite(x).all()
        for x in ((obs, reward) if next_obs is obs else (obs, next_obs, reward))
    ):
        return
    looks = [("a reward", np.isfinite(reward), True), ("an observation", finite(next_obs), True)]
    if next_obs is not obs:
        looks += [("the first observation of an episode", finite(obs), False)]
    for what, good, before_reset in looks:
        for i in np.flatnonzero(~good).tolist():
            env = envs.envs[i] if isinstance(envs, SyncVectorEnv) else None
            where = f"environment {i}"
            if isinstance(env, EpisodeSeeds):
                where = env.before if before_reset and ended[i] else env.where()
            raise NonFiniteError(f"{what} is not finite after {step} environment steps: {where}")
