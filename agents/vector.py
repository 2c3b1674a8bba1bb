"""Environments side by side for training, and the seeds of their episodes."""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import FlattenObservation
from numpy.typing import NDArray

from agents.environments import fault, make_env, observed, stepped
from agents.nonfinite import NonFiniteError
from agents.seeding import episode_seed

LARGEST = float(np.finfo(np.float32).max)


class EpisodeSeeds(gym.Wrapper[Any, Any, Any, Any]):
    """Gives every episode a seed of its own, so that any episode can be played again alone.

    Its own info is left out: no key of it means anything here, and none can be taken for one of
    Gymnasium's. An observation may be an array that the environment writes to again.

    Raises:
        EnvironmentFault: The environment raised, or returned what is not of Gymnasium's form or not
            of its spaces' shape; the message says which seed and step reproduce it.
    """

    def __init__(self, env: gym.Env[Any, Any], seed: int, env_index: int) -> None:
        super().__init__(env)
        space = env.observation_space
        self._shape, self._dtype = space.shape, space.dtype
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
            values = self.env.reset(seed=seed, options=options)
            return observed(values, self._shape, self._dtype), {}
        except Exception as error:
            raise fault(error, "reset", self.where()) from error

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step the environment; what goes wrong is named."""
        self.steps += 1
        try:
            return *stepped(self.env.step(action), self._shape, self._dtype), {}
        except Exception as error:
            raise fault(error, "step", self.where()) from error

    def close(self) -> None:
        """Close the environment; what goes wrong is named."""
        try:
            super().close()
        except Exception as error:
            raise fault(error, "close", self.where()) from error

    def where(self) -> str:
        """What plays the episode again up to now."""
        return (
            f"environment {self.env_index} of seed {self.seed}, step {self.steps} of the episode "
            f"that reset(seed={self.reset_seed}) begins"
        )


class SameStep(SyncVectorEnv):
    """Environments side by side that reset in the step that ends an episode.

    As Gymnasium's own, whose step costs several of CartPole's: observations are written to a new
    array once, not copied, and of what else environments tell only `final_obs` is passed on.
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env[Any, Any]]]) -> None:
        super().__init__(env_fns, autoreset_mode=AutoresetMode.SAME_STEP)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step every environment; those whose episode ends begin the next one."""
        space = self.single_observation_space
        obs = np.empty((self.num_envs, *(space.shape or ())), dtype=space.dtype)
        rewards, terminated, truncated = [], [], []
        final: dict[int, Any] = {}
        for i, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            seen, reward, over, cut, _ = env.step(action)
            if over or cut:
                final[i] = seen.copy()  # the environment may write to it again
                seen, _ = env.reset()
            obs[i] = seen
            rewards.append(reward)
            terminated.append(over)
            truncated.append(cut)
        told = np.array(rewards), np.array(terminated), np.array(truncated)
        return obs, *told, {"final_obs": final}


def vector_env(
    env_id: str, seeds: Sequence[int], n_envs: int, wrap: Sequence[str] = ()
) -> SameStep:
    """`n_envs` environments for each seed, every episode of which can be played again alone."""

    def build(seed: int, env_index: int) -> Callable[[], gym.Env[Any, Any]]:
        return lambda: EpisodeSeeds(make_env(env_id, wrap), seed, env_index)

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


def finite_reward(reward: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which rewards are finite in float32, as they are stored."""
    held: NDArray[np.bool_] = np.abs(reward) <= LARGEST  # false of NaN
    return held


def _all_finite(obs: NDArray[Any]) -> bool:
    return bool(obs.dtype == np.uint8) or _all(np.isfinite(obs))


def _all(held: NDArray[np.bool_]) -> bool:
    return bool(np.count_nonzero(held) == held.size)  # a fifth of the work of `held.all()`


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
    same = next_obs is obs
    if _all(finite_reward(reward)) and _all_finite(obs) and (same or _all_finite(next_obs)):
        return
    looks = [("a reward", finite_reward(reward), True), ("an observation", finite(next_obs), True)]
    if not same:
        looks += [("the first observation of an episode", finite(obs), False)]
    for what, good, before_reset in looks:
        for i in np.flatnonzero(~good).tolist():
            env = envs.envs[i] if isinstance(envs, SyncVectorEnv) else None
            where = f"environment {i}"
            if isinstance(env, EpisodeSeeds):
                where = env.before if before_reset and ended[i] else env.where()
            value = f" of {reward[i]:g}" if what == "a reward" else ""
            after = f"{what}{value} is not finite in float32 after {step} environment steps"
            raise NonFiniteError(f"{after}: {where}")


def flattened(envs: VectorEnv[Any, Any, Any]) -> str | None:
    """A line on observations that `make_env` has flattened in environments made here, if it has."""
    env = envs.envs[0] if isinstance(envs, SyncVectorEnv) else None
    inner = env.env if isinstance(env, EpisodeSeeds) else None
    if not isinstance(inner, FlattenObservation):
        return None
    size = inner.observation_space.shape
    return f"observations flattened: {inner.env.observation_space} to {size}"
