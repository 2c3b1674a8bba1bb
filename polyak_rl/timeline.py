"""Record a run once, choose the average afterwards."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polyak_rl.buffers import Buffers
from polyak_rl.files import write_whole
from polyak_rl.guard import Guard, all_finite, check_guard
from polyak_rl.rules import Ema, Rule, require_int
from polyak_rl.vector import Averages, WeightVector, require_online

_FORMAT = "polyak_rl.timeline/1"
_TENTHS = 20  # expected runs are cut so that every tail of a multiple of 5 % has a border


class Segment(NamedTuple):
    """A stretch of the run and what it weighs in an average."""

    first: int
    last: int
    weight: float


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
        size, device = self._vector.size, self._vector.device
        self._means = torch.zeros(capacity, size, dtype=torch.float64, device=device)
        self._sum = torch.zeros(size, dtype=torch.float64, device=device)  # of the open segment
        self._now = torch.zeros_like(self._sum)
        self._views = self._vector.views(self._now)
        self._ends: list[int] = []  # the last iterate of each closed segment
        self._length = 1  # of segments to come, where nothing is expected
        if expected is not None:
            updates = expected // every
            cuts = capacity - capacity % _TENTHS or capacity
            self._planned = [-(-i * updates // cuts) for i in range(1, cuts + 1)]
            self._length = -(-updates // cuts)
        else:
            self._planned = []

    @torch.no_grad()
    def record(self) -> None:
        """Count one gradient step, and at every N-th add the network's weights to the open segment.

        Raises:
            RuntimeError: inside ``applied()``, where the network holds an average.
            ValueError: the network has other names or shapes than before.
        """
        require_online(self._vector, "record()")
        self.clock += 1
        if self.clock % self.every:
            return
        if self._vector.follow():
            self._move()
        self._vector.read(self._now, self._views)
        if self._guarded and not all_finite([self._now]):
            self.clock -= 1
            self.skipped += 1
            return
        if len(self._ends) == self.capacity:
            self._merge()
        self._sum.add_(self._now)
        if self.updates >= self._border():
            self._close()

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
        weights = self._means.new_tensor([segment.weight for segment in self.weights(which)])
        closed = len(self._ends)
        average = weights[:closed] @ self._means[:closed]
        if len(weights) > closed:
            average += self._sum * (weights[closed] / (self.updates - self._closed_updates()))
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
        return {
            "format": _FORMAT,
            "layout": self._vector.describe(),
            "capacity": self.capacity,
            "expected": self.expected,
            "every": self.every,
            "clock": self.clock,
            "skipped": self.skipped,
            "length": self._length,
            "ends": list(self._ends),
            "means": self._means[: len(self._ends)].to(dtype, copy=True),
            "sum": self._sum.clone(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: another format, capacity, cadence, names or shapes; nothing has changed.
        """
        if not isinstance(state, Mapping) or state.get("format") != _FORMAT:
            raise ValueError(f"this is not a timeline of format {_FORMAT!r}")
        for what in ("capacity", "expected", "every"):
            if state[what] != getattr(self, what):
                raise ValueError(
                    f"the saved timeline has {what} = {state[what]}, this one {getattr(self, what)}"
                )
        means = self._vector.from_layout(state["layout"], state["means"])
        total = self._vector.from_layout(state["layout"], state["sum"])
        if len(means) != len(state["ends"]) or len(means) > self.capacity:
            raise ValueError("the saved timeline is damaged: its segments do not fit their borders")
        self._means[: len(means)] = means
        self._sum.copy_(total)
        self.clock, self._length, self._ends = state["clock"], state["length"], list(state["ends"])
        self.skipped = state.get("skipped", 0)

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
        one.clock, one._length, one._ends = self.clock, self._length, list(self._ends)
        closed = len(self._ends)
        pairs = [(self._sum, one._sum)]
        pairs += zip(self._means[:closed], one._means[:closed], strict=True)
        for ours, theirs in pairs:
            for mine, view in zip(self._vector.views(ours), one._vector.views(theirs), strict=True):
                view.copy_(mine[index : index + 1])
        return one

    def _closed_updates(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _border(self) -> int:
        """The iterate that closes the open segment."""
        done = self._closed_updates()
        return next((end for end in self._planned if end > done), done + self._length)

    def _close(self) -> None:
        count = self.updates - self._closed_updates()
        torch.div(self._sum, count, out=self._means[len(self._ends)])
        self._sum.zero_()
        self._ends.append(self.updates)

    def _merge(self) -> None:
        """Join neighbours two by two; segments to come are twice as long."""
        counts = [end - start for start, end in zip([0, *self._ends[:-1]], self._ends, strict=True)]
        for i in range(0, self.capacity, 2):
            left, right = counts[i], counts[i + 1]
            joined = self._means[i].mul(left).add_(self._means[i + 1], alpha=right)
            self._means[i // 2].copy_(joined.div_(left + right))
        self._ends = self._ends[1::2]
        self._length *= 2

    def _stretches(self) -> list[tuple[int, int]]:
        """The first and last iterate of each segment, the open one included."""
        ends = [*self._ends]
        if self.updates > self._closed_updates():
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

    def _move(self) -> None:
        """Go to where the network went."""
        device = self._vector.device
        if self._sum.device != device:
            self._means, self._sum = self._means.to(device), self._sum.to(device)
            self._now = self._now.to(device)
            self._views = self._vector.views(self._now)


def read_state(path: str | os.PathLike[str], format: str, what: str) -> dict[str, Any]:
    """The state of a format that a file holds, read as data: a pickle with code in it is refused.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else, or is damaged.
    """
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
