"""Several averages of one network kept side by side, moved together."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polyak_rl.buffers import Buffers
from polyak_rl.guard import (
    Call,
    Guard,
    all_finite,
    check_guard,
    damage_is_a_value_error,
    refuse_capture,
)
from polyak_rl.pairing import unwrap
from polyak_rl.rules import Rule, Stretch, Window, describe_rule, require_int
from polyak_rl.vector import (
    Averages,
    WeightVector,
    check_clock,
    check_vectors,
    twin,
)

_BLOCK = 32  # iterates that are taken in by one matrix product
_BLOCK_BYTES = 1 << 26  # and the memory that they may wait in
_LAUNCHES = 8  # rows at least where each kernel is launched, whatever they take
_COLUMNS = 1 << 13  # weights at a time, so that their float64 copies stay in the cache
_COLUMNS_OF_DEVICE = 1 << 22  # and so that they do not fill a device
_BLOCKS_AHEAD = 64  # blocks whose gains are sent to a device at once
_FORMAT = "polyak_rl.bank/2"
_BETWEEN_REPLAYS = (
    "Call it between replays; soft_update() and a TargetNetwork of every=1 can be captured"
)


class _Kept(NamedTuple):
    """The averages; replaced as one, so that an interrupt finds the old or the new."""

    now: Tensor  # [1, rules, size]; compensated: [2, rules, size], the second what rounding took
    spare: Tensor  # where the next ones are made
    taken: int  # updates that are in


class _Ahead(NamedTuple):
    """Gains of the blocks to come."""

    first: int  # updates before the first of them
    gains: Tensor  # [blocks, rules, iterates + 1]
    forgotten: list[list[int]]  # the averages that a block replaces

    def has(self, taken: int, waiting: int) -> bool:
        blocks, _, width = self.gains.shape
        block, rest = divmod(taken - self.first, waiting)
        return width == waiting + 1 and not rest and 0 <= block < blocks


class AverageBank(Averages[str]):
    """Averages of a network by several rules, for the price of one copy of the weights a step.

    .. math:: \\bar x_r \\leftarrow \\bar x_r + w_r(n, k)\\,(x - \\bar x_r)

    Iterates are collected in a block and taken in together: one float64 matrix product over flat
    memory moves all averages by up to 32 updates. What is read always includes the last update.
    The network is only read, and no random numbers are drawn: training is the same bit for bit.
    Of a sharded network (DTensor, FSDP2) each process averages, saves and loads its own shards.

    Args:
        module: the network that acts (DQN: Q network, DDPG and SAC: actor).
        rules: the averages by name. ``Tail`` and ``Between`` are refused: only a ``Timeline``
            can give them.
        every: :meth:`update` takes an iterate at its N-th, 2N-th, 3N-th call.
        buffers: buffers such as batch-norm statistics are those of the network when an average is
            used (``"copy"``, ``"keep"`` leaves the destination's alone) or averaged too
            (``"average"``), or a policy by name pattern, as in :func:`polyak_rl.soft_update`.
        compensated: accumulate in pairs of float32 (compensated summation) instead of float64; by
            default on devices that have no float64.
        guard: ``"finite"`` leaves out an update at which the network has a NaN or an Inf: nothing
            moves, the clock neither, and ``skipped`` counts it. It reads one number back from the
            device, so it cannot be captured in a CUDA graph.

    Attributes:
        clock: how often :meth:`update` was called.
        skipped: the calls that the guard left out.

    Raises:
        ValueError: no rules, a ``Tail`` or ``Between``, or an argument out of range.
        TypeError: the network is no module, or a rule no rule.

    Example:
        >>> import torch
        >>> from polyak_rl import AverageBank, Uniform
        >>> policy = torch.nn.Linear(1, 1, bias=False)
        >>> bank = AverageBank(policy, {"uniform": Uniform()})
        >>> for value in (1.0, 2.0, 6.0):
        ...     _ = torch.nn.init.constant_(policy.weight, value)   # a gradient step
        ...     bank.update()
        >>> with bank.applied("uniform"):
        ...     print(policy.weight.item())
        3.0
        >>> policy.weight.item()
        6.0
    """

    _rows: Tensor  # [B, size]: iterate k lies in row (k - 1) % B
    _kept: _Kept
    _rings: dict[str, Tensor]  # [snapshots + 1, size]: the next one has a row of its own

    def __init__(
        self,
        module: nn.Module,
        rules: Mapping[str, Rule],
        *,
        every: int = 1,
        buffers: Buffers = "copy",
        compensated: bool | None = None,
        guard: Guard = None,
    ) -> None:
        if not rules:
            raise ValueError("an AverageBank needs at least one rule")
        for name, rule in rules.items():
            if not isinstance(rule, Rule):
                raise TypeError(f"the rule of {name!r} must be a Rule, got {type(rule).__name__}")
            if isinstance(rule, Stretch):
                raise ValueError(
                    f"{name!r} is a {type(rule).__name__}, which needs the whole run: "
                    "record a Timeline instead"
                )
        require_int(every, 1, "every")
        self.rules = dict(rules)
        self.every = every
        self.clock = self.skipped = 0
        self._vector = WeightVector(module, buffers)
        self._guarded = check_guard(guard, module.parameters())
        if compensated is None:
            compensated = self._vector.device.type == "mps"
        self._compensated = compensated
        self._moving = [name for name, rule in rules.items() if not isinstance(rule, Window)]
        self._windows = {n: r for n, r in rules.items() if isinstance(r, Window)}
        self._allocate()

    @torch.no_grad()
    def update(self) -> None:
        """Count one gradient step, and at every N-th take the network's weights in.

        An exception, KeyboardInterrupt included, leaves everything as it was.

        Raises:
            RuntimeError: inside :meth:`applied`, where the network holds an average; or while a
                CUDA graph is captured.
            ValueError: the network has other names or shapes than before.
        """
        if self._prepare(self.clock + 1) is None:
            self.skipped += 1
        else:
            self.clock += 1  # from here on the iterate is in

    def _prepare(self, clock: int) -> list[Call] | None:
        """Put all that belongs to a clock where it is seen only once the clock has come there.

        Returns:
            As of a timeline: no calls are left; None where the guard leaves the iterate out.
        """
        refuse_capture("AverageBank.update()", _BETWEEN_REPLAYS)
        vector = self._vector
        vector.require_online("AverageBank.update()")
        k, rest = divmod(clock, self.every)
        if rest:
            return []
        vector.follow()
        if self._device is not vector.device:
            self._move()
        at = (k - 1) % len(self._rows)
        if at == 0:
            self._take_in()  # before the first row of the block is written anew
        row, views = self._cells[at]
        vector.read(row, views)
        if self._guarded and not all_finite([row]):
            return None
        for name, window in self._windows.items():
            if window.fires(k, self.every):
                ring = self._rings[name]
                ring[(self._fired(window, k) - 1) % len(ring)].copy_(row)
        return []

    @torch.inference_mode(False)
    @torch.no_grad()
    def vector(self, name: str) -> Tensor:
        """One average as a float64 vector (float32 if compensated) in the layout of the network."""
        if name not in self.rules:
            raise ValueError(
                f"there is no average {name!r}; the averages are {', '.join(self.rules)}"
            )
        k = self.clock // self.every
        if not k:
            return self._vector.now()
        if name in self._windows:
            taken = self._snapshots(name)
            return (taken if len(taken) else self._last()[None]).to(self._exact).mean(dim=0)
        self._take_in()
        return self._kept.now[:, self._moving.index(name)].sum(0)

    @torch.inference_mode(False)
    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Rules, clock, averages and the iterates that wait, as tensors and plain values."""
        return {
            "format": _FORMAT,
            "rules": {name: describe_rule(rule) for name, rule in self.rules.items()},
            "every": self.every,
            "compensated": self._compensated,
            "clock": self.clock,
            "skipped": self.skipped,
            "layout": self._vector.describe(),
            "averages": self._kept.now.clone(),
            "waiting": self._waiting().clone(),
            "last": self._last().clone(),
            "rings": {name: self._snapshots(name).clone() for name in self._windows},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: it is no such state, or one of other rules, cadence, precision, names or
                shapes; nothing has changed.
        """
        vars(self).update(self._loaded(state))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _loaded(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The attributes of this bank with a state that was found to be right."""
        with damage_is_a_value_error("bank"):
            if not isinstance(state, Mapping) or state.get("format") != _FORMAT:
                raise ValueError(f"this is not a bank of format {_FORMAT!r}")
            ours = {name: describe_rule(rule) for name, rule in self.rules.items()}
            for what, mine in (
                ("rules", ours),
                ("every", self.every),
                ("compensated", self._compensated),
            ):
                if state[what] != mine:
                    raise ValueError(
                        f"the saved bank differs in {what}: {state[what]} there, {mine} here"
                    )
            clock, skipped = check_clock(state, "clock"), check_clock(state, "skipped")
            k, layout = clock // self.every, state["layout"]
            shapes: dict[str, list[int]] = {
                "averages": [*self._kept.now.shape[:2]],
                "waiting": [min(len(state["waiting"]), k)],
                "last": [],
            }
            loaded = {
                key: self._vector.from_layout(layout, check_vectors(state, key, shape))
                for key, shape in shapes.items()
            }
            if state["rings"].keys() != self._windows.keys():
                raise ValueError(f"the saved rings must be those of {[*self._windows]}")
            rings = {}
            for name, window in self._windows.items():
                shape = [min(self._fired(window, k), window.size)]
                ring = check_vectors(state["rings"], name, shape)
                rings[name] = self._vector.from_layout(layout, ring)

        new = twin(self)
        new._allocate()
        new._kept.now.copy_(loaded["averages"])
        new._kept = new._kept._replace(taken=k - len(loaded["waiting"]))
        new.clock, new.skipped = new._kept.taken * self.every, skipped
        for j, row in enumerate(loaded["waiting"], new._kept.taken + 1):
            at = (j - 1) % len(new._rows)
            if at == 0:
                new._take_in()
            new._rows[at].copy_(row)
            new.clock = j * self.every
        new._rows[(k - 1) % len(new._rows)].copy_(loaded["last"])
        for name, window in self._windows.items():
            fired = self._fired(window, k)
            for i, row in enumerate(rings[name], fired - len(rings[name])):
                new._rings[name][i % len(new._rings[name])].copy_(row)
        new.clock = clock
        return vars(new)

    def __getstate__(self) -> dict[str, Any]:
        # Views of the rows, which a pickle would part from them, are made anew.
        return {key: x for key, x in vars(self).items() if key not in ("_cells", "_ahead")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._look()

    @torch.inference_mode(False)
    def _allocate(self) -> None:
        vector, device = self._vector, self._vector.device
        self._exact = torch.float32 if self._compensated else torch.float64
        row_bytes = max(1, vector.size * vector.dtype.itemsize)  # some processes have no shards
        least = 2 if device.type == "cpu" else _LAUNCHES
        rows = max(least, min(_BLOCK, _BLOCK_BYTES // row_bytes))
        kind: Any = {"dtype": vector.dtype, "device": device}
        self._rows = torch.zeros(rows, vector.size, **kind)
        parts = 2 if self._compensated else 1
        kept = torch.zeros(parts, len(self._moving), vector.size, dtype=self._exact, device=device)
        self._kept = _Kept(kept, torch.zeros_like(kept), 0)
        self._rings = {
            name: torch.zeros(window.size + 1, vector.size, **kind)
            for name, window in self._windows.items()
        }
        self._device = device
        self._look()

    def _look(self) -> None:
        self._cells = [(row, self._vector.views(row)) for row in self._rows]
        self._ahead: _Ahead | None = None

    @torch.inference_mode(False)
    def _move(self) -> None:
        """Go to where the network went."""
        device = self._vector.device
        if self._rows.device != device:
            self._rows = self._rows.to(device)
        if self._kept.now.device != device:
            now, spare, taken = self._kept
            self._kept = _Kept(now.to(device), spare.to(device), taken)
        self._rings = {name: ring.to(device) for name, ring in self._rings.items()}
        self._look()
        self._device = device  # last, so that what an interrupt left undone is done again

    def _take_in(self) -> None:
        """Move every average by the iterates that wait."""
        now, spare, taken = self._kept
        rows = self._waiting()
        if not len(rows):
            return
        table, forgotten = self._gains_of(taken, len(rows))
        weights, keep = table[:, :-1], table[:, -1:]
        if self._compensated:
            self._take_in_compensated(rows, weights)
        else:
            columns = _COLUMNS if rows.device.type == "cpu" else _COLUMNS_OF_DEVICE
            for start in range(0, rows.shape[1], columns):
                part = slice(start, start + columns)
                averages = torch.mul(now[0, :, part], keep, out=spare[0, :, part])
                for i in forgotten:  # 0 * NaN is NaN: what is replaced must not remember
                    averages[i].zero_()
                averages.addmm_(weights, rows[:, part].to(self._exact))
        self._kept = _Kept(spare, now, taken + len(rows))

    def _take_in_compensated(self, rows: Tensor, weights: Tensor) -> None:
        """The same in pairs of float32: ``average + error`` is the value (Knuth's two-sum)."""
        now, spare, taken = self._kept
        for i, weight in enumerate(weights):
            # At first from the first iterate, so that what is added is small.
            average, error = now[:, i] if taken else (rows[0], torch.zeros_like(rows[0]))
            moves = (rows.to(self._exact) - average) - error
            # No matrix product, whose precision is the caller's to lower (autocast, TF32).
            step = error + (weight.unsqueeze(1) * moves).sum(0)
            total = average + step
            part = total - average
            spare[0, i].copy_(total)
            spare[1, i].copy_((average - (total - part)) + (step - part))

    def _gains_of(self, taken: int, waiting: int) -> tuple[Tensor, list[int]]:
        """What iterates weigh that come after others, [rules, waiting + 1], and who forgets.

        Of whole blocks many are prepared at once, for a device to wait for none of them.
        """
        ahead = self._ahead
        if ahead is None or not ahead.has(taken, waiting):
            blocks = _BLOCKS_AHEAD if waiting == len(self._rows) else 1
            gains = [
                [self._gains(self.rules[n], taken + i * waiting, waiting) for n in self._moving]
                for i in range(blocks)
            ]
            table = torch.tensor(gains, dtype=self._exact, device=self._device)
            forgotten = [[i for i, row in enumerate(block) if row[-1] == 0] for block in gains]
            self._ahead = ahead = _Ahead(
                taken, table.view(blocks, len(self._moving), -1), forgotten
            )
        i = (taken - ahead.first) // waiting
        return ahead.gains[i], ahead.forgotten[i]

    def _gains(self, rule: Rule, taken: int, waiting: int) -> list[float]:
        """What each waiting iterate weighs after all are in; last, what is left of the average."""
        weights, left = [0.0] * waiting, 1.0
        for i in reversed(range(waiting)):
            gain = rule.gain(taken + 1 + i, self.every)
            weights[i] = left * gain
            left *= 1.0 - gain
        return [*weights, left]

    def _fired(self, window: Window, k: int) -> int:
        """Snapshots that update k has seen, counting its own."""
        if window.every >= self.every:
            return k * self.every // window.every
        return k

    def _snapshots(self, name: str) -> Tensor:
        """The snapshots of a window, oldest first."""
        ring, window = self._rings[name], self._windows[name]
        fired = self._fired(window, self.clock // self.every)
        held = range(fired - min(fired, window.size), fired)
        return ring[[i % len(ring) for i in held]]

    def _waiting(self) -> Tensor:
        """The iterates that are not in the averages yet, which lie side by side."""
        first = self._kept.taken % len(self._rows)
        return self._rows[first : first + self.clock // self.every - self._kept.taken]

    def _last(self) -> Tensor:
        return self._rows[(self.clock // self.every - 1) % len(self._rows)]


@torch.no_grad()
def refresh_batch_norm(module: nn.Module, batches: Iterable[Any]) -> None:
    """Recompute batch-norm statistics for averaged weights, as the mean over some batches.

    An average of weights needs statistics of its own activations. Only the batch-norm layers are in
    training mode meanwhile; modes and momenta come back as they were, and after an exception the
    statistics too.

    Args:
        module: the averaged network.
        batches: inputs of the network. A tuple or list is taken apart into as many arguments as
            ``forward`` needs, one at least; those of it that are left over, such as the labels of a
            loader, are not looked at.

    Raises:
        ValueError: no batches.

    References:
        Izmailov et al. 2018, "Averaging weights leads to wider optima and better generalization",
        UAI, https://arxiv.org/abs/1803.05407, section 3.2.

    Example:
        >>> import torch
        >>> norm = torch.nn.BatchNorm1d(1)
        >>> refresh_batch_norm(norm, [torch.full((4, 1), 1.0), torch.full((4, 1), 3.0)])
        >>> norm.running_mean
        tensor([2.])
    """
    inputs = _inputs_of(unwrap(module))
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    modes = [(m, m.training) for m in module.modules()]
    momenta = [norm.momentum for norm in norms]
    statistics = [buffer for norm in norms for buffer in norm.buffers()]
    before = [buffer.clone() for buffer in statistics]
    seen = 0
    try:
        module.eval()
        for norm in norms:
            norm.train()
            norm.momentum = None  # the plain mean over batches
            norm.reset_running_stats()
        for seen, batch in enumerate(batches, 1):  # noqa: B007
            module(*batch[:inputs]) if isinstance(batch, tuple | list) else module(batch)
        if not seen:
            raise ValueError("refresh_batch_norm needs at least one batch")
    except BaseException:
        for buffer, value in zip(statistics, before, strict=True):
            buffer.copy_(value)
        raise
    finally:
        for inner, mode in modes:
            inner.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _inputs_of(module: nn.Module) -> int | None:
    """How many arguments ``forward`` needs; None where it takes any number of them."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(p.kind in positional and p.default is p.empty for p in parameters))
