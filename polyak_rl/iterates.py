"""The newest iterates of a network, side by side until averages take them in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from polyak_rl.buffers import Buffers
from polyak_rl.guard import (
    Guard,
    all_finite,
    check_guard,
    damage_is_a_value_error,
    refuse_capture,
)
from polyak_rl.rules import require_int
from polyak_rl.vector import Averages, WeightVector, Which, check_clock, check_vectors, twin

_BLOCK = 32  # iterates that are taken in at once
_BLOCK_BYTES = 1 << 26  # and the memory that they may wait in
_LAUNCHES = 8  # rows at least where each kernel is launched, whatever it takes
_COLUMNS = 1 << 12  # weights at a time, so that their float64 copies stay in the cache
_COLUMNS_OF_DEVICE = 1 << 22  # and so that they do not fill a device


class Iterates:
    """A clock of gradient steps, and a block with the newest iterates of a network.

    To record is to copy the network into a row that nobody counts yet, and then to move the clock:
    all or nothing. Iterate k lies in row ``(k - 1) % N``; before the first row is written anew, all
    keepers take in what waits for them. So a block is taken in at clocks that nothing else decides,
    and neither reading nor saving moves a bit.

    Attributes:
        vector: the layout of the network in a row.
        clock: gradient steps counted.
        skipped: those that the guard left out.
        rows: the block, ``[N, size]``.
        keepers: how many take from it; they record together.
    """

    rows: Tensor
    _told: int

    def __init__(self, module: nn.Module, every: int, buffers: Buffers, guard: Guard) -> None:
        require_int(every, 1, "every")
        self.vector, self.every = WeightVector(module, buffers), every
        self.clock = self.skipped = 0
        self.keepers = 1
        self._guarded = check_guard(guard, module.parameters())
        self._allocate()

    @property
    def updates(self) -> int:
        """The iterates recorded."""
        return self.clock // self.every

    def record(self, what: str, *keepers: Keeper[Any]) -> None:
        """Count one gradient step, and at every N-th take the network's weights in.

        Args:
            what: the name of this call, for errors.
            keepers: all that take from this block.

        Raises:
            RuntimeError: the network holds an average, or a CUDA graph is captured.
            ValueError: the network has other names or shapes than before.
        """
        self._require_own_weights(what, keepers)
        self._expected = False
        k, rest = divmod(self.clock + 1, self.every)
        if not rest:
            self._follow()
            at = (k - 1) % len(self.rows)
            if at == 0:
                self.take_in(keepers)  # before the block is written anew
            row, views = self._cells[at]
            self.vector.read(row, views)
            if self._guarded and not all_finite([row]):
                self.skipped += 1
                return
        self.clock += 1  # from here on the iterate is in

    def expect(self, what: str, *keepers: Keeper[Any]) -> None:
        """Make ready for a gradient step that has :meth:`write` in it; arguments as above."""
        self._require_own_weights(what, keepers)
        self._follow()
        self.take_in(keepers)  # what record() may have filled in between
        at = self.clock % (self.every * len(self.rows))
        if self._told != at:
            self._at.fill_(at)
        self._told = -1  # anything, until the step has been counted
        self._expected = True

    def write(self) -> None:
        """Copy the network to where the iterate of this step belongs, which the device counts.

        Raises:
            RuntimeError: the averages are guarded, or the network is not flat.
        """
        flat = self.vector.flat
        if flat is None or self._guarded:
            raise RuntimeError(
                "write() is for averages without a guard of a network in flat memory (flatten_): "
                "call record() between the steps instead"
            )
        # Of several steps the last one counts: each writes to the row of the iterate to come.
        at = self._at if self.every == 1 else self._at.div(self.every, rounding_mode="floor")
        self.rows.index_copy_(0, at, flat.unsqueeze(0).to(self.rows.dtype))
        self._at.add_(1)

    def count(self) -> None:
        """Count a gradient step that has written.

        Raises:
            RuntimeError: :meth:`expect` was not called before it, or something was loaded since; or
                the network holds an average.
        """
        if not self._expected:
            raise RuntimeError(
                "count() is for a step with write() in it that began with expect(): none has begun"
            )
        self.vector.require_online("count()")
        self._expected = False
        at = self.clock % (self.every * len(self.rows))
        self.clock += 1
        self._told = at + 1  # which is never expected after the last row

    def since(self, first: int, last: int | None = None) -> Tensor:
        """The rows of the iterates ``first + 1 .. last``, to the newest where none is named."""
        last = self.updates if last is None else last
        start = first % len(self.rows)
        return self.rows[start : start + last - first]

    def exact(
        self, first: int, last: int, dtype: torch.dtype = torch.float64
    ) -> Iterator[tuple[slice, Tensor]]:
        """The same in another precision, some columns at a time."""
        rows = self.since(first, last)
        columns = _COLUMNS if rows.device.type == "cpu" else _COLUMNS_OF_DEVICE
        for start in range(0, rows.shape[1], columns):
            part = slice(start, start + columns)
            yield part, rows[:, part].to(dtype)

    def take_in(self, keepers: Sequence[Keeper[Any]]) -> None:
        """Let averages move by the whole block where it is full, in one pass over it for all."""
        k = self.updates
        if k % len(self.rows):
            return
        taken = [keeper._settled() for keeper in keepers]
        due = [each for each in zip(keepers, taken, strict=True) if each[1] < k]
        if not due:
            return
        first = min(taken)
        for part, rows in self.exact(first, k, keepers[0]._exact):
            for keeper, after in due:
                keeper._move(part, rows[after - first :])
        for keeper, _ in due:
            keeper._take(k)

    def state_dict(self, since: int) -> dict[str, Any]:
        """The clock, and the iterates that came after the first so many."""
        return {
            "clock": self.clock,
            "skipped": self.skipped,
            "layout": self.vector.describe(),
            "iterates": self.since(since).clone(),
        }

    def __getstate__(self) -> dict[str, Any]:
        # Views of the rows, which a pickle would part from them, are made anew.
        return {key: x for key, x in vars(self).items() if key not in ("_cells", "_at")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._use(self.rows)

    @torch.inference_mode(False)
    def _allocate(self) -> None:
        vector = self.vector
        row_bytes = max(1, vector.size * vector.dtype.itemsize)  # some processes have no shards
        least = 2 if vector.device.type == "cpu" else _LAUNCHES
        count = max(least, min(_BLOCK, _BLOCK_BYTES // row_bytes))
        self._use(torch.zeros(count, vector.size, dtype=vector.dtype, device=vector.device))

    def _use(self, rows: Tensor) -> None:
        self._cells = [(row, self.vector.views(row)) for row in rows]
        # Steps since the block's beginning, as the device counts them and as far as that is known.
        self._at = torch.zeros(1, dtype=torch.int64, device=rows.device)
        self._told = -1
        self._expected = False
        self.rows = rows  # last, so that an interrupted move is made again

    def _require_own_weights(self, what: str, keepers: Sequence[Keeper[Any]]) -> None:
        refuse_capture(what, "Call it between replays; PolicyAverages.write() can be captured")
        self.vector.require_online(what)
        if len(keepers) < self.keepers:
            raise RuntimeError(f"{what} of a part of a PolicyAverages: call its record() instead")

    @torch.inference_mode(False)
    def _follow(self) -> None:
        """Go to where the network went."""
        self.vector.follow()
        if self.rows.device != self.vector.device:
            self._use(self.rows.to(self.vector.device))


class Keeper(Averages[Which]):
    """Averages that take iterates in from a block, which they may share with others."""

    _kind: ClassVar[str]
    _format: ClassVar[str]
    _exact: torch.dtype = torch.float64  # what averages are computed in
    _iterates: Iterates

    @property
    def clock(self) -> int:
        """How many gradient steps were recorded."""
        return self._iterates.clock

    @property
    def skipped(self) -> int:
        """The gradient steps that the guard left out."""
        return self._iterates.skipped

    @property
    def every(self) -> int:
        """Gradient steps from one iterate that is taken to the next."""
        return self._iterates.every

    @property
    def updates(self) -> int:
        """The iterates recorded."""
        return self._iterates.updates

    def share(self, other: Keeper[Any]) -> None:
        """Take from the block of another keeper, where nothing was recorded yet."""
        self._iterates, self._vector = other._iterates, other._vector
        self._iterates.keepers += 1

    @torch.inference_mode(False)
    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Everything kept and how it was asked for, as tensors and plain values."""
        own = self._state()
        return {"format": self._format, **self._iterates.state_dict(self._since()), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: it is no such state, or one of other settings, names or shapes; nothing has
                changed.
            RuntimeError: this is a part of a ``PolicyAverages``, which is loaded as a whole.
        """
        if self._iterates.keepers > 1:
            raise RuntimeError("load_state_dict() of a part of a PolicyAverages: load the whole")
        with damage_is_a_value_error(self._kind):
            if not isinstance(state, Mapping) or state.get("format") != self._format:
                raise ValueError(f"this is not a {self._kind} of format {self._format!r}")
            load_all([self], state, [state])

    def _settled(self) -> int:
        """Bring all that can be in order; how many iterates are taken in."""
        raise NotImplementedError

    def _move(self, part: slice, rows: Tensor) -> None:
        """Make what comes after the next iterates, in some columns; it does not count yet."""
        raise NotImplementedError

    def _take(self, updates: int) -> None:
        """Let it count: so many iterates are taken in."""
        raise NotImplementedError

    def _since(self) -> int:
        """How many of the first iterates nobody asks for any more."""
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        """What is kept, besides clock and iterates."""
        raise NotImplementedError

    def _restore(self, state: Mapping[str, Any], layout: Any, updates: int) -> int:
        """Take over a state that is checked here; how many iterates it has taken in."""
        raise NotImplementedError


def load_all(
    keepers: Sequence[Keeper[Any]], state: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]
) -> None:
    """Load all keepers of one block, or raise ValueError.

    Args:
        keepers: all of them.
        state: clock and iterates, from :meth:`Iterates.state_dict`.
        parts: what each keeper has kept.
    """
    with torch.inference_mode(False), torch.no_grad():
        new = twin(keepers[0]._iterates)
        new.vector.follow()
        new._allocate()
        clock, skipped = check_clock(state, "clock"), check_clock(state, "skipped")
        k, layout = clock // new.every, state["layout"]
        twins = [twin(keeper) for keeper in keepers]
        taken = []
        for one, part in zip(twins, parts, strict=True):
            one._iterates = new
            taken.append(one._restore(part, layout, k))
        count = min(len(state["iterates"]), k)
        rows = new.vector.from_layout(layout, check_vectors(state, "iterates", [count]))
        if min(taken) < k - count or max(taken) > k:
            raise ValueError("the saved iterates are not those that had not been taken in")
        new.clock, new.skipped = (k - count) * new.every, skipped
        for i, row in enumerate(rows, k - count):
            new.take_in(twins)  # also where this block has fewer rows
            new.rows[i % len(new.rows)].copy_(row)
            new.clock += new.every
        new.clock = clock
    # One call of C: an interrupt is served before or after all of it, never in between.
    [*map(dict.update, map(vars, keepers), map(vars, twins))]
