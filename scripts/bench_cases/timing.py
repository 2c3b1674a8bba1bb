"""Time contenders that take turns, and judge what comes out.

A round times each contender for a moment, the next round begins with another one. Figures are
medians over the rounds with their quartiles, and every ratio is the median of the rounds' ratios,
so that a machine that slows down slows all of them.
"""

import contextlib
import gc
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from agents.malloc import keep_freed_memory

Clock = Literal["wall", "cpu"]
Unit = Literal["seconds", "steps/s"]


class Spread(NamedTuple):
    """A median and its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of some values."""
        low, median, high = np.percentile(values, [25, 50, 75])
        return cls(float(median), float(low), float(high))

    def scaled(self, factor: float) -> "Spread":
        """The spread of the values times a factor."""
        return Spread(*(factor * x for x in self))

    def __str__(self) -> str:
        return "{:.3g} [{:.3g}, {:.3g}]".format(*self)


class Contender(NamedTuple):
    """Something to time: what a call does, and how many updates or steps that is.

    Ours runs with the allocator as `scripts.train` sets it, a rival with glibc's defaults, as where
    it runs alone.
    """

    run: Callable[[], object]
    per_call: int = 1
    rival: bool = False


@dataclass
class Case:
    """One comparison. Cases of one title differ in size, and make one table."""

    section: str
    title: str
    size: str
    unit: Unit
    note: str
    baseline: str
    rounds: dict[str, list[float]]
    """seconds an item, by contender, in each round"""

    def seconds(self, name: str) -> Spread:
        """Seconds of one item."""
        return Spread.of(self.rounds[name])

    def ratio(self, over: str, under: str) -> Spread:
        """How many times longer `over` took than `under`, compared round by round."""
        both = zip(self.rounds[over], self.rounds[under], strict=True)
        return Spread.of([a / b for a, b in both])


class Value(NamedTuple):
    """A figure that is counted and not timed."""

    section: str
    name: str
    value: float
    unit: str


@dataclass(frozen=True)
class Goal:
    """What must be reached: a ratio of two contenders' times in a case, or a value."""

    text: str
    title: str
    size: str = ""
    over: str = ""
    under: str = ""
    scale: float = 1.0
    """what the ratio is multiplied by"""
    at_least: float | None = None
    at_most: float | None = None
    gpu: bool = False
    """whether only a GPU can show it"""

    @property
    def bound(self) -> str:
        """The bound in words."""
        if self.at_least is not None:
            return f"at least {self.at_least:g}"
        return f"at most {self.at_most:g}"

    def verdict(self, reached: Spread | None) -> str:
        """pass, miss or not measured."""
        if reached is None:
            return "not measured"
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        return "pass" if low <= reached.median <= high else "miss"


class Bench:
    """Times contenders against each other and keeps the figures.

    Args:
        device: Where they work; it is waited for at both ends of a turn.
        rounds: Turns that each contender gets.
        clock: What a turn is timed by; "cpu" counts this process alone.
    """

    def __init__(self, device: torch.device, rounds: int, clock: Clock = "wall") -> None:
        self.device, self.rounds, self.clock = device, rounds, clock
        self.cases: list[Case] = []
        self.values: list[Value] = []
        self.section = ""
        self.wall = self.cpu = 0.0  # seconds of all turns

    def compare(
        self,
        title: str,
        contenders: Mapping[str, Contender | Callable[[], object]],
        *,
        seconds: float,
        size: str = "",
        unit: Unit = "seconds",
        note: str = "",
        baseline: str = "",
    ) -> None:
        """Let the contenders take turns of about `seconds`; a turn is at least one call."""
        print(f"{self.section}: {title} {size}".rstrip(), file=sys.stderr, flush=True)
        entered = {
            name: c if isinstance(c, Contender) else Contender(c) for name, c in contenders.items()
        }
        gc.collect()
        gc.freeze()  # what was just built would be walked through in everybody's turns
        calls = {name: self._calls(c, seconds) for name, c in entered.items()}
        rounds: dict[str, list[float]] = {name: [] for name in entered}
        order = list(entered)
        for _ in range(self.rounds):
            for name in order:
                turn = self._turn(entered[name], calls[name])
                rounds[name].append(turn / (calls[name] * entered[name].per_call))
            order = [*order[1:], order[0]]
        gc.unfreeze()
        self.cases.append(Case(self.section, title, size, unit, note, baseline, rounds))

    def value(self, name: str, value: float, unit: str) -> None:
        """Keep a figure that is no time."""
        self.values.append(Value(self.section, name, value, unit))

    def reached(self, goal: Goal) -> Spread | None:
        """What a goal came to; None where it was not measured."""
        if goal.gpu and self.device.type != "cuda":
            return None
        if not goal.over:
            found = [v.value for v in self.values if v.name == goal.title]
            return Spread.of(found) if found else None
        for case in self.cases:
            names = {goal.over, goal.under}
            if (case.title, case.size) == (goal.title, goal.size) and names <= set(case.rounds):
                return case.ratio(goal.over, goal.under).scaled(goal.scale)
        return None

    def _calls(self, contender: Contender, seconds: float) -> int:
        for _ in range(2):
            contender.run()  # compiles, allocates, fills caches
        calls = 1
        while (taken := self._turn(contender, calls)) < seconds / 4:
            calls *= 2
        return max(1, round(calls * seconds / taken))

    def _turn(self, contender: Contender, calls: int) -> float:
        run = contender.run
        keep_freed_memory(not contender.rival)
        self._synchronize()
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in itertools.repeat(None, calls):
            run()
        self._synchronize()
        cpu, wall = time.process_time() - cpu_start, time.perf_counter() - start
        self.cpu += cpu
        self.wall += wall
        return cpu if self.clock == "cpu" else wall

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """As many threads in an operation, and as many cores for the process."""
    threads_before = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    torch.set_num_threads(threads)
    if cores:
        os.sched_setaffinity(0, sorted(cores)[-threads:])
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        if cores:
            os.sched_setaffinity(0, cores)
