"""Environments: how they look to an agent, how they are made, and what they must return."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import AtariPreprocessing, FlattenObservation, FrameStackObservation
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
        half = self._half
        if self._is_wide:
            scaled = 0.5 * self.low + 0.5 * self.high + action * half
        else:
            scaled = self.low + (action + 1) * half
        # rounding may pass a bound by a unit in the last place
        clipped: NDArray[Any] = scaled.clip(self.low, self.high)
        return clipped

    @cached_property
    def _half(self) -> NDArray[Any]:
        return 0.5 * self.high - 0.5 * self.low

    @cached_property
    def _is_wide(self) -> bool:
        """Whether twice `_half` would overflow."""
        return bool(self._half.max() > 0.25 * np.finfo(self._half.dtype).max)


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
            if frames >= min(height, width):
                raise ValueError(
                    "images must be (frames, height, width), with fewer frames than pixels either "
                    f"way, got {obs_space.shape}: for channels last, --wrap a wrapper that "
                    "transposes them"
                )
            obs_dim = (frames, height, width)
        case _:
            images = "; dqn also takes images, a uint8 Box (frames, height, width)"
            raise ValueError(
                f"observations must be a one-dimensional Box, got {obs_space}: --wrap a wrapper "
                "that makes them one, such as gymnasium.wrappers:FlattenObservation"
                + (images if algo == "dqn" else "")
            )
    if algo == "dqn":
        if not isinstance(action_space, spaces.Discrete):
            raise ValueError(f"dqn needs Discrete actions, got {action_space}")
        start = np.asarray(action_space.start)
        return Interface(obs_dim, int(action_space.n), True, start, start)
    if not isinstance(action_space, spaces.Box) or len(action_space.shape) != 1:
        raise ValueError(f"{algo} needs actions in a one-dimensional Box, got {action_space}")
    if action_space.dtype is None or not np.issubdtype(action_space.dtype, np.floating):
        raise ValueError(f"{algo} needs actions in a Box of floats, got {action_space}")
    if not action_space.is_bounded():
        raise ValueError(f"{algo} needs actions with finite bounds, got {action_space}")
    low, high = action_space.low, action_space.high
    return Interface(obs_dim, action_space.shape[0], False, low, high)


def make_env(env_id: str, wrap: Sequence[str] = (), **kwargs: Any) -> gym.Env[Any, Any]:
    """`gymnasium.make` without its checker, which costs as much as a small environment's step.

    Observations that are neither a one-dimensional Box nor images, a Box [., ., .] of uint8, are
    flattened by Gymnasium's own `FlattenObservation` where they can be.

    Atari games are seen as in Mnih et al. 2015, with the changes of Machado et al. 2018
    (https://arxiv.org/abs/1709.06009) that the ids `ALE/*-v5` stand for: the last four frames, each
    84 x 84 and gray, four steps of the console apart; an action is stuck to with probability 1/4,
    and an episode ends with the game, not with a life.

    Args:
        env_id: Gymnasium's name of the environment.
        wrap: Wrappers to put around it, "package.module:Wrapper" each, the innermost first.
        kwargs: Of `gymnasium.make`.

    Raises:
        ValueError: There is no such environment or wrapper, what it needs is not installed, or it
            cannot be made.
    """
    try:
        if env_id.startswith("ALE/"):
            gym.register_envs(importlib.import_module("ale_py"))
            screen = gym.make(env_id, disable_env_checker=True, frameskip=1, **kwargs)
            env: gym.Env[Any, Any] = FrameStackObservation(AtariPreprocessing(screen), stack_size=4)
        else:
            with _own_models_are_no_news(env_id):
                env = gym.make(env_id, disable_env_checker=True, **kwargs)
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        atari = "; pip install -c constraints.txt --group atari"
        extra = atari if env_id.startswith("ALE/") else ""
        raise ValueError(f"cannot make the environment {env_id!r}: {error}{extra}") from error
    except gym.error.Error as error:
        hint = _class_hint(env_id)
        raise ValueError(f"cannot make the environment {env_id!r}: {error}{hint}") from error
    except Exception as error:  # its own code raises anything
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"cannot make the environment {env_id!r}: {what}") from error
    for name in wrap:
        env = _wrapped(env, name)
    return FlattenObservation(env) if _to_flatten(env.observation_space) else env


@contextmanager
def _own_models_are_no_news(env_id: str) -> Iterator[None]:
    """Keeps MuJoCo from deprecating a line of Gymnasium's own models each time that one is read.

    Its other warnings are printed.
    """
    spec = gym.registry.get(env_id)
    own = spec is not None and "gymnasium.envs.mujoco" in str(spec.entry_point)
    if not own or importlib.util.find_spec("mujoco") is None:
        yield
        return
    mujoco = importlib.import_module("mujoco")
    before = mujoco.get_mju_user_warning()

    def warn(text: str) -> None:
        if "settotalmass" not in text:
            print(f"WARNING: {text}", file=sys.stderr)

    mujoco.set_mju_user_warning(warn)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


def _class_hint(env_id: str) -> str:
    """What to do about a name, "module:Class", of a class that is not registered."""
    module, _, name = env_id.rpartition(":")
    kind = getattr(sys.modules.get(module), name, None)
    if not isinstance(kind, type):
        return ""
    register = f'gymnasium.register("{name}-v0", {name})'
    return f"; {name} is a class: write {register} into {module}.py, and ask for {module}:{name}-v0"


def _wrapped(env: gym.Env[Any, Any], name: str) -> gym.Env[Any, Any]:
    module, colon, wrapper = name.partition(":")
    if not colon:
        raise ValueError(f"a wrapper must be given as package.module:Wrapper, got {name!r}")
    try:
        wrapped = getattr(importlib.import_module(module), wrapper)(env)
    except Exception as error:  # its own code raises anything
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"cannot wrap the environment in {name!r}: {what}") from error
    if not isinstance(wrapped, gym.Env):
        raise ValueError(f"{name!r} must return an environment, got {type(wrapped).__name__}")
    return wrapped


def _to_flatten(space: gym.Space[Any]) -> bool:
    """Whether observations have to be flattened, and can be."""
    match space:
        case spaces.Box(shape=(_,)) | spaces.Box(shape=(_, _, _), dtype=np.uint8):
            return False
        case _:
            return bool(space.is_np_flattenable)


def carries_state(env: gym.Env[Any, Any]) -> bool:
    """Whether an environment's episodes depend, in the last digits, on those that it had before."""
    return "box2d" in type(env.unwrapped).__module__


class EnvironmentFault(RuntimeError):
    """An environment raised, or returned what its spaces do not allow."""


class Malformed(TypeError):
    """What an environment returned is not of Gymnasium's form, or not of its spaces."""


_REAL = (float, int, np.floating, np.integer)
_BOOL = (bool, np.bool_)


def observed(values: Any, shape: tuple[int, ...] | None, dtype: Any) -> NDArray[Any]:
    """A reset's observation, checked; it may be an array that the environment writes to again.

    Raises:
        Malformed: The values are not what Gymnasium's `reset` returns.
    """
    if not isinstance(values, tuple) or len(values) != 2:
        raise Malformed(f"returned {_brief(values)} from reset, not (observation, info)")
    _check_info(values[1])
    return _observation(values[0], shape, dtype)


def stepped(
    values: Any, shape: tuple[int, ...] | None, dtype: Any
) -> tuple[NDArray[Any], float, bool, bool]:
    """A step's observation, reward, terminated and truncated, checked.

    The observation may be an array that the environment writes to again.

    Raises:
        Malformed: The values are not what Gymnasium's `step` returns.
    """
    if not isinstance(values, tuple) or len(values) != 5:
        raise Malformed(
            f"returned {_brief(values)} from step, not (observation, reward, terminated, "
            "truncated, info)"
        )
    obs, reward, terminated, truncated, info = values
    if not isinstance(reward, _REAL):
        kind = np.asarray(reward)
        if kind.shape or kind.dtype.kind not in "fiub":
            raise Malformed(f"returned a reward that is not one real number, but {_brief(reward)}")
    if not isinstance(terminated, _BOOL):
        raise Malformed(f"returned terminated that is not a bool, but {_brief(terminated)}")
    if not isinstance(truncated, _BOOL):
        raise Malformed(f"returned truncated that is not a bool, but {_brief(truncated)}")
    _check_info(info)
    return _observation(obs, shape, dtype), float(reward), bool(terminated), bool(truncated)


def _observation(obs: Any, shape: tuple[int, ...] | None, dtype: Any) -> NDArray[Any]:
    array = np.asarray(obs)
    if array.dtype.kind not in "fiub":
        raise Malformed(f"returned an observation that is not of real numbers, but {_brief(obs)}")
    if array.shape != shape:
        raise Malformed(f"returned an observation of shape {array.shape}, not {shape}")
    if array.dtype == dtype:
        return array
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise Malformed(f"returned an observation of {array.dtype}, not {np.dtype(dtype)}")
    with np.errstate(over="ignore"):  # what is infinite now is looked for later
        return array.astype(dtype)


def _check_info(info: Any) -> None:
    if not isinstance(info, dict):
        raise Malformed(f"returned info that is not a dict, but {_brief(info)}")


def _brief(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} values"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} {value.shape}"
    return f"{value!r:.40}"


def fault(error: Exception, call: str, where: str) -> EnvironmentFault:
    """Names what went wrong in a call of an environment, or with what it returned."""
    own = isinstance(error, Malformed)
    what = str(error) if own else f"raised {type(error).__name__} in {call}: {error}"
    return EnvironmentFault(f"the environment {what} ({where})")
