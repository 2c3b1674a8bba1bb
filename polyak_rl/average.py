"""Several averages of one network kept side by side, moved together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polyak_rl.buffers import Buffers
from polyak_rl.guard import Guard, all_finite, check_guard
from polyak_rl.rules import Rule, Stretch, Window, describe_rule, require_int
from polyak_rl.vector import Averages, WeightVector, require_online

_BLOCK = 32  # iterates that are taken in by one matrix product
_BLOCK_BYTES = 1 << 26  # and the memory that they may wait in
_COLUMNS = 1 << 13  # weights at a time, so that their float64 copies stay in the cache


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

    _rows: Tensor  # the iterates that wait
    _averages: Tensor
    _errors: Tensor  # what rounding took from them, if compensated
    _rings: dict[str, Tensor]

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

        Raises:
            RuntimeError: inside :meth:`applied`, where the network holds an average.
            ValueError: the network has other names or shapes than before.
        """
        require_online(self._vector, "update()")
        self.clock += 1
        if self.clock % self.every:
            return
        if self._vector.follow():
            self._move()
        row = self._rows[self._waiting]
        self._vector.read(row, self._row_views[self._waiting])
        if self._guarded and not all_finite([row]):
            self.clock -= 1
            self.skipped += 1
            return
        k = self.clock // self.every
        for name, window in self._windows.items():
            if window.fires(k, self.every):
                self._rings[name][(self._fired(window, k) - 1) % window.size].copy_(row)
        self._wait()

    @torch.no_grad()
    def vector(self, name: str) -> Tensor:
        """One average as a float64 vector (float32 if compensated) in the layout of the network."""
        self._require(name)
        if self.clock < self.every:
            return self._vector.now()
        if name in self._windows:
            window, k = self._windows[name], self.clock // self.every
            filled = min(self._fired(window, k), window.size)
            ring = self._rings[name][:filled] if filled else self._last().unsqueeze(0)
            return ring.to(self._exact).mean(dim=0)
        self._take_in()
        row = self._moving.index(name)
        average = self._averages[row]
        return average + self._errors[row] if self._compensated else average

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Rules, clock, averages and the iterates that wait, as tensors and plain values."""
        return {
            "rules": {name: describe_rule(rule) for name, rule in self.rules.items()},
            "every": self.every,
            "clock": self.clock,
            "skipped": self.skipped,
            "layout": self._vector.describe(),
            "averages": self._averages.clone(),
            "errors": self._errors.clone(),
            "rings": {name: ring.clone() for name, ring in self._rings.items()},
            "last": self._last().clone(),
            "waiting": self._rows[: self._waiting].clone(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: other rules, cadence, precision, names or shapes; nothing has changed.
        """
        ours = {name: describe_rule(rule) for name, rule in self.rules.items()}
        for what, mine, theirs in (
            ("rules", ours, state["rules"]),
            ("every", self.every, state["every"]),
            ("compensated", len(self._errors) > 0, len(state["errors"]) > 0),
        ):
            if mine != theirs:
                raise ValueError(f"the saved bank differs in {what}: {theirs} there, {mine} here")
        layout = state["layout"]
        loaded = {
            key: self._vector.from_layout(layout, state[key])
            for key in ("averages", "last", "waiting")
        }
        rings = {n: self._vector.from_layout(layout, r) for n, r in state["rings"].items()}
        if self._compensated:
            self._errors.copy_(self._vector.from_layout(layout, state["errors"]))
        self._averages.copy_(loaded["averages"])
        self._rows[0].copy_(loaded["last"])
        for name, ring in rings.items():
            self._rings[name].copy_(ring)
        self.clock, self._waiting = state["clock"], 0
        self.skipped = state.get("skipped", 0)
        self._taken = self.clock // self.every - len(loaded["waiting"])
        for row in loaded["waiting"]:
            self._rows[self._waiting].copy_(row)
            self._wait()

    def _allocate(self) -> None:
        vector, device = self._vector, self._vector.device
        self._exact = torch.float32 if self._compensated else torch.float64
        row_bytes = max(1, vector.size * vector.dtype.itemsize)  # some processes have no shards
        rows = max(1, min(_BLOCK, _BLOCK_BYTES // row_bytes))
        self._rows = torch.zeros(rows, vector.size, dtype=vector.dtype, device=device)
        self._row_views = [vector.views(row) for row in self._rows]
        self._waiting = 0  # rows of the block that are filled
        self._taken = 0  # updates in the averages
        self._averages = torch.zeros(
            len(self._moving), vector.size, dtype=self._exact, device=device
        )
        self._errors = torch.zeros_like(self._averages if self._compensated else self._averages[:0])
        self._rings = {
            name: torch.zeros(window.size, vector.size, dtype=vector.dtype, device=device)
            for name, window in self._windows.items()
        }

    def _move(self) -> None:
        """Go to where the network went."""
        device = self._vector.device
        if self._averages.device != device:
            self._rows, self._averages = self._rows.to(device), self._averages.to(device)
            self._errors = self._errors.to(device)
            self._row_views = [self._vector.views(row) for row in self._rows]
            self._rings = {name: ring.to(device) for name, ring in self._rings.items()}

    def _wait(self) -> None:
        """Count the row that was filled; a full block is taken in."""
        self._waiting += 1
        if self._waiting == len(self._rows):
            self._take_in()

    def _take_in(self) -> None:
        """Move every average by the iterates that wait."""
        waiting, self._waiting = self._waiting, 0
        if not waiting:
            return
        gains = [self._gains(self.rules[name], waiting) for name in self._moving]
        self._taken += waiting
        rows = self._rows[:waiting]
        table = torch.tensor(gains, dtype=self._exact, device=rows.device).view(-1, waiting + 1)
        weights, keep = table[:, :-1], table[:, -1:]
        if self._compensated:
            self._take_in_compensated(rows, weights)
        else:
            columns = _COLUMNS if rows.device.type == "cpu" else max(1, rows.shape[1])
            for start in range(0, rows.shape[1], columns):
                part = slice(start, start + columns)
                averages = self._averages[:, part]
                # 0 * NaN is NaN: an average that is replaced must not remember.
                averages.masked_fill_(keep == 0, 0.0).mul_(keep)
                averages.addmm_(weights, rows[:, part].to(self._exact))
        self._rows[0].copy_(self._rows[waiting - 1])  # the last iterate stays at hand

    def _take_in_compensated(self, rows: Tensor, weights: Tensor) -> None:
        """The same in pairs of float32: ``average + error`` is the value (Knuth's two-sum)."""
        for weight, average, error in zip(weights, self._averages, self._errors, strict=True):
            if self._taken == len(rows):
                average.copy_(rows[0])  # so that what is added is small
                error.zero_()
            step = error + weight @ ((rows.to(self._exact) - average) - error)
            total = average + step
            part = total - average
            error.copy_((average - (total - part)) + (step - part))
            average.copy_(total)

    def _gains(self, rule: Rule, waiting: int) -> list[float]:
        """What each waiting iterate weighs after all are in; last, what is left of the average."""
        weights, left = [0.0] * waiting, 1.0
        for i in reversed(range(waiting)):
            gain = rule.gain(self._taken + 1 + i, self.every)
            weights[i] = left * gain
            left *= 1.0 - gain
        return [*weights, left]

    def _fired(self, window: Window, k: int) -> int:
        """Snapshots that update k has seen, counting its own."""
        if window.every >= self.every:
            return k * self.every // window.every
        return k

    def _last(self) -> Tensor:
        return self._rows[max(0, self._waiting - 1)]

    def _require(self, name: str) -> None:
        if name not in self.rules:
            raise ValueError(
                f"there is no average {name!r}; the averages are {', '.join(self.rules)}"
            )


@torch.no_grad()
def refresh_batch_norm(module: nn.Module, batches: Iterable[Any]) -> None:
    """Recompute batch-norm statistics for averaged weights, as the mean over some batches.

    An average of weights needs statistics of its own activations. Only the batch-norm layers are in
    training mode meanwhile; modes and momenta come back as they were.

    Args:
        module: the averaged network.
        batches: inputs of the network; a tuple or list is taken apart into arguments.

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
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    modes = [(m, m.training) for m in module.modules()]
    momenta = [norm.momentum for norm in norms]
    seen = 0
    try:
        module.eval()
        for norm in norms:
            norm.train()
            norm.momentum = None  # the plain mean over batches
            norm.reset_running_stats()
        for seen, batch in enumerate(batches, 1):  # noqa: B007
            module(*batch) if isinstance(batch, tuple | list) else module(batch)
    finally:
        for inner, mode in modes:
            inner.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if not seen:
        raise ValueError("refresh_batch_norm needs at least one batch")
