"""Environments that play evaluation episodes, in this process and in others that help it.

What plays in another process is given its actions and gives back what the environment returned, so
that the numbers are those of one process. Nothing here imports torch: a helper begins in a third of
a second.
"""

import contextlib
import importlib
import io
import math
import os
import pickle
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

from agents.environments import (
    EnvironmentFault,
    carries_state,
    fault,
    make_env,
    observed,
    stepped,
)

PAYS_AFTER = 2.0  # seconds of playing alone after which helpers are begun: what they cost, about
MESSAGE = 50e-6  # seconds that it takes to ask a helper and to read its answer
GRACE = 10  # seconds for a helper to end
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # a container's time on cores, and in how much time
BEGIN = """
import pickle, signal, sys
for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # meant for the parent; to ignore them is inherited
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), lambda *_: None)
sys.path[:] = pickle.load(sys.stdin.buffer)
from agents.players import serve
serve()
"""


class Slots:
    """Environments that play one episode each, stepped one after another.

    Args:
        env_id: Gymnasium's name of the environment.
        wrap: Wrappers, as in `make_env`.
        shape: Of an observation.
        dtype: Of the observations that are given back.
        envs: The first environments, if they are there; others are made as they are needed.
    """

    def __init__(
        self,
        env_id: str,
        wrap: Sequence[str],
        shape: tuple[int, ...],
        dtype: Any,
        envs: Sequence[gym.Env[Any, Any]] = (),
    ) -> None:
        self.env_id, self.wrap = env_id, tuple(wrap)
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.row = np.dtype(
            [("obs", self.dtype, shape), ("reward", np.float64), ("ended", bool)], align=True
        )
        self.envs = list(envs)
        self.seeds: Sequence[int] = ()
        self.playing: list[int] = []  # slots whose episodes have not ended
        self.steps = 0

    def reset(self, seeds: Sequence[int]) -> NDArray[Any]:
        """Begin an episode with each seed: the observations [n, ...]."""
        self.seeds, self.playing, self.steps = seeds, list(range(len(seeds))), 0
        while len(self.envs) < len(seeds):
            self.envs.append(make_env(self.env_id, self.wrap))
        obs = np.empty((len(seeds), *self.shape), self.dtype)
        for slot, seed in enumerate(seeds):
            try:
                obs[slot] = observed(self.envs[slot].reset(seed=seed), self.shape, self.dtype)
            except Exception as error:
                raise fault(error, "reset", self._where(slot)) from error
        return obs

    def step(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Step the environments whose episodes have not ended: rows of `obs`, `reward`, `ended`."""
        self.steps += 1
        rows = np.empty(len(self.playing), self.row)
        obs, rewards, ended = rows["obs"], rows["reward"], rows["ended"]
        envs, shape, dtype = self.envs, self.shape, self.dtype
        for i, (slot, action) in enumerate(zip(self.playing, actions, strict=True)):
            try:
                values = stepped(envs[slot].step(action), shape, dtype)
            except Exception as error:
                raise fault(error, "step", self._where(slot)) from error
            obs[i], rewards[i], terminated, truncated = values
            ended[i] = terminated or truncated
        self.playing = [slot for slot, end in zip(self.playing, ended, strict=True) if not end]
        return rows

    def close(self) -> None:
        """Close the environments."""
        while self.envs:
            try:
                self.envs.pop().close()
            except Exception as error:
                raise fault(error, "close", "after evaluations") from error

    def _where(self, slot: int) -> str:
        return f"step {self.steps} of the evaluation episode of reset(seed={self.seeds[slot]})"


class Helper:
    """A process with slots of its own, which ends with the one that began it.

    It is a new one, not a fork: it has no lock, no thread, no file and no GPU of its parent's.
    Signals that are meant for the parent do not end it.
    """

    def __init__(self, like: Slots) -> None:
        made = like.envs[0].unwrapped.spec
        spec = made and gym.registry.get(made.id)  # as it is registered here
        slots = (spec, like.env_id, like.wrap, like.shape, like.dtype)
        first = pickle.dumps(sys.path) + pickle.dumps(slots)  # before the process: it may raise
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", BEGIN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._row = like.row
        self._write(first)

    def ask(self, method: str, *arguments: Any) -> None:
        """Begin a call of one of its slots' methods."""
        self._write(pickle.dumps((method, arguments), pickle.HIGHEST_PROTOCOL))

    def answer(self) -> Any:
        """What the call returned, first of all None once the environments can be made.

        Raises:
            Exception: That the call raised.
            EnvironmentFault: The process has ended.
        """
        assert self.process.stdout is not None
        try:
            answer = pickle.load(self.process.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise self._ended() from None
        if isinstance(answer, Exception):
            raise answer
        return np.frombuffer(answer, self._row) if isinstance(answer, bytes) else answer

    def leave(self) -> None:
        """Tell it to end."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def end(self) -> None:
        """Wait until it has ended, or make it."""
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(data)
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _ended(self) -> EnvironmentFault:
        code = self.process.wait()
        return EnvironmentFault(f"the environment ended its process with code {code}")


class Players:
    """Slots that are dealt out, by turns, over this process and its helpers.

    Helpers are begun when they are first needed. To play alone costs `slots * step / n` in each of
    n processes, and to ask them n messages: together least at `n = sqrt(slots * step / message)`.

    Args:
        own: The slots of this process.
        processes: In how many to play, this one included. None: in this one until it has played for
            two seconds; from there in as many as pay, and at most as there are idle cores. Not so
            where an environment carries state from one episode to the next.

    Raises:
        ValueError: From `reset`: the environments cannot be made in another process. With None all
            are played in this one then.
    """

    def __init__(self, own: Slots, processes: int | None = 1) -> None:
        self.own, self.processes = own, processes
        self.helpers: list[Helper] = []
        self._pid = os.getpid()
        self._n = 1  # processes that play now, this one being number 0
        self._owner = np.zeros(0, dtype=np.int64)  # which of them plays each episode
        self._places: dict[int, NDArray[Any]] = {}
        self._cores: int | None = None  # that were idle when it was looked
        self._seconds, self._steps = 0.0, 0  # of playing alone

    def reset(self, seeds: Sequence[int]) -> NDArray[Any]:
        """Begin an episode with each seed: the observations [n, ...]."""
        if self._pid != os.getpid():  # of a fork: the helpers are its parent's
            self._pid, self.helpers = os.getpid(), []
        missing = self._wanted(len(seeds)) - 1 - len(self.helpers)
        if missing > 0:
            self._hire(missing)
        self._n = self._wanted(len(seeds))
        # Three turns to four of a helper: there is the policy to ask besides.
        turns = [p for turn in range(4) for p in range(self._n) if p or turn < 3]
        self._owner = np.resize(turns, len(seeds))
        self._find_places()
        given = {p: ([seeds[i] for i in place],) for p, place in self._places.items()}
        return self._together(self._call("reset", given))

    def step(self, actions: NDArray[Any]) -> NDArray[Any]:
        """As `Slots.step`."""
        if self._n == 1:
            began = time.perf_counter()
            rows = self.own.step(actions)
            self._seconds += time.perf_counter() - began
            self._steps += len(rows)
            return rows
        parts = {p: (actions[place],) for p, place in self._places.items()}
        rows = self._together(self._call("step", parts))
        if rows["ended"].any():
            self._owner = self._owner[~rows["ended"]]
            self._find_places()
        return rows

    def close(self) -> None:
        """Close the environments, and let the helpers end."""
        try:
            self._call("close", dict.fromkeys(range(1 + len(self.helpers)), ()))
        finally:
            self.dismiss()

    def dismiss(self) -> None:
        """Let the helpers end; they are begun again when they are needed."""
        for helper in self.helpers:
            helper.leave()
        while self.helpers:
            self.helpers.pop().end()

    def _wanted(self, slots: int) -> int:
        """In how many processes to play."""
        if self.processes is not None:  # so many always, so that a slot keeps its environment
            return self.processes
        if self._seconds <= PAYS_AFTER or carries_state(self.own.envs[0]):
            return 1
        if self._cores is None:
            self._cores = idle_cores()
        best = math.sqrt(slots * self._seconds / self._steps / MESSAGE)
        return max(1, min(self._cores, slots, round(best)))

    def _hire(self, count: int) -> None:
        """Begin so many helpers more."""
        own = self.own
        if not own.envs:
            own.envs.append(make_env(own.env_id, own.wrap))
        try:
            for _ in range(count):
                self.helpers.append(Helper(own))
            for helper in self.helpers[-count:]:
                helper.answer()
        except BaseException as error:
            self.dismiss()
            if not isinstance(error, Exception):
                raise
            if self.processes is not None:
                raise ValueError(
                    f"the environment {own.env_id!r} cannot be made in another process: {error}"
                ) from error
            self.processes = 1

    def _find_places(self) -> None:
        """Where the episodes that each process plays lie among all that have not ended."""
        places = {p: np.flatnonzero(self._owner == p) for p in range(self._n)}
        self._places = {p: place for p, place in places.items() if len(place)}

    def _together(self, parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
        whole = np.empty((len(self._owner), *parts[0].shape[1:]), parts[0].dtype)
        for place, part in zip(self._places.values(), parts, strict=True):
            whole[place] = part
        return whole

    def _call(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> list[Any]:
        """Call a method of the slots of several processes at once: 0 is this one."""
        asked = [self.helpers[p - 1] for p in arguments if p]
        try:
            for p, given in arguments.items():
                if p:
                    self.helpers[p - 1].ask(method, *given)
            own = [getattr(self.own, method)(*arguments[0])] if 0 in arguments else []
            return own + [helper.answer() for helper in asked]
        except BaseException:
            self.dismiss()  # an answer may still be on its way
            raise


def idle_cores() -> int:
    """The cores that this process may use and no other uses now, its own included."""
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    with contextlib.suppress(OSError, ValueError):  # there is no file, or it says "max"
        quota, period = map(int, QUOTA.read_text().split())
        usable = min(usable, quota // period)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else cores
    return max(1, min(usable, 1 + round(cores - load)))


def serve() -> None:
    """What a helper does: it answers its parent's calls until there are no more."""
    warnings.simplefilter("ignore")  # the parent has shown them
    calls, sys.stdin = sys.stdin.buffer, io.StringIO()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what environments print is no answer
    slots: Any = None
    while True:
        answer: Any = None
        try:
            asked = pickle.load(calls)
            if slots is None:
                slots = _made(*asked)
            else:
                method, arguments = asked
                answer = getattr(slots, method)(*arguments)
                if method == "step":
                    answer = answer.tobytes()  # a dtype of rows takes long to pickle
        except EOFError:
            return
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = error
        try:
            pickle.dump(answer, answers)
            answers.flush()
        except BrokenPipeError:  # nobody waits for it
            return


def _made(
    spec: EnvSpec | None, env_id: str, wrap: Sequence[str], shape: tuple[int, ...], dtype: Any
) -> Slots:
    """Slots as another process has them, with one environment."""
    # Imported later, what registers the environment would replace what is registered there.
    if module := "ale_py" if env_id.startswith("ALE/") else env_id.rpartition(":")[0]:
        importlib.import_module(module)
    if spec is not None:
        gym.registry[spec.id] = spec
    return Slots(env_id, wrap, shape, dtype, [make_env(env_id, wrap)])
