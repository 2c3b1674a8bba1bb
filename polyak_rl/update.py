"""What one update does to each tensor, decided and checked before the first write."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from polyak_rl.buffers import Buffers, Treatment, by_pattern, choose_treatments
from polyak_rl.flat import coalesce
from polyak_rl.guard import Call, at_once
from polyak_rl.pairing import Pair, Watch
from polyak_rl.swap import require_online, swaps

Tau: TypeAlias = float | Tensor | Mapping[str, float]
"""One number in [0, 1], a 0-dim tensor on the networks' device, or a number per name pattern."""


class Terms(NamedTuple):
    """On which terms a tensor follows: its treatment, and its own tau if there are patterns."""

    treatment: Treatment
    tau: float | None


def terms_of(pairs: list[Pair], tau: Tau, buffers: Buffers) -> dict[str, Terms]:
    """What the patterns say of each tensor."""
    treatments = choose_treatments([(p.name, p.target, p.is_buffer) for p in pairs], buffers)
    taus: Mapping[str, float] = {}
    if isinstance(tau, Mapping):
        moving = [pair.name for pair in pairs if treatments[pair.name] == "average"]
        taus = by_pattern("tau", tau, moving)
    return {name: Terms(how, taus.get(name)) for name, how in treatments.items()}


class Plan:
    """What one update does, decided and checked before the first write; tau is from `check_tau`.

    Where the tensors are detached it needs no ``no_grad``, which would cost a microsecond.
    ``masters`` are the float32 masters by name as far as there are any yet; None forbids them.
    """

    def __init__(
        self,
        pairs: list[Pair],
        tau: Tau,
        terms: Mapping[str, Terms],
        masters: Mapping[str, Tensor] | None = None,
        modules: tuple[nn.Module, nn.Module] | None = None,
    ) -> None:
        self.pairs = pairs
        self.terms = terms
        moving, copied = [], []
        for pair in pairs:
            treatment, _ = terms[pair.name]
            if treatment == "average":
                moving.append(pair)
            elif treatment == "copy":
                copied.append(pair)
        self._copied = ([pair.target for pair in copied], [pair.online for pair in copied])
        has_masters = masters is not None and any(map(_is_coarse, moving))
        if modules is not None and not isinstance(tau, Mapping) and not has_masters:
            moving = coalesce(moving, *modules)
        kinds: dict[Any, list[Pair]] = {}
        for pair in moving:
            own_tau = terms[pair.name].tau if pair.name in terms else None
            kind = (pair.target.dtype, pair.online.dtype, pair.target.device, own_tau)
            kinds.setdefault(kind, []).append(pair)
        self._groups = [_Group(group, kind[-1], masters) for kind, group in kinds.items()]
        # True while the modules hold the tensors that this plan writes and reads
        self.intact = Watch(*modules).intact if modules is not None else _never
        self._with_masters = [group for group in self._groups if group.masters]
        self._traced = torch.compiler.is_compiling()
        self.set_tau(tau)

    def set_tau(self, tau: Tau) -> None:
        """Use another tau; a mapping must be the one that the plan was made with."""
        calls = [
            move
            for group in self._groups
            for move in group.move(tau if group.tau is None else group.tau)
        ]
        self.tau, self._calls = tau, calls + self._copies()

    def apply(self, *last: Call) -> None:
        """Move every tensor by one update, then call ``last``: all of it or nothing."""
        self._run([*self._calls, *last])

    def copy(self) -> None:
        """Make every tensor equal to its online one, bit for bit."""
        self._run([copy for group in self._groups for copy in group.copy()] + self._copies())

    def _copies(self) -> list[Call]:
        return [partial(torch._foreach_copy_, *self._copied)] if self._copied[0] else []

    def _run(self, calls: list[Call]) -> None:
        if swaps:
            self.require_online("updating a target network")
        if self._traced:
            for one in calls:
                one()
            return
        for group in self._with_masters:
            group.notice_writes()
        at_once(calls)
        for group in self._with_masters:
            group.remember_writes()

    def require_online(self, what: str) -> None:
        """Raise RuntimeError where one of the networks holds an average."""
        if swaps:  # almost never: this must cost nothing
            both = [tensor for pair in self.pairs for tensor in (pair.target, pair.online)]
            require_online(what, both)

    @property
    def masters(self) -> dict[str, Tensor]:
        """The float32 masters of 16-bit tensors by name."""
        return {name: m for group in self._groups for name, m in group.masters.items()}


