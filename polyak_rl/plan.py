"""What one update does to each tensor, decided and checked before the first write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from numbers import Real
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from polyak_rl.flat import coalesce
from polyak_rl.pairing import Pair, Watch, is_sharded, require_matches, shard_of
from polyak_rl.swap import require_online, swaps

Tau: TypeAlias = float | Tensor | Mapping[str, float]
"""One number in [0, 1], a 0-dim tensor on the networks' device, or a number per name pattern."""

Policy: TypeAlias = Literal["copy", "average", "keep"]
"""What happens to a buffer: copied exactly, averaged like a parameter, or left alone."""

Buffers: TypeAlias = Policy | Mapping[str, Policy]
"""One policy, or a policy per name pattern; of several patterns that match the last one counts."""


class Plan:
    """What one update does, decided and checked before the first write.

    Where the tensors are detached it needs no ``no_grad``, which would cost a microsecond.
    ``masters`` are the float32 masters by name as far as there are any yet; None forbids them.
    """

    def __init__(
        self,
        pairs: list[Pair],
        tau: Tau,
        rules: Mapping[str, tuple[Policy, float | None]],
        masters: Mapping[str, Tensor] | None = None,
        modules: tuple[nn.Module, nn.Module] | None = None,
    ) -> None:
        self.pairs = pairs
        self.rules = rules
        moving, copied = [], []
        for pair in pairs:
            policy, _ = rules[pair.name]
            if policy == "average":
                moving.append(pair)
            elif policy == "copy":
                copied.append(pair)
        self._copied = ([pair.target for pair in copied], [pair.online for pair in copied])
        has_masters = masters is not None and any(map(_is_coarse, moving))
        if modules is not None and not isinstance(tau, Mapping) and not has_masters:
            moving = coalesce(moving, *modules)
        kinds: dict[Any, list[Pair]] = {}
        for pair in moving:
            own_tau = rules[pair.name][1] if pair.name in rules else None
            kind = (pair.target.dtype, pair.online.dtype, pair.target.device, own_tau)
            kinds.setdefault(kind, []).append(pair)
        self._groups = [_Group(group, kind[-1], masters) for kind, group in kinds.items()]
        # True while the modules hold the tensors that this plan writes and reads
        self.intact = Watch(*modules).intact if modules is not None else _never
        self.set_tau(check_tau(tau))

    def set_tau(self, tau: Tau) -> None:
        """Use another tau; a mapping must be the one that the plan was made with."""
        calls: list[Callable[[], object]] = []
        for group in self._groups:
            calls += group.move(tau if group.tau is None else group.tau)
        if self._copied[0]:
            calls.append(partial(torch._foreach_copy_, *self._copied))
        self._calls = calls

    def apply(self) -> None:
        """Move every tensor by one update."""
        self._require_online()
        for call in self._calls:
            call()

    def copy(self) -> None:
        """Make every tensor equal to its online one, bit for bit."""
        self._require_online()
        for call in [call for group in self._groups for call in group.copy()]:
            call()
        if self._copied[0]:
            torch._foreach_copy_(*self._copied)

    def _require_online(self) -> None:
        if swaps:  # almost never: this must cost nothing
            both = [tensor for pair in self.pairs for tensor in (pair.target, pair.online)]
            require_online("updating a target network", both)

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
        self._versions = [target._version for target in self._targets] if self.masters else []

    def move(self, tau: Any) -> list[Callable[[], object]]:
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
        calls: list[Callable[[], object]] = []
        if self.masters and not torch.compiler.is_compiling():
            calls.append(self._notice_writes)
        if self._sources is not self._onlines:
            calls.append(partial(torch._foreach_copy_, self._sources, self._onlines))
        if len(self._averages) == 1:
            calls.append(partial(self._averages[0].lerp_, self._sources[0], tau))
        else:
            weight = [tau] * len(self._averages) if isinstance(tau, Tensor) else tau
            calls.append(partial(torch._foreach_lerp_, self._averages, self._sources, weight))
        return calls + self._round()

    def copy(self) -> list[Callable[[], object]]:
        """The calls that make the targets equal to the online tensors."""
        return [partial(torch._foreach_copy_, self._averages, self._onlines), *self._round()]

    def _round(self) -> list[Callable[[], object]]:
        """The calls that bring the masters' values to the targets."""
        if not self.masters:
            return []
        rounding = partial(torch._foreach_copy_, self._targets, self._averages)
        return [rounding] if torch.compiler.is_compiling() else [rounding, self._remember_writes]

    def _remember_writes(self) -> None:
        self._versions = [target._version for target in self._targets]

    def _notice_writes(self) -> None:
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


def detached(pairs: list[Pair]) -> list[Pair]:
    """The same pairs apart from any graph."""
    return [Pair(p.name, p.target.detach(), p.online.detach(), p.is_buffer) for p in pairs]


def shards(pairs: list[Pair]) -> list[Pair]:
    """Pairs of what this process holds: all of a plain tensor, its shard of a DTensor."""
    if not any(is_sharded(pair.target) for pair in pairs):
        return pairs
    return [Pair(p.name, shard_of(p.target), shard_of(p.online), p.is_buffer) for p in pairs]


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


def choose_policies(
    tensors: Sequence[tuple[str, Tensor, bool]], buffers: Buffers
) -> dict[str, Policy]:
    """What happens to each (name, tensor, is_buffer): parameters are averaged, integers never."""
    for policy in buffers.values() if isinstance(buffers, Mapping) else [buffers]:
        if policy not in ("copy", "average", "keep"):
            raise ValueError(f"buffers must be 'copy', 'average' or 'keep', got {policy!r}")
    names = [name for name, _, is_buffer in tensors if is_buffer]
    if isinstance(buffers, Mapping):
        policies = _by_pattern("buffers", buffers, names, "copy")
    else:
        policies = dict.fromkeys(names, buffers)
    for name, tensor, _ in tensors:
        policy = policies.setdefault(name, "average")
        if policy == "average" and not (tensor.is_floating_point() or tensor.is_complex()):
            policies[name] = "copy"
    return policies


def tensor_rules(
    pairs: list[Pair], tau: Tau, buffers: Buffers
) -> dict[str, tuple[Policy, float | None]]:
    """What the patterns say of each tensor: its policy, and its own tau if there are patterns."""
    policies = choose_policies([(p.name, p.target, p.is_buffer) for p in pairs], buffers)
    taus: Mapping[str, float] = {}
    if isinstance(tau, Mapping):
        moving = [pair.name for pair in pairs if policies[pair.name] == "average"]
        taus = _by_pattern("tau", tau, moving)
    return {name: (policy, taus.get(name)) for name, policy in policies.items()}


_T = TypeVar("_T")


def _by_pattern(
    argument: str, patterns: Mapping[str, _T], names: list[str], default: _T | None = None
) -> dict[str, _T]:
    """The value of the last pattern that matches each name."""
    require_matches(argument, patterns, names)
    values = {}
    for name in names:
        found = [value for pattern, value in patterns.items() if fnmatchcase(name, pattern)]
        if not found and default is None:
            raise ValueError(
                f"no {argument} pattern matches {name!r}; the patterns are {[*patterns]}"
            )
        values[name] = found[-1] if found else default
    return values  # type: ignore[return-value]
