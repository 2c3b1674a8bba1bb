"""Environments that play evaluation episodes, in this process and in others that help it.

What plays in another process is given its actions and gives back what the environment returned, so
that the numbers are those of one process. Nothing here imports torch: a helper begins in a third of
a second.
"""

import contextlib
import importlib
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from agents.environments import EnvironmentFault, fault, make_env, observed, stepped

PAYS_AFTER = 2.0  # seconds of playing alone after which helpers are begun: what they cost, about
MESSAGE = 25e-6  # seconds that it takes to ask a helper and to read its answer
GRACE = 10  # seconds for a helper to end


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
        self.envs = list(envs)
        self.seeds: Sequence[int] = ()
        self.steps = 0

    def reset(self, seeds: Sequence[int]) -> NDArray[Any]:
        """Begin an episode with each seed: the observations [n, ...]."""
        self.seeds, self.steps = seeds, 0
        while len(self.envs) < len(seeds):
            self.envs.append(make_env(self.env_id, self.wrap))
        obs = np.empty((len(seeds), *self.shape), self.dtype)
        for slot, seed in enumerate(seeds):
            try:
                obs[slot] = observed(self.envs[slot].reset(seed=seed), self.shape, self.dtype)
            except Exception as error:
                raise fault(error, "reset", self._where(slot)) from error
        return obs

    def step(
        self, slots: NDArray[np.int64], actions: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.bool_]]:
        """Step the environments of some slots: observations, rewards, and which episodes ended."""
        self.steps += 1
        n, envs, shape, dtype = len(slots), self.envs, self.shape, self.dtype
        obs = np.empty((n, *shape), dtype)
        rewards, ended = np.empty(n), np.empty(n, dtype=bool)
        for i, (slot, action) in enumerate(zip(slots.tolist(), actions, strict=True)):
            try:
                values = stepped(envs[slot].step(action), shape, dtype)
            except Exception as error:
                raise fault(error, "step", self._where(slot)) from error
            obs[i], rewards[i], terminated, truncated = values
            ended[i] = terminated or truncated
        return obs, rewards, ended

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

    def __init__(self) -> None:
        begin = "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
        self.process = subprocess.Popen(
            [sys.executable, "-c", begin + "from agents.players import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._tell(sys.path)

    def ask(self, method: str, *arguments: Any) -> None:
        """Begin a call of one of its slots' methods; "begin" makes the slots."""
        self._tell((method, arguments))

    def answer(self) -> Any:
        """What the call returned, or the exception that it raised."""
        assert self.process.stdout is not None
        try:
            return pickle.load(self.process.stdout)
        except EOFError:
            raise self._ended() from None

    def end(self) -> None:
        """Let it end, or make it."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _tell(self, what: Any) -> None:
        assert self.process.stdin is not None
        data = pickle.dumps(what)
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
            two seconds; from there in as many as pay, and at most as there are idle cores.

    Raises:
        ValueError: From `reset`: the environments cannot be made in another process. With None all
            are played in this one then.
    """

    def __init__(self, own: Slots, processes: int | None = 1) -> None:
        self.own, self.processes = own, processes
        self.helpers: list[Helper] = []
        self._pid = os.getpid()
        self._n = 1  # processes that play now
        self._cores: int | None = None  # that were idle when it was looked
        self._seconds, self._steps = 0.0, 0  # of playing alone

    def reset(self, seeds: Sequence[int]) -> NDArray[Any]:
        """Begin an episode with each seed: the observations [n, ...]."""
        if self._pid != os.getpid():  # of a fork: the helpers are its parent's
            self._pid, self.helpers = os.getpid(), []
        missing = min(self._wanted(len(seeds)), len(seeds)) - 1 - len(self.helpers)
        if missing > 0:
            self._hire(missing)
        self._n = min(self._wanted(len(seeds)), len(seeds))
        parts = [seeds[p :: self._n] for p in range(self._n)]
        obs = self._call("reset", [(part,) for part in parts])
        places = [np.arange(p, len(seeds), self._n) for p in range(self._n)]
        return _together(places, obs)

    def step(self, slots: NDArray[np.int64], actions: NDArray[Any]) -> Sequence[NDArray[Any]]:
        """Step the environments of some slots: observations, rewards, and which episodes ended."""
        if self._n == 1:
            began = time.perf_counter()
            result = self.own.step(slots, actions)
            self._seconds += time.perf_counter() - began
            self._steps += len(slots)
            return result
        owner, number = slots % self._n, slots // self._n
        places = [np.flatnonzero(owner == p) for p in range(self._n)]
        calls = [(number[place], actions[place]) for place in places]
        answers = self._call("step", calls)
        return [_together(places, parts) for parts in zip(*answers, strict=True)]

    def close(self) -> None:
        """Close the environments, and let the helpers end."""
        try:
            self._call("close", [()] * (1 + len(self.helpers)))
        finally:
            self.dismiss()

    def dismiss(self) -> None:
        """Let the helpers end; they are begun again when they are needed."""
        while self.helpers:
            self.helpers.pop().end()

    def _wanted(self, slots: int) -> int:
        """In how many processes to play."""
        if self.processes is not None:
            return self.processes
        if self._seconds < PAYS_AFTER:
            return 1
        if self._cores is None:
            self._cores = idle_cores()
        best = math.sqrt(slots * self._seconds / self._steps / MESSAGE)
        return max(1, min(self._cores, round(best)))

    def _hire(self, count: int) -> None:
        own = self.own
        if not own.envs:
            own.envs.append(make_env(own.env_id, own.wrap))
        made = own.envs[0].unwrapped.spec
        spec = made and gym.registry.get(made.id)  # as it is registered here
        hired = [Helper() for _ in range(count)]
        self.helpers += hired
        try:
            for helper in hired:
                helper.ask("begin", spec, own.env_id, own.wrap, own.shape, own.dtype)
            for helper in hired:
                _raise(helper.answer())
        except Exception as error:  # its own code raises anything
            self.dismiss()
            if self.processes is not None:
                raise ValueError(
                    f"the environment {own.env_id!r} cannot be made in another process: {error}"
                ) from error
            self.processes = 1

    def _call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method of the slots of this process and of the first helpers at once."""
        asked = self.helpers[: len(arguments) - 1]
        try:
            for helper, given in zip(asked, arguments[1:], strict=True):
                helper.ask(method, *given)
            own = getattr(self.own, method)(*arguments[0])
            return [own, *(_raise(helper.answer()) for helper in asked)]
        except BaseException:
            self.dismiss()  # an answer may still be on its way
            raise


def _together(places: Sequence[NDArray[Any]], parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """One array of what lies at several places of it."""
    whole = np.empty((sum(map(len, places)), *parts[0].shape[1:]), parts[0].dtype)
    for place, part in zip(places, parts, strict=True):
        whole[place] = part
    return whole


def _raise(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer


def idle_cores() -> int:
    """The cores that this process may use and no other uses now, its own included."""
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else cores
    return min(usable, 1 + max(0, round(cores - load)))


def serve() -> None:
    """What a helper does: it answers its parent's calls until there are no more."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    calls = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what environments print is no answer
    slots: Any = None
    while True:
        answer: Any
        try:
            method, arguments = pickle.load(calls)
            if method == "begin":
                spec, *described = arguments
                _import_registering(described[0])
                if spec is not None:
                    gym.registry[spec.id] = spec
                slots = Slots(*described)
                slots.envs.append(make_env(slots.env_id, slots.wrap))
                answer = None
            else:
                answer = getattr(slots, method)(*arguments)
        except EOFError:
            return
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = error
        try:
            answers.write(pickle.dumps(answer))
            answers.flush()
        except BrokenPipeError:  # nobody waits for it
            return


def _import_registering(env_id: str) -> None:
    """Import what registers an environment, which would replace what is registered before."""
    module = "ale_py" if env_id.startswith("ALE/") else env_id.rpartition(":")[0]
    if module:
        importlib.import_module(module)
