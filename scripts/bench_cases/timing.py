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
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch

from agents.malloc import keep_freed_memory

Clock = Literal["wall", "cpu"]
Unit = Literal["seconds", "steps/s"]
Item = TypeVar("Item")

UPDATE, STEP, LOOP = 0.02, 0.2, 1.5  # seconds of a turn


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
    roofline: float = 0.0
    """seconds an item that the device's peaks allow; 0 where they were not measured"""

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
    """What must be reached: a ratio of two contenders' times, one contender's time, or a value."""

    text: str
    title: str
    size: str = ""
    over: str = ""
    under: str = ""
    scale: float = 1.0
    """what the ratio or the time is multiplied by"""
    at_least: float | None = None
    at_most: float | None = None
    gpu: bool = False
    """whether it is asked of a GPU, else of a CPU"""

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


class Needs(NamedTuple):
    """What an item needs at the least: bytes read and written, and floating-point operations."""

    bytes: float = 0.0
    flop: float = 0.0


NOTHING = Needs()


class Peaks(NamedTuple):
    """What a device can do, measured."""

    bandwidth: float
    """bytes a second, read and written, of a plain copy"""
    flops: float
    """floating-point operations a second in a large product"""


class Bench:
    """Times contenders against each other and keeps the figures.

    Args:
        device: Where they work; it is waited for at both ends of a turn.
        rounds: Turns that each contender gets.
        clock: What a turn is timed by; "cpu" counts this process alone.
        compile: Measure compiled steps too.
        quick: One call a turn and the two smallest of all sizes: to see that everything runs.
        minutes: Comparisons that would begin later than this are left out.
        peaks: What the device can do, for rooflines.
    """

    def __init__(
        self,
        device: torch.device,
        rounds: int,
        clock: Clock = "wall",
        *,
        compile: bool = False,
        quick: bool = False,
        minutes: float = math.inf,
        peaks: Peaks | None = None,
    ) -> None:
        self.device, self.rounds, self.clock = device, rounds, clock
        self.compile, self.quick, self.peaks = compile, quick, peaks
        self.deadline = time.monotonic() + 60 * minutes
        self.cases: list[Case] = []
        self.values: list[Value] = []
        self.left_out: list[str] = []
        self.section = ""
        self.wall = self.cpu = 0.0  # seconds of all turns

    def sizes(self, all_of_them: Sequence[Item]) -> Sequence[Item]:
        """The sizes that are measured, of a list that grows."""
        return all_of_them[:2] if self.quick else all_of_them

    def compare(
        self,
        title: str,
        contenders: Mapping[str, Contender | Callable[[], object]],
        *,
        seconds: float = UPDATE,
        size: str = "",
        unit: Unit = "seconds",
        note: str = "",
        baseline: str = "",
        needs: Needs = NOTHING,
    ) -> None:
        """Let the contenders take turns of about `seconds`; a turn is at least one call."""
        name = f"{self.section}: {title} {size}".rstrip()
        if time.monotonic() > self.deadline:
            self.left_out.append(name)
            return
        print(name, file=sys.stderr, flush=True)
        entered = {
            who: c if isinstance(c, Contender) else Contender(c) for who, c in contenders.items()
        }
        gc.collect()
        gc.freeze()  # what was just built would be walked through in everybody's turns
        calls: dict[str, int] = {}
        for who, contender in [*entered.items()]:
            try:
                calls[who] = self._calls(contender, 0 if self.quick else seconds)
            except RuntimeError as error:
                if not contender.rival:
                    raise
                reason = str(error).partition("\n")[0]
                self.left_out.append(f"{name}, {who} ({reason})")
                del entered[who]
        rounds: dict[str, list[float]] = {who: [] for who in entered}
        order = list(entered)
        for _ in range(self.rounds):
            for who in order:
                turn = self._turn(entered[who], calls[who])
                rounds[who].append(turn / (calls[who] * entered[who].per_call))
            order = [*order[1:], order[0]]
        gc.unfreeze()
        roofline = 0.0
        if self.peaks is not None:
            roofline = max(needs.bytes / self.peaks.bandwidth, needs.flop / self.peaks.flops)
        case = Case(self.section, title, size, unit, note, baseline, rounds, roofline)
        self.cases.append(case)

    def value(self, name: str, value: float, unit: str) -> None:
        """Keep a figure that is no time."""
        self.values.append(Value(self.section, name, value, unit))

    def reached(self, goal: Goal) -> Spread | None:
        """What a goal came to; None where it was not measured."""
        if goal.gpu != (self.device.type == "cuda"):
            return None
        if not goal.under:
            found = [v.value for v in self.values if v.name == goal.title]
            return Spread.of(found) if found else None
        names = {goal.over, goal.under} - {""}
        for case in self.cases:
            if (case.title, case.size) == (goal.title, goal.size) and names <= set(case.rounds):
                reached = (
                    case.ratio(goal.over, goal.under) if goal.over else case.seconds(goal.under)
                )
                return reached.scaled(goal.scale)
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


def call_all(calls: Sequence[Callable[[], object]]) -> None:
    """Call one after another."""
    for call in calls:
        call()


@contextlib.contextmanager
def pinned(threads: int, *, cores: bool = True) -> Iterator[None]:
    """As many threads in an operation and, if wanted, as many cores for the process."""
    threads_before = torch.get_num_threads()
    before = os.sched_getaffinity(0) if cores and hasattr(os, "sched_getaffinity") else set()
    torch.set_num_threads(threads)
    if before:
        os.sched_setaffinity(0, sorted(before)[-threads:])
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        if before:
            os.sched_setaffinity(0, before)