class _Group:
    """Tensors that move together: one pair of dtypes, one device, one tau."""

    def __init__(
        self, pairs: list[Pair], tau: float | None, masters: Mapping[str, Tensor] | None
    ) -> None:
        self.tau = tau  # its own, where tau was given by pattern
        self.masters: dict[str, Tensor] = {}
        self._first = pairs[0]
        self._targets = [pair.target for pair in pairs]
        self._onlines = [pair.online for pair in pairs]
        self._averages = self._targets  # what moves: the targets, or their masters
        if masters is not None and _is_coarse(self._first):
            self.masters = {p.name: _master(p.target, masters.get(p.name)) for p in pairs}
            self._averages = list(self.masters.values())
        self._sources = self._onlines  # what it moves to: the online tensors, or those cast
        if self._averages[0].dtype != self._onlines[0].dtype:
            self._sources = [torch.empty_like(average) for average in self._averages]
        if self.masters:
            self.remember_writes()

    def move(self, tau: Any) -> list[Call]:
        """The calls that move the targets by one update.

        Raises:
            ValueError: this tau would stall the tensors, or is on another device.
        """
        first = self._first
        if _is_coarse(first) and not self.masters and not _is_end(tau):
            raise ValueError(
                f"target {first.name!r} is {first.target.dtype}: rounding would stop a soft update "
                "short of the online network; use TargetNetwork, which keeps a float32 master, or "
                "keep the target in float32"
            )
        if isinstance(tau, Tensor) and tau.device != first.target.device:
            raise ValueError(
                f"tau must be on the device of {first.name!r}, {first.target.device}, got "
                f"{tau.device}"
            )
        if _is_end(tau):
            return self.copy() if tau == 1 else []
        calls: list[Call] = []
        if self._sources is not self._onlines:
            calls.append(partial(torch._foreach_copy_, self._sources, self._onlines))
        if len(self._averages) == 1:
            calls.append(partial(self._averages[0].lerp_, self._sources[0], tau))
        else:
            weight = tau
            if isinstance(tau, Tensor) and first.target.is_cpu:
                weight = [tau] * len(self._averages)
            elif isinstance(tau, Tensor):
                # Of weights of one element torch makes a launch a tensor; these take two for all.
                memory, weight = self._weights
                calls.append(partial(memory.copy_, tau))
            calls.append(partial(torch._foreach_lerp_, self._averages, self._sources, weight))
        return calls + self._round()

    @cached_property
    def _weights(self) -> tuple[Tensor, list[Tensor]]:
        """Memory for one weight an element, and its parts beside the averages."""
        sizes = [average.numel() for average in self._averages]
        memory = self._averages[0].new_empty(sum(sizes))
        both = zip(torch.split(memory, sizes), self._averages, strict=True)
        parts = [
            part.as_strided(like.shape, torch.empty_like(like, device="meta").stride())
            for part, like in both
        ]
        return memory, parts

    def copy(self) -> list[Call]:
        """The calls that make the targets equal to the online tensors."""
        return [partial(torch._foreach_copy_, self._averages, self._onlines), *self._round()]

    def _round(self) -> list[Call]:
        """The call that brings the masters' values to the targets."""
        return [partial(torch._foreach_copy_, self._targets, self._averages)] * bool(self.masters)

    def remember_writes(self) -> None:
        """Take what the targets hold for what the masters have given them."""
        self._versions = [target._version for target in self._targets]

    def notice_writes(self) -> None:
        """Start again from values that somebody else wrote to the copy (loaded weights, say)."""
        for target, master, version in zip(
            self._targets, self._averages, self._versions, strict=True
        ):
            if target._version != version:
                master.copy_(_master(target, master))


def _never() -> bool:
    return False


def _is_coarse(pair: Pair) -> bool:
    """True where a small step of the target would be lost in rounding."""
    return pair.target.dtype.itemsize < 4


def _is_end(tau: object) -> bool:
    """True for the two ends, which take no arithmetic; a tensor always does."""
    return isinstance(tau, float) and (tau == 0 or tau == 1)


def _master(target: Tensor, known: Tensor | None) -> Tensor:
    """The target in float32: as the known master has it where that still rounds to the target."""
    if known is not None and torch.compiler.is_compiling():
        return known
    master = target.detach().to(torch.float32)
    if known is None or known.shape != target.shape:
        return master
    known = known.to(target.device)
    return torch.where(known.to(target.dtype).to(torch.float32) == master, known, master)


def check_tau(tau: Tau) -> Tau:
    """Tau as a float, a detached tensor or a mapping to floats; ValueError if it is none."""
    if isinstance(tau, Tensor):
        if tau.dim() != 0 or not tau.is_floating_point():
            raise ValueError(
                "tau must be a floating-point tensor of no dimensions, got "
                f"{tau.dtype} {tuple(tau.shape)}"
            )
        return tau.detach()
    if isinstance(tau, Mapping):
        return {pattern: _check_number(value) for pattern, value in tau.items()}
    return _check_number(tau)


def _check_number(tau: float) -> float:
    if isinstance(tau, bool) or not isinstance(tau, Real) or not 0 <= tau <= 1:
        raise ValueError(f"tau must be in [0, 1], got {tau!r}")
    return float(tau)
