"""Several averages of one network kept side by side, moved together."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polyak_rl.buffers import Buffers
from polyak_rl.guard import Guard
from polyak_rl.iterates import Iterates, Keeper
from polyak_rl.pairing import unwrap
from polyak_rl.rules import Rule, Stretch, Window, describe_rule
from polyak_rl.vector import check_clock, check_vectors

_BLOCKS_AHEAD = 64  # blocks whose gains are sent to a device at once


class _Kept(NamedTuple):
    """The averages; replaced as one, so that an interrupt finds the old or the new."""

    now: Tensor  # [1, rules, size]; compensated: [2, rules, size], the second what rounding took
    spare: Tensor  # where the next ones are made
    taken: int  # updates that are in


class _Gains(NamedTuple):
    """What iterates weigh, block by block."""

    first: int  # updates before the first block
    table: Tensor  # [blocks, rules, iterates + 1]; last what is left of the average
    forgotten: list[list[int]]  # the averages that a block replaces

    def has(self, taken: int, count: int) -> bool:
        block, rest = divmod(taken - self.first, count)
        return self.table.shape[2] == count + 1 and not rest and 0 <= block < len(self.table)


class AverageBank(Keeper[str]):
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

    _kind = "bank"
    _format = "polyak_rl.bank/3"
    _kept: _Kept
    _ahead: _Gains | None
    _rings: dict[str, Tensor]  # [snapshots, size]: of those that are taken in

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
        self.rules = dict(rules)
        self._iterates = Iterates(module, every, buffers, guard)
        self._vector = self._iterates.vector
        if compensated is None:
            compensated = self._vector.device.type == "mps"
        self._compensated = compensated
        self._exact = torch.float32 if compensated else torch.float64
        self._moving = [name for name, rule in rules.items() if not isinstance(rule, Window)]
        self._windows = {n: rule for n, rule in rules.items() if isinstance(rule, Window)}
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
        self._iterates.record("AverageBank.update()", self)

    @torch.inference_mode(False)
    @torch.no_grad()
    def vector(self, name: str) -> Tensor:
        """One average as a float64 vector (float32 if compensated) in the layout of the network."""
        if name not in self.rules:
            raise ValueError(
                f"there is no average {name!r}; the averages are {', '.join(self.rules)}"
            )
        k = self.updates
        if not k:
            return self._vector.now()
        self._iterates.take_in([self])
        if name in self._windows:
            snapshots = self._snapshots(name) or [self._iterates.since(k - 1)[0]]
            return torch.stack(snapshots).to(self._exact).mean(dim=0)
        now, _, taken = self._kept
        i = self._moving.index(name)
        before = now[:, i : i + 1]
        if taken == k:
            return before.sum((0, 1))
        average = before.new_empty(before.shape)
        _, gains, forgotten = self._gains([name], taken, k - taken)
        for part, rows in self._iterates.exact(taken, k, self._exact):
            self._mix(before[..., part], rows, gains[0], forgotten[0], average[..., part])
        return average.sum((0, 1))

    def _settled(self) -> int:
        device = self._iterates.rows.device
        if self._kept.now.device != device:
            now, spare, taken = self._kept
            self._rings = {name: ring.to(device) for name, ring in self._rings.items()}
            self._ahead = None
            self._kept = _Kept(now.to(device), spare.to(device), taken)
        return self._kept.taken

    def _move(self, part: slice, rows: Tensor) -> None:
        now, spare, taken = self._kept
        if self._ahead is None or not self._ahead.has(taken, len(rows)):
            # Many at once, so that few are sent to a device.
            blocks = _BLOCKS_AHEAD if len(rows) == len(self._iterates.rows) else 1
            self._ahead = self._gains(self._moving, taken, len(rows), blocks)
        first, gains, forgotten = self._ahead
        i = (taken - first) // len(rows)
        self._mix(now[..., part], rows, gains[i], forgotten[i], spare[..., part])

    def _take(self, updates: int) -> None:
        now, spare, taken = self._kept
        for name, window in self._windows.items():
            for i in range(self._fired(window, taken), self._fired(window, updates)):
                self._rings[name][i % window.size] = self._snapshot(name, i)
        self._kept = _Kept(spare, now, updates)

    def _since(self) -> int:
        return min(self._kept.taken, max(0, self.updates - 1))  # a window may need the last one

    def _state(self) -> dict[str, Any]:
        self._iterates.take_in([self])
        return {
            "rules": {name: describe_rule(rule) for name, rule in self.rules.items()},
            "every": self.every,
            "compensated": self._compensated,
            "taken": self._kept.taken,
            "averages": self._kept.now.clone(),
            "rings": {
                name: torch.cat([ring[:0], *(row[None] for row in self._snapshots(name))])
                for name, ring in self._rings.items()
            },
        }

    def _restore(self, state: Mapping[str, Any], layout: Any, updates: int) -> int:
        for what, ours in (
            ("rules", {name: describe_rule(rule) for name, rule in self.rules.items()}),
            ("every", self.every),
            ("compensated", self._compensated),
        ):
            if state[what] != ours:
                raise ValueError(
                    f"the saved bank differs in {what}: {state[what]} there, {ours} here"
                )
        taken = check_clock(state, "taken")
        if state["rings"].keys() != self._windows.keys():
            raise ValueError(f"the saved rings must be those of {[*self._windows]}")
        averages = check_vectors(state, "averages", [*self._kept.now.shape[:2]])
        self._allocate()
        self._kept.now.copy_(self._vector.from_layout(layout, averages))
        self._kept = self._kept._replace(taken=taken)
        for name, window in self._windows.items():
            fired = self._fired(window, updates)
            held = min(fired, window.size)
            ring = self._vector.from_layout(layout, check_vectors(state["rings"], name, [held]))
            for i, row in enumerate(ring, fired - held):
                self._rings[name][i % window.size] = row
        return taken

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_ahead": None}

    @torch.inference_mode(False)
    def _allocate(self) -> None:
        vector, device = self._vector, self._iterates.rows.device
        shape = 1 + self._compensated, len(self._moving), vector.size
        now, spare = (torch.zeros(shape, dtype=self._exact, device=device) for _ in range(2))
        self._kept = _Kept(now, spare, 0)
        self._rings = {
            name: torch.zeros(window.size, vector.size, dtype=vector.dtype, device=device)
            for name, window in self._windows.items()
        }
        self._ahead = None

    def _mix(
        self, before: Tensor, rows: Tensor, gains: Tensor, forgotten: list[int], after: Tensor
    ) -> None:
        """Move averages ``[parts, rules, columns]`` by iterates ``[n, columns]``."""
        weights, keep = gains[:, :-1], gains[:, -1:]
        if not self._compensated:
            averages = torch.mul(before[0], keep, out=after[0])
            for i in forgotten:  # 0 * NaN is NaN: what is replaced must not remember
                averages[i].zero_()
            averages.addmm_(weights, rows)
            return
        for i, weight in enumerate(weights):  # in pairs of float32 (Knuth's two-sum)
            # From the first iterate where the average is replaced, so that what is added is small.
            average, error = (
                (rows[0], torch.zeros_like(rows[0])) if i in forgotten else before[:, i]
            )
            moves = (rows - average) - error
            # No matrix product, whose precision is the caller's to lower (autocast, TF32).
            step = error + (weight.unsqueeze(1) * moves).sum(0)
            total = average + step
            part = total - average
            after[0, i].copy_(total)
            after[1, i].copy_((average - (total - part)) + (step - part))

    def _gains(self, names: Sequence[str], taken: int, count: int, blocks: int = 1) -> _Gains:
        """Those of blocks of so many iterates that come after others."""
        rows = [
            [self._gains_of(self.rules[name], taken + i * count, count) for name in names]
            for i in range(blocks)
        ]
        device, shape = self._iterates.rows.device, (blocks, len(names), count + 1)
        made = torch.tensor(rows, dtype=self._exact, device="cpu", pin_memory=device.type == "cuda")
        table = made.view(shape).to(device, non_blocking=True)  # from pinned memory nobody waits
        forgotten = [[i for i, row in enumerate(block) if row[-1] == 0] for block in rows]
        return _Gains(taken, table, forgotten)

    def _gains_of(self, rule: Rule, taken: int, count: int) -> list[float]:
        """What each iterate weighs after all are in; last, what is left of the average."""
        weights, left = [0.0] * count, 1.0
        for i in reversed(range(count)):
            gain = rule.gain(taken + 1 + i, self.every)
            weights[i] = left * gain
            left *= 1.0 - gain
        return [*weights, left]

    def _fired(self, window: Window, k: int) -> int:
        """Snapshots that update k has seen, counting its own."""
        if window.every >= self.every:
            return k * self.every // window.every
        return k

    def _snapshot(self, name: str, i: int) -> Tensor:
        """Snapshot i, from 0: where it is kept, or among the iterates that wait."""
        window = self._windows[name]
        k = -(-(i + 1) * window.every // self.every) if window.every >= self.every else i + 1
        if k <= self._kept.taken:
            return self._rings[name][i % window.size]
        return self._iterates.since(k - 1, k)[0]

    def _snapshots(self, name: str) -> list[Tensor]:
        """The snapshots of a window, oldest first."""
        window = self._windows[name]
        fired = self._fired(window, self.updates)
        return [self._snapshot(name, i) for i in range(max(0, fired - window.size), fired)]


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
