"""Record a run once, choose the average afterwards."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polyak_rl.buffers import Buffers
from polyak_rl.files import verify_archive, write_whole
from polyak_rl.guard import Guard, damage_is_a_value_error
from polyak_rl.iterates import Iterates, Keeper
from polyak_rl.rules import Ema, Rule, require_int
from polyak_rl.vector import check_clock, check_vectors

_SEGMENTS = 256  # enough to put any tail's start within 0.2 % of the run
_TWENTIETHS = 20  # expected runs are cut so that every tail of a multiple of 5 % has a border


class Segment(NamedTuple):
    """A stretch of the run and what it weighs in an average."""

    first: int
    last: int
    weight: float


class _Course(NamedTuple):
    """What is kept; replaced as one, so that an interrupt finds the old or the new.

    The means of closed segments lie in a ring of rows from ``start`` on, without a gap but while
    they are joined.
    """

    ends: list[int]  # the last iterate of each closed segment
    length: int  # of those to come, where nothing is expected
    taken: int  # iterates that are in
    total: Tensor  # their sum in the open segment, which is anything where it has none of them
    spare: Tensor  # where the next sum is made
    start: int = 0
    joined: int = 0  # how many are joined already, where the others are not yet

    @property
    def last(self) -> int:
        """The last iterate that is in a closed segment."""
        return self.ends[-1] if self.ends else 0

    def runs(self, size: int) -> list[range]:
        """The rows of the means in their order, as far as they follow one another."""
        places = [
            (self.start - 1 + i if i < self.joined else self.start + self.joined + i) % size
            for i in range(len(self.ends))
        ]
        breaks = [i for i in range(1, len(places)) if places[i] != places[i - 1] + 1]
        cuts = zip([0, *breaks], [*breaks, len(places)], strict=True)
        return [range(places[a], places[b - 1] + 1) for a, b in cuts if a < b]


class Timeline(Keeper[Rule]):
    """The whole course of a network's weights in at most ``capacity`` segments.

    Each segment holds the float64 mean of the weights recorded in it and their number. When all are
    in use, neighbours merge and the segments become twice as long, so the run may have any length.
    Afterwards any rule can be asked for without training again: inside a segment the weight of an
    iterate is constant, and a segment on a border contributes its share. Averages whose borders
    fall on segment borders are exact; of others :meth:`weight_error` says how far off they are.
    Of a sharded network (DTensor, FSDP2) each process records, saves and loads its own shards.

    Args:
        module: the network that acts. It is only read; recording draws no random numbers.
        capacity: the most segments, an even number of at least 2; None: 256, or as many as the
            iterates expected, or as many as ``max_bytes`` holds.
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

    _kind = "timeline"
    _format = "polyak_rl.timeline/2"
    _course: _Course
    _means: Tensor  # [capacity + 1, size]

    def __init__(
        self,
        module: nn.Module,
        *,
        capacity: int | None = 256,
        expected: int | None = None,
        every: int = 1,
        buffers: Buffers = "copy",
        max_weight_error: float = 0.05,
        max_bytes: int = 1 << 30,
        guard: Guard = None,
    ) -> None:
        if capacity is not None:
            require_int(capacity, 2, "capacity")
        require_int(every, 1, "every")
        if capacity is not None and capacity % 2:
            raise ValueError(f"capacity must be even, so that neighbours can merge, got {capacity}")
        if expected is not None and expected < every:
            raise ValueError(f"expected must be at least every = {every} steps, got {expected}")
        self._iterates = Iterates(module, every, buffers, guard)
        self._vector = self._iterates.vector
        if capacity is None:
            iterates = _SEGMENTS if expected is None else expected // every
            needed = -(-iterates // _TWENTIETHS) * _TWENTIETHS
            held = max_bytes // (16 * max(1, self._vector.size)) * 2  # float64, an even number
            capacity = max(2, min(_SEGMENTS, needed, held))
        self.capacity, self.expected = capacity, expected
        self.max_weight_error = max_weight_error
        self.nbytes = 8 * capacity * self._vector.size
        if self.nbytes > max_bytes:
            raise ValueError(
                f"{capacity} segments of {self._vector.size} weights take {self.nbytes:,} bytes, "
                f"over max_bytes = {max_bytes:,}: lower capacity or raise max_bytes"
            )
        if expected is not None:
            updates = expected // every
            cuts = capacity - capacity % _TWENTIETHS or capacity
            planned = [-(-i * updates // cuts) for i in range(1, cuts + 1)]
            self._planned = sorted({*planned})
            length = -(-updates // cuts)
        else:
            self._planned, length = [], 1
        self._allocate(length)

    @torch.no_grad()
    def record(self) -> None:
        """Count one gradient step, and at every N-th add the network's weights to the open segment.

        An exception, KeyboardInterrupt included, leaves everything as it was.

        Raises:
            RuntimeError: inside ``applied()``, where the network holds an average; or while a CUDA
                graph is captured.
            ValueError: the network has other names or shapes than before.
        """
        self._iterates.record("Timeline.record()", self)

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
        weights, course = [segment.weight for segment in self.weights(which)], self._course
        average, at = torch.zeros_like(self._means[0]), 0
        for rows in course.runs(len(self._means)):
            part = self._means.new_tensor(weights[at : at + len(rows)])
            means = self._means[rows.start : rows.stop]
            average = part @ means if not at else average + part @ means
            at += len(rows)
        if at < len(weights):
            total = self._sum_to(self.updates, torch.empty_like(average))
            average += total * (weights[at] / (self.updates - course.last))
        return average

    def finest_half_life(self) -> float:
        """The shortest EMA half-life within ``max_weight_error``, in gradient steps (inf: none)."""
        half_life = float(self.every)
        while self.weight_error(Ema(half_life=half_life)) > self.max_weight_error:
            half_life *= 1.02
            if half_life > 4 * self.clock:
                return math.inf  # the first iterate stands for all before it: nothing fits
        return half_life

    def state_dict(self, *, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """Everything recorded, as tensors and plain values; the segments in ``dtype``."""
        state = super().state_dict()
        return state | {"means": state["means"].to(dtype)}

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
        state = read_state(path, cls._format, "a timeline")
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
        self._settled()
        total = self._sum_to(self.updates, torch.empty_like(self._course.total))
        one._iterates.clock = self.clock
        one._course = one._course._replace(
            ends=self._course.ends, length=self._course.length, taken=self.updates
        )
        pairs = [(total, one._course.total)]
        pairs += [(self._means[row], one._means[i]) for i, row in enumerate(self._rows())]
        for ours, theirs in pairs:
            for mine, view in zip(self._vector.views(ours), one._vector.views(theirs), strict=True):
                view.copy_(mine[index : index + 1])
        return one

    def _settled(self) -> int:
        """Bring the segments to where the clock has them: neighbours joined where one came on top
        of all, and closed at each border. Each look begins here, whatever was interrupted.
        """
        device, k = self._iterates.rows.device, self.updates
        if self._means.device != device:
            total, spare = (x.to(device) for x in (self._course.total, self._course.spare))
            self._course = self._course._replace(total=total, spare=spare)
            self._means = self._means.to(device)  # last, so that an interrupted move is made again
        while True:
            course = self._course
            if course.joined or (len(course.ends) == self.capacity and k > course.last):
                self._merge()  # before anything is closed, since it moves the border
            elif k >= (border := self._border()):
                self._close(border)
            else:
                return course.taken

    def _move(self, part: slice, rows: Tensor) -> None:
        self._add(part, rows, self._course.spare)

    def _take(self, updates: int) -> None:
        course = self._course
        self._course = course._replace(total=course.spare, spare=course.total, taken=updates)

    def _since(self) -> int:
        return self._course.taken

    def _state(self) -> dict[str, Any]:
        self._iterates.take_in([self])
        self._settled()
        course = self._course
        begun = course.taken > course.last
        return {
            "capacity": self.capacity,
            "expected": self.expected,
            "every": self.every,
            "length": course.length,
            "ends": [*course.ends],
            "start": course.start,  # so that what is loaded sums in the same order, to the bit
            "taken": course.taken,
            "means": self._means[self._rows()],
            "sum": course.total.clone() if begun else torch.zeros_like(course.total),
        }

    def _restore(self, state: Mapping[str, Any], layout: Any, updates: int) -> int:
        for what in ("capacity", "expected", "every"):
            if state[what] != getattr(self, what):
                raise ValueError(
                    f"the saved timeline has {what} = {state[what]}, this one {getattr(self, what)}"
                )
        length, start = check_clock(state, "length", 1), check_clock(state, "start")
        ends, first = list(state["ends"]), 1
        for i in range(len(ends)):
            first = check_clock({"end of a segment": ends[i]}, "end of a segment", first) + 1
        taken = check_clock(state, "taken", first - 1)
        means, total = (
            self._vector.from_layout(layout, check_vectors(state, key, shape))
            for key, shape in (("means", [len(ends)]), ("sum", []))
        )
        self._allocate(length)
        self._course = self._course._replace(ends=ends, taken=taken, start=start)
        if max(len(ends), start) > self.capacity or taken >= self._border():
            raise ValueError(
                "the saved timeline is damaged: its segments do not fit its clock or capacity"
            )
        for row, mean in zip(self._rows(), means, strict=True):
            self._means[row] = mean
        self._course.total.copy_(total)
        return taken

    def _rows(self) -> list[int]:
        """Where the mean of each closed segment lies."""
        return [row for run in self._course.runs(len(self._means)) for row in run]

    def _border(self) -> int:
        """The last iterate of the open segment: a planned one, or a length on."""
        last = self._course.last
        at = bisect_right(self._planned, last)
        return self._planned[at] if at < len(self._planned) else last + self._course.length

    def _sum_to(self, last: int, out: Tensor) -> Tensor:
        """The sum of the open segment up to an iterate."""
        for part, rows in self._iterates.exact(self._course.taken, last):
            self._add(part, rows, out)
        return out

    def _add(self, part: slice, rows: Tensor, out: Tensor) -> None:
        """Some columns of the open segment's sum, with the iterates that come next."""
        total = torch.sum(rows, 0, out=out[part])
        if self._course.taken > self._course.last:
            total.add_(self._course.total[part])

    def _close(self, border: int) -> None:
        """End the open segment, which changes no average."""
        course = self._course
        row = self._means[(course.start + len(course.ends)) % len(self._means)]
        self._sum_to(border, row).div_(border - course.last)
        self._course = course._replace(ends=[*course.ends, border], taken=border)

    def _merge(self) -> None:
        """Join neighbours two by two; segments to come are twice as long.

        The first mean goes to the row that is free, before the others, and each one after it to the
        row behind: one that has been joined. After each pair the segments are whole.
        """
        size, half = len(self._means), self.capacity // 2
        for i in range(self._course.joined, half):
            ends, length, _, _, _, start, _ = course = self._course
            left = ends[i] - (ends[i - 1] if i else 0)
            right = ends[i + 1] - ends[i]
            one, other = (self._means[(start + 2 * i + j) % size] for j in (0, 1))
            mean = torch.mul(one, left, out=self._means[(start - 1 + i) % size])
            mean.add_(other, alpha=right).div_(left + right)
            joined = course._replace(ends=ends[:i] + ends[i + 1 :], joined=i + 1)
            if i + 1 == half:
                joined = joined._replace(length=2 * length, start=(start - 1) % size, joined=0)
            self._course = joined

    @torch.inference_mode(False)
    def _allocate(self, length: int) -> None:
        kind: Any = {"dtype": torch.float64, "device": self._iterates.rows.device}
        # One row more than segments, so that two can be joined into a third.
        self._means = torch.zeros(self.capacity + 1, self._vector.size, **kind)
        total, spare = (torch.zeros(self._vector.size, **kind) for _ in range(2))
        self._course = _Course([], length, 0, total, spare)

    def _stretches(self) -> list[tuple[int, int]]:
        """The first and last iterate of each segment, the open one included."""
        self._settled()
        ends = [*self._course.ends]
        if self.updates > self._course.last:
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
