"""Record a run once, choose the average afterwards."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polyak_rl.buffers import Buffers
from polyak_rl.files import verify_archive, write_whole
from polyak_rl.guard import (
    Call,
    Guard,
    all_finite,
    at_once,
    check_guard,
    damage_is_a_value_error,
    refuse_capture,
)
from polyak_rl.rules import Ema, Rule, require_int
from polyak_rl.vector import (
    Averages,
    WeightVector,
    check_clock,
    check_vectors,
    twin,
)

_FORMAT = "polyak_rl.timeline/1"
_TENTHS = 20  # expected runs are cut so that every tail of a multiple of 5 % has a border


class Segment(NamedTuple):
    """A stretch of the run and what it weighs in an average."""

    first: int
    last: int
    weight: float


class _Closed(NamedTuple):
    """The closed segments; replaced as one, so that an interrupt finds the old or the new.

    Their means lie in a ring of rows from ``start`` on, without a gap but while they are joined.
    """

    ends: list[int]  # the last iterate of each
    last: int  # that of the newest
    length: int  # of those to come, where nothing is expected
    border: int  # the last iterate of the open one
    start: int
    joined: int  # how many are joined already, where the others are not yet

    def runs(self, size: int) -> list[range]:
        """The rows of the means in their order, as far as they follow one another."""
        places = [
            (self.start - 1 + i if i < self.joined else self.start + self.joined + i) % size
            for i in range(len(self.ends))
        ]
        breaks = [i for i in range(1, len(places)) if places[i] != places[i - 1] + 1]
        cuts = zip([0, *breaks], [*breaks, len(places)], strict=True)
        return [range(places[a], places[b - 1] + 1) for a, b in cuts if a < b]


class Timeline(Averages[Rule]):
    """The whole course of a network's weights in at most ``capacity`` segments.

    Each segment holds the float64 mean of the weights recorded in it and their number. When all are
    in use, neighbours merge and the segments become twice as long, so the run may have any length.
    Afterwards any rule can be asked for without training again: inside a segment the weight of an
    iterate is constant, and a segment on a border contributes its share. Averages whose borders
    fall on segment borders are exact; of others :meth:`weight_error` says how far off they are.
    Of a sharded network (DTensor, FSDP2) each process records, saves and loads its own shards.

    Args:
        module: the network that acts. It is only read; recording draws no random numbers.
        capacity: the most segments, an even number of at least 2.
        expected: the gradient steps of the run, if known: they are cut into equal segments, so that
            at the end every tail of a multiple of 5 % is exact (with a capacity of at least 20).
        every: :meth:`record` takes an iterate at its N-th, 2N-th, 3N-th call.
        buffers: as in :class:`polyak_rl.AverageBank`.
        max_weight_error: :meth:`vector` and what is built on it refuse rules above this.
        max_bytes: the memory that the segments may take, ``8 * capacity * weights`` bytes; 256
            segments of 70 000 weights take 143 MB.
        guard: as in :class:`polyak_rl.AverageBank`.

    Attributes:
        clock: how often :meth:`record` was called.
        skipped: the calls that the guard left out.

    Raises:
        ValueError: an argument out of range, or more memory than ``max_bytes``.

    Example:
        >>> import torch
        >>> from polyak_rl import Tail, Timeline
        >>> policy = torch.nn.Linear(1, 1, bias=False)
        >>> timeline = Timeline(policy, expected=4)
        >>> for value in (1.0, 2.0, 6.0, 8.0):
        ...     _ = torch.nn.init.constant_(policy.weight, value)   # a gradient step
        ...     timeline.record()
        >>> timeline.average(Tail(0.5))["weight"].item()
        7.0
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        capacity: int = 256,
        expected: int | None = None,
        every: int = 1,
        buffers: Buffers = "copy",
        max_weight_error: float = 0.05,
        max_bytes: int = 1 << 30,
        guard: Guard = None,
    ) -> None:
        require_int(capacity, 2, "capacity")
        require_int(every, 1, "every")
        if capacity % 2:
            raise ValueError(f"capacity must be even, so that neighbours can merge, got {capacity}")
        if expected is not None and expected < every:
            raise ValueError(f"expected must be at least every = {every} steps, got {expected}")
        self._vector = WeightVector(module, buffers)
        self.capacity, self.every, self.expected = capacity, every, expected
        self.max_weight_error = max_weight_error
        self.clock = self.skipped = 0
        self._guarded = check_guard(guard, module.parameters())
        self.nbytes = 8 * capacity * self._vector.size
        if self.nbytes > max_bytes:
            raise ValueError(
                f"{capacity} segments of {self._vector.size} weights take {self.nbytes:,} bytes, "
                f"over max_bytes = {max_bytes:,}: lower capacity or raise max_bytes"
            )
        if expected is not None:
            updates = expected // every
            cuts = capacity - capacity % _TENTHS or capacity
            planned = [-(-i * updates // cuts) for i in range(1, cuts + 1)]
            self._planned = sorted({*planned})
            length = -(-updates // cuts)
        else:
            self._planned, length = [], 1
        self._closed = self._close_at([], length)
        self._allocate()

    @torch.no_grad()
    def record(self) -> None:
        """Count one gradient step, and at every N-th add the network's weights to the open segment.

        An exception, KeyboardInterrupt included, leaves everything as it was.

        Raises:
            RuntimeError: inside ``applied()``, where the network holds an average; or while a CUDA
                graph is captured.
            ValueError: the network has other names or shapes than before.
        """
        last = self._prepare(self.clock + 1)
        if last is None:
            self.skipped += 1
        else:
            at_once([*last, partial(setattr, self, "clock", self.clock + 1)])

    def _prepare(self, clock: int) -> list[Call] | None:
        """Make ready for a clock what is seen only once the clock has come there.

        Returns:
            The calls that are left to make at once with the clock's; None where the guard leaves
            the iterate out.
        """
        refuse_capture("Timeline.record()", "Call it between replays")
        vector = self._vector
        vector.require_online("Timeline.record()")
        k, rest = divmod(clock, self.every)
        if rest:
            return []
        vector.follow()
        if self._device is not vector.device:
            self._move()
        closed = self._settle()
        begins = k - 1 == closed.last  # a segment: what the sum holds is of the one before
        now = self._sum if begins else self._now
        vector.read(now, self._views[0 if begins else 1])
        if self._guarded and not all_finite([now]):
            return None
        return [] if begins else [partial(self._sum.add_, now)]

    @property
    def updates(self) -> int:
        """The number of iterates recorded."""
        return self.clock // self.every

    def weights(self, rule: Rule) -> list[Segment]:
        """What each segment weighs in the average by ``rule``, oldest first; the sum is 1."""
        k, segments, before = self.updates, [], 0.0
        for first, last in self._stretches():
            share = rule.share(last, k, self.every)
            segments.append(Segment(first, last, share - before))
            before = share
        return segments

    def weight_error(self, rule: Rule) -> float:
        """Half the L1 distance between the weights asked for and those given, from 0 to 1."""
        self._require_records()
        error = sum(self._excess(rule, segment) for segment in self.weights(rule))
        return error if error > 1e-12 else 0.0  # rounding of the shares

    @torch.inference_mode(False)
    @torch.no_grad()
    def vector(self, which: Rule) -> Tensor:
        """One average as a float64 vector in the layout of the network.

        Raises:
            ValueError: nothing was recorded, or the timeline is too coarse for the rule.
        """
        error = self.weight_error(which)
        if error > self.max_weight_error:
            raise ValueError(
                f"the timeline is too coarse for {which}: the weights would be off by {error:.3f}, "
                f"over max_weight_error = {self.max_weight_error}. Its finest half-life is about "
                f"{self.finest_half_life():.0f} gradient steps, its shortest tail "
                f"{self._shortest() * self.every} of {self.updates * self.every}"
            )
        weights, closed = [segment.weight for segment in self.weights(which)], self._settle()
        average, at = torch.zeros_like(self._means[0]), 0
        for rows in closed.runs(len(self._means)):
            part = self._means.new_tensor(weights[at : at + len(rows)])
            means = self._means[rows.start : rows.stop]
            average = part @ means if not at else average + part @ means
            at += len(rows)
        if at < len(weights):
            average += self._sum * (weights[at] / (self.updates - closed.last))
        return average

    def finest_half_life(self) -> float:
        """The shortest EMA half-life within ``max_weight_error``, in gradient steps (inf: none)."""
        half_life = float(self.every)
        while self.weight_error(Ema(half_life=half_life)) > self.max_weight_error:
            half_life *= 1.02
            if half_life > 4 * self.clock:
                return math.inf  # the first iterate stands for all before it: nothing fits
        return half_life

    @torch.inference_mode(False)
    @torch.no_grad()
    def state_dict(self, *, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """Everything recorded, as tensors and plain values; the segments in ``dtype``."""
        closed, total = self._settle(), self._sum
        return {
            "format": _FORMAT,
            "layout": self._vector.describe(),
            "capacity": self.capacity,
            "expected": self.expected,
            "every": self.every,
            "clock": self.clock,
            "skipped": self.skipped,
            "length": closed.length,
            "ends": [*closed.ends],
            "start": closed.start,  # so that what is loaded sums in the same order, to the bit
            "means": self._means[self._rows()].to(dtype, copy=True),
            "sum": total.clone() if self.updates > closed.last else torch.zeros_like(total),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: it is no such state, or one of another format, capacity, cadence, names or
                shapes; nothing has changed.
        """
        vars(self).update(self._loaded(state))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _loaded(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The attributes of this timeline with a state that was found to be right."""
        with damage_is_a_value_error("timeline"):
            if not isinstance(state, Mapping) or state.get("format") != _FORMAT:
                raise ValueError(f"this is not a timeline of format {_FORMAT!r}")
            for what in ("capacity", "expected", "every"):
                if state[what] != getattr(self, what):
                    raise ValueError(
                        f"the saved timeline has {what} = {state[what]}, this one "
                        f"{getattr(self, what)}"
                    )
            clock, length = check_clock(state, "clock"), check_clock(state, "length", 1)
            skipped, start = (check_clock({key: 0, **state}, key) for key in ("skipped", "start"))
            ends, first = list(state["ends"]), 1
            for i in range(len(ends)):
                first = check_clock({"end of a segment": ends[i]}, "end of a segment", first) + 1
            if max(len(ends), start) > self.capacity or first - 1 > clock // self.every:
                raise ValueError(
                    "the saved timeline is damaged: its segments do not fit its clock or capacity"
                )
            means, total = (
                self._vector.from_layout(state["layout"], check_vectors(state, key, shape))
                for key, shape in (("means", [len(ends)]), ("sum", []))
            )

        new = twin(self)
        new._allocate()
        new._closed = self._close_at(ends, length, start)
        for row, mean in zip(new._rows(), means, strict=True):
            new._means[row] = mean
        new._sum.copy_(total)
        new.clock, new.skipped = clock, skipped
        return vars(new)

    def __getstate__(self) -> dict[str, Any]:
        # Views of the sums, which a pickle would part from them, are made anew.
        views = ("_sum", "_now", "_views")
        return {key: x for key, x in vars(self).items() if key not in views}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._look()

    def save(self, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float64) -> None:
        """Write the timeline to a file of tensors and plain values.

        The file is written beside its place, flushed and renamed: it is there whole or not at all.

        Args:
            path: the file.
            dtype: of the segments on disk; float32 halves the file.
        """
        with write_whole(path) as file:
            torch.save(self.state_dict(dtype=dtype), file)

    @classmethod
    def load(cls, path: str | os.PathLike[str], like: nn.Module, **options: Any) -> Timeline:
        """Read a timeline that :meth:`save` wrote, for a network of the same names and shapes.

        Args:
            path: the file. It is read as data; a pickle that would run code is refused.
            like: a network of the recorded architecture.
            options: ``buffers``, ``max_weight_error``, ``max_bytes`` and ``guard`` as in the
                constructor.

        Raises:
            ValueError: the file is no timeline, is damaged, or is of another network.
        """
        state = read_state(path, _FORMAT, "a timeline")
        with damage_is_a_value_error("timeline"):
            shape = {name: state[name] for name in ("capacity", "expected", "every")}
            timeline = cls(like, **shape, **options)
        timeline.load_state_dict(state)
        return timeline

    @torch.no_grad()
    def member(self, index: int, like: nn.Module) -> Timeline:
        """The timeline of one member of a network whose tensors begin with a member dimension.

        Args:
            index: which member, from 0.
            like: a network of that one member: the same names, leading dimensions of 1.
        """
        one = Timeline(
            like,
            capacity=self.capacity,
            expected=self.expected,
            every=self.every,
            max_weight_error=self.max_weight_error,
            max_bytes=self.nbytes,
        )
        closed = self._settle()
        one._closed = one._close_at([*closed.ends], closed.length)
        one.clock = self.clock
        pairs = [(self._sum, one._sum)]
        pairs += [(self._means[row], one._means[i]) for i, row in enumerate(self._rows())]
        for ours, theirs in pairs:
            for mine, view in zip(self._vector.views(ours), one._vector.views(theirs), strict=True):
                view.copy_(mine[index : index + 1])
        return one

    def _rows(self) -> list[int]:
        """Where the mean of each closed segment lies."""
        return [row for run in self._closed.runs(len(self._means)) for row in run]

    def _close_at(self, ends: list[int], length: int, start: int = 0, joined: int = 0) -> _Closed:
        """Closed segments, and the border of the next one: a planned one, or the length on."""
        last = ends[-1] if ends else 0
        at = bisect_right(self._planned, last)
        border = self._planned[at] if at < len(self._planned) else last + length
        return _Closed(ends, last, length, border, start, joined)

    def _close(self, last: int) -> _Closed:
        """End the open segment, which changes no average."""
        ends, before, length, _, start, _ = self._closed
        row = self._means[(start + len(ends)) % len(self._means)]
        torch.div(self._sum, last - before, out=row)
        self._closed = self._close_at([*ends, last], length, start)
        return self._closed

    def _settle(self) -> _Closed:
        """The segments as the clock has them: neighbours joined where one came on top of all,
        and the open one closed at its border. Each look begins here, whatever was interrupted.
        """
        closed = self._closed
        if closed.joined or (len(closed.ends) == self.capacity and self.updates > closed.last):
            self._merge()  # before anything is closed, since it moves the border
            closed = self._closed
        return self._close(self.updates) if self.updates >= closed.border else closed

    def _merge(self) -> None:
        """Join neighbours two by two; segments to come are twice as long.

        The first mean goes to the row that is free, before the others, and each one after it to the
        row behind: one that has been joined. After each pair the segments are whole.
        """
        size, closed = len(self._means), self._closed
        for i in range(closed.joined, self.capacity // 2):
            ends, _, length, _, start, _ = self._closed
            left = ends[i] - (ends[i - 1] if i else 0)
            right = ends[i + 1] - ends[i]
            one, other = (self._means[(start + 2 * i + j) % size] for j in (0, 1))
            mean = torch.mul(one, left, out=self._means[(start - 1 + i) % size])
            mean.add_(other, alpha=right).div_(left + right)
            ends = ends[:i] + ends[i + 1 :]
            if i + 1 < self.capacity // 2:
                self._closed = self._close_at(ends, length, start, i + 1)
            else:
                self._closed = self._close_at(ends, 2 * length, (start - 1) % size)

    @torch.inference_mode(False)
    def _allocate(self) -> None:
        kind: Any = {"dtype": torch.float64, "device": self._vector.device}
        # One row more than segments, so that two can be joined into a third.
        self._means = torch.zeros(self.capacity + 1, self._vector.size, **kind)
        # The sum of the open segment, which is anything where there is none, and the iterate.
        self._totals = torch.zeros(2, self._vector.size, **kind)
        self._device = self._vector.device
        self._look()

    def _look(self) -> None:
        self._sum, self._now = self._totals
        self._views = [self._vector.views(row) for row in self._totals]

    def _stretches(self) -> list[tuple[int, int]]:
        """The first and last iterate of each segment, the open one included."""
        closed = self._settle()
        ends = [*closed.ends]
        if self.updates > closed.last:
            ends.append(self.updates)
        return [(first + 1, last) for first, last in zip([0, *ends[:-1]], ends, strict=True)]

    def _excess(self, rule: Rule, segment: Segment) -> float:
        """What the iterates above the segment's mean weight have above it."""
        k, every = self.updates, self.every
        mean = segment.weight / (segment.last - segment.first + 1)
        cuts = {c for i in rule.falls(k, every) for c in (i - 1, i)}
        inside = sorted(c for c in cuts if segment.first <= c < segment.last)
        total = 0.0
        for low, high in zip([segment.first - 1, *inside], [*inside, segment.last], strict=True):
            # Weights never fall in (low, high]: those above the mean are its end.
            above = _first_above(rule, mean, low, high, k, every)
            share = rule.share(high, k, every) - rule.share(above, k, every)
            total += share - mean * (high - above)
        return total

    def _shortest(self) -> int:
        """The iterates of the last closed segment and what came after it."""
        stretches = self._stretches()
        return stretches[-1][1] - stretches[-1][0] + 1

    def _require_records(self) -> None:
        if not self.updates:
            raise ValueError("the timeline is empty: call record() after each gradient step")

    @torch.inference_mode(False)
    def _move(self) -> None:
        """Go to where the network went."""
        device = self._vector.device
        self._means, self._totals = self._means.to(device), self._totals.to(device)
        self._look()
        self._device = device  # last, so that what an interrupt left undone is done again


def read_state(path: str | os.PathLike[str], format: str, what: str) -> dict[str, Any]:
    """The state of a format that a file holds, read as data: a pickle with code in it is refused.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else, or is damaged.
    """
    verify_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # bytes that are no such file raise anything
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ValueError(f"{os.fspath(path)} is not {what}: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != format:
        raise ValueError(f"{os.fspath(path)} is not {what} of format {format!r}")
    return state


def _first_above(rule: Rule, mean: float, low: int, high: int, k: int, every: int) -> int:
    """The last iterate of ``low + 1 .. high`` that weighs no more than the mean, or ``low``."""
    while low < high:
        middle = (low + high + 1) // 2
        if rule.weight(middle, k, every) > mean:
            high = middle - 1
        else:
            low = middle
    return low
