"""Target networks: ``theta' <- tau theta + (1 - tau) theta'``, safely and in one kernel.

``tau`` always is the weight of the **online** network, and the destination always comes first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from numbers import Real
from typing import Any, Literal, TypeAlias, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from polyak_rl.flat import coalesce, flatten_like_
from polyak_rl.guard import Guard, all_finite, check_guard
from polyak_rl.pairing import (
    Network,
    Pair,
    Watch,
    is_sharded,
    match,
    matches_any,
    require_matches,
    shard_of,
    unwrap,
    walk,
)
from polyak_rl.rules import require_int

Tau: TypeAlias = float | Tensor | Mapping[str, float]
"""One number in [0, 1], a 0-dim tensor on the networks' device, or a number per name pattern."""

Policy: TypeAlias = Literal["copy", "average", "keep"]
"""What happens to a buffer: copied exactly, averaged like a parameter, or left alone."""

Buffers: TypeAlias = Policy | Mapping[str, Policy]
"""One policy, or a policy per name pattern; of several patterns that match the last one counts."""


def soft_update(
    target: Network, online: Network, tau: Tau = 0.005, *, buffers: Buffers = "copy"
) -> None:
    """Move a target network towards the online network, in place.

    .. math:: \\theta' \\leftarrow \\tau\\,\\theta + (1 - \\tau)\\,\\theta'

    Tensors are matched by name with exact shapes (see :mod:`polyak_rl.pairing`); two sequences,
    ``parameters()`` included, by position. The match of two modules is kept and checked at each
    call, so that moved or replaced parameters are followed. Networks that were laid out by
    :func:`polyak_rl.flatten_` take one kernel. Sharded networks (DTensor, FSDP2's ``fully_shard``)
    are updated shard by shard, each process its own, without communication; give modules, which
    know when FSDP2 has gathered their parameters for a forward pass.

    Args:
        target: the network that follows: a module, a mapping of name to tensor or a sequence.
        online: the network that is trained, of the same kind; it is only read.
        tau: the weight of ``online``, in [0, 1]. 0 changes no parameter, 1 copies bit for bit. A
            0-dim tensor is read on its device, so that a schedule survives a captured graph; it
            always takes the arithmetic. A mapping of name patterns gives each tensor its own;
            of several patterns that match a name the last one counts.
        buffers: what happens to buffers such as batch-norm statistics: ``"copy"``, ``"average"``,
            ``"keep"``, or a mapping of name patterns to these (what no pattern matches is
            copied). Integers are never averaged, but copied. Plain mappings do not say which
            tensors are buffers: floating ones are averaged, others copied.

    Under ``torch.compile`` give modules, and one ``tau`` and policy instead of patterns
    (:class:`TargetNetwork` takes those there too).

    Raises:
        ValueError: tau is outside [0, 1]; names, shapes or devices differ; nothing matches; memory
            is shared; the arguments look swapped; or the target has 16 bits or less, and rounding
            would stop it short of the online network (:class:`TargetNetwork` keeps a master).
            Nothing has been written.
        TypeError: an argument is not a network.

    References:
        Lillicrap et al. 2016, "Continuous control with deep reinforcement learning", ICLR,
        https://arxiv.org/abs/1509.02971.

    Example:
        >>> import torch
        >>> online = torch.nn.Linear(1, 1, bias=False)
        >>> target = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(online.weight, 1.0)
        >>> _ = torch.nn.init.constant_(target.weight, 0.5)
        >>> soft_update(target, online, tau=0.1)
        >>> round(target.weight.item(), 6)
        0.55
    """
    if not (isinstance(target, nn.Module) and isinstance(online, nn.Module)):
        with torch.no_grad():
            pairs = _shards(match(target, online))
            _Plan(pairs, tau, _rules(pairs, tau, buffers)).apply()
    elif torch.compiler.is_compiling():
        pairs = _traced_pairs(target, online)
        _Plan(pairs, tau, _rules(pairs, tau, buffers)).apply()
    else:
        _planned(target, online, tau, buffers).apply()


def hard_update(target: Network, online: Network, *, buffers: Buffers = "copy") -> None:
    """Copy the online network into the target bit for bit: ``theta' <- theta``.

    The same as :func:`soft_update` with ``tau=1``: no arithmetic, so a NaN in the target is healed,
    and targets of 16 bits are welcome.

    Args:
        target: the network that is overwritten.
        online: the network that is read.
        buffers: as in :func:`soft_update`; ``"average"`` is a copy here too.

    Raises:
        ValueError: as :func:`soft_update`; nothing has been written.

    Example:
        >>> import torch
        >>> online, target = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> hard_update(target, online)
        >>> torch.equal(target.weight, online.weight)
        True
    """
    soft_update(target, online, 1.0, buffers=buffers)


@torch.no_grad()
def weighted_average(
    networks: Iterable[nn.Module | Mapping[str, Tensor]], weights: Iterable[float]
) -> dict[str, Tensor]:
    """The weighted sum of several networks' tensors, as a new mapping of name to tensor.

    .. math:: \\bar\\theta = \\sum_i w_i\\,\\theta_i

    Args:
        networks: modules or state dicts, matched by name with exact shapes.
        weights: one finite number a network. They are not renormalised: weights that sum to 1 make
            an average, ``[1, -1]`` a difference.

    Returns:
        New tensors with the names, dtypes and device of the first network, summed in float64, ready
        for ``load_state_dict``: non-persistent buffers of modules are left out. Integer and boolean
        tensors are copies of the first network's.

    Raises:
        ValueError: no network, not as many weights as networks, a weight that is not finite, or
            networks that do not match.

    Example:
        >>> import torch
        >>> w1, w2 = {"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}
        >>> weighted_average([w1, w2], [0.25, 0.75])["w"]
        tensor([2.5000])
    """
    networks, weights = list(networks), [float(weight) for weight in weights]
    if not networks or len(networks) != len(weights):
        raise ValueError(
            "weighted_average needs one weight a network and at least one network, got "
            f"{len(networks)} networks and {len(weights)} weights"
        )
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be finite, got {weights}")
    first = _state(networks[0])
    others = [
        [pair.online for pair in match(first, _state(network), writes=False)]
        for network in networks[1:]
    ]
    average = {}
    for i, (name, tensor) in enumerate(first.items()):
        if not tensor.is_floating_point() and not tensor.is_complex():
            average[name] = tensor.detach().clone()
            continue
        exact = torch.complex128 if tensor.is_complex() else torch.float64
        total = tensor.detach().to(exact) * weights[0]
        for other, weight in zip(others, weights[1:], strict=True):
            total += other[i].detach().to(exact) * weight
        average[name] = total.to(tensor.dtype)
    return average


class TargetNetwork(nn.Module):
    """A frozen copy of a network that follows it: the target network of DQN, DDPG, TD3 and SAC.

    .. math:: \\theta' \\leftarrow \\tau\\,\\theta + (1 - \\tau)\\,\\theta'
       \\quad\\text{at every } N\\text{-th call of update()}

    The copy lies on the device of the online network, does not require grad and stays in eval mode
    whatever mode its parent is put in. Calling the target calls the copy.

    Args:
        online: the network to follow. It is only read.
        tau: the weight of ``online`` in [0, 1], as in :func:`soft_update`; assign to ``.tau`` to
            change it. ``tau=1, every=N`` is DQN's hard target: a copy every N gradient steps.
        every: :meth:`update` acts at its N-th, 2N-th, 3N-th call. Call it once per gradient step.
        target: a module to use as the copy, for networks that cannot be deep-copied; it is frozen
            and overwritten with the weights of ``online``. That of a sharded network (FSDP2) is a
            twin, built and sharded alike.
        exclude: name patterns of tensors that are not the target's own, such as a shared encoder:
            the copy holds the very tensors of ``online``, also where those are replaced, and
            updates leave them alone. A ``target`` that was passed in keeps what it has there.
        buffers: what happens to buffers, as in :func:`soft_update`.
        guard: ``"finite"`` leaves out a firing at which the network has a NaN or an Inf: nothing
            moves, the clock neither, and ``skipped`` counts it. It reads one number back from the
            device, so it cannot be captured in a CUDA graph.

    Attributes:
        module: the copy.
        clock: how often :meth:`update` was called.
        skipped: the calls that the guard left out.

    A copy of 16 bits or less has a float32 master, because ``tau = 0.005`` is below their rounding:
    the average moves in float32 and is rounded into the copy. Values written to the copy by other
    means start the master anew. If the online network moves to another device or changes its
    dtype, the copy follows at the next update; a dtype that is the copy's own stays.

    Raises:
        ValueError: an argument out of range, a network that cannot be copied, or a ``target`` that
            does not match.

    References:
        Mnih et al. 2015, "Human-level control through deep reinforcement learning", Nature 518;
        Lillicrap et al. 2016, https://arxiv.org/abs/1509.02971.

    Example:
        >>> import torch
        >>> q = torch.nn.Linear(4, 2)
        >>> q_target = TargetNetwork(q, tau=0.005)
        >>> with torch.no_grad():
        ...     _ = q.weight.add_(1.0)       # an optimizer step
        >>> q_target.update()                # once per gradient step
        >>> q_target(torch.zeros(1, 4)).requires_grad
        False
    """

    def __init__(
        self,
        online: nn.Module,
        tau: Tau = 0.005,
        *,
        every: int = 1,
        target: nn.Module | None = None,
        exclude: Iterable[str] = (),
        buffers: Buffers = "copy",
        guard: Guard = None,
    ) -> None:
        super().__init__()
        if not isinstance(online, nn.Module):
            raise TypeError(f"online must be a module, got {type(online).__name__}")
        require_int(every, 1, "every")
        self.every = every
        self._exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        self._policy = buffers
        self._tau = _check_tau(tau)
        self._online = (online,)  # a tuple, so that it is not a submodule
        self._clock = self.skipped = 0
        self._guarded = check_guard(guard, online.parameters())
        # What torch.compile traces counts in a tensor: to it an int is a constant.
        self._traced_clock = torch.zeros((), dtype=torch.int64)
        if target is None:
            target = self._copy(online)
        match(target, online, self._exclude)
        onlines = {entry.name: entry.tensor for entry in walk(online)}
        self._dtypes = {name: tensor.dtype for name, tensor in onlines.items()}
        self._shared = {e.name for e in walk(target) if e.tensor is onlines.get(e.name)}
        self._excluded = {e.name for e in walk(target) if matches_any(e.name, self._exclude)}
        for entry in walk(target):
            if not entry.is_buffer and entry.name not in self._excluded:
                entry.tensor.requires_grad_(False)
        flatten_like_(target, online)
        self.module = target.eval()
        self._loaded: Mapping[str, Tensor] = {}
        self.register_load_state_dict_post_hook(_finish_loading)  # type: ignore[no-untyped-call]
        self._plan = self._plan_updates(self._tau)
        self.sync()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the copy."""
        return self.module(*args, **kwargs)

    @property
    def online(self) -> nn.Module:
        """The network that is followed."""
        return self._online[0]

    @property
    def tau(self) -> Tau:
        """The weight of the online network at each firing."""
        return self._tau

    @tau.setter
    def tau(self, tau: Tau) -> None:
        tau = _check_tau(tau)
        if isinstance(tau, Mapping) or isinstance(self._tau, Mapping):
            self._plan = self._plan_updates(tau, self._plan.masters)
        else:
            self._plan.set_tau(tau)
        self._tau = tau

    @property
    def clock(self) -> int:
        """How often :meth:`update` was called."""
        return self._clock + int(self._traced_clock)

    def update(self) -> None:
        """Count one gradient step, and at every N-th move the copy towards the online network.

        No allocation and no synchronisation with the device. In a captured CUDA graph ``every``
        must be 1, since what is recorded does not count: a replay does not advance ``clock``.

        Raises:
            ValueError: the online network no longer matches the copy.
        """
        compiling = torch.compiler.is_compiling()
        if self.every == 1 or (self.clock + 1) % self.every == 0:
            plan = self._plan
            if compiling or not plan.intact():
                plan = self._current_plan()
            if self._guarded and not all_finite([pair.online for pair in plan.pairs]):
                self.skipped += 1
                return
            plan.apply()
        if compiling:
            self._traced_clock.add_(1)
        else:
            self.__dict__["_clock"] += 1  # an assignment would pass nn.Module's checks, at 1.4 us

    def sync(self) -> None:
        """Copy the online network now, bit for bit, whatever tau is; the clock goes on."""
        self._current_plan().copy()

    @torch.no_grad()
    def lag(self, *, members: bool = False) -> Tensor:
        """The relative distance ``|theta' - theta| / |theta|`` over the updated parameters.

        Of a sharded network it is that of the shards of this process.

        Args:
            members: one value per leading index of the parameters, for networks of several members.

        Returns:
            A float32 tensor on the device, 0-dim or ``[members]``; nothing is read back.

        Raises:
            ValueError: the parameters have no such leading dimension in common.
        """
        pairs = [pair for pair in self._current_plan().pairs if not pair.is_buffer]
        leading = {pair.target.shape[:1] for pair in pairs}
        if members and (len(leading) != 1 or torch.Size() in leading):
            raise ValueError("lag(members=True) needs one leading dimension in all parameters")
        wide = [(_wide(pair.target), _wide(pair.online)) for pair in pairs]
        gap = _norm([target - online for target, online in wide], members)
        size = _norm([online for _, online in wide], members)
        return gap / size.clamp_min(torch.finfo(torch.float32).tiny)

    def train(self, mode: bool = True) -> TargetNetwork:
        """Stay in eval mode: a target that updates batch-norm statistics is no copy."""
        super().train(mode)
        self.module.eval()
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """The clock and, where the copy has 16 bits, the float32 masters (or shards) by name."""
        return {"clock": self.clock, "skipped": self.skipped, "masters": self._plan.masters}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`get_extra_state` returned."""
        masters = {name: tensor.shape for name, tensor in state["masters"].items()}
        ours = {name: tensor.shape for name, tensor in self._plan.masters.items()}
        if masters and masters != ours:
            raise ValueError(f"the saved masters {masters} do not fit this target's {ours}")
        self._clock, self.skipped = state["clock"], state.get("skipped", 0)
        self._traced_clock.zero_()
        self._loaded = state["masters"]

    def __getstate__(self) -> dict[str, Any]:
        # A plan points into memory: a copy makes its own from the masters.
        return {**self.__dict__, "_plan": None, "_loaded": self._plan.masters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _finish_loading(self)

    def _copy(self, online: nn.Module) -> nn.Module:
        network = unwrap(online)
        entries = list(walk(network))
        require_matches("exclude", self._exclude, [entry.name for entry in entries])
        shared = [entry.tensor for entry in entries if matches_any(entry.name, self._exclude)]
        try:
            return copy.deepcopy(network, {id(tensor): tensor for tensor in shared})
        except Exception as error:
            raise ValueError(
                f"{type(network).__name__} cannot be deep-copied ({error}): build a second one and "
                "pass it as target="
            ) from error

    def _current_plan(self) -> _Plan:
        if torch.compiler.is_compiling():
            # What is traced reads the modules anew: a plan would keep tensors that are gone later.
            pairs = _traced_pairs(self.module, self.online, self._excluded)
            return _Plan(pairs, self._tau, self._plan.rules, self._plan.masters)
        if not self._plan.intact():
            self._follow()
            self._plan = self._plan_updates(self._tau, self._plan.masters)
        return self._plan

    def _follow(self) -> None:
        """Take the copy to where the online network went."""
        onlines = {entry.name: entry.tensor for entry in walk(self.online)}
        for entry in list(walk(self.module)):
            online = onlines.get(entry.name)
            if online is None or online is entry.tensor:
                continue
            if entry.name in self._shared:
                entry.registry[entry.key] = online
            elif not is_sharded(online):
                # A copy of the online network's dtype follows it to another; its own one stays.
                follows = entry.tensor.dtype == self._dtypes.get(entry.name)
                dtype = online.dtype if follows else entry.tensor.dtype
                if (entry.tensor.device, entry.tensor.dtype) != (online.device, dtype):
                    entry.tensor.data = entry.tensor.data.to(online.device, dtype)
        self._dtypes = {name: tensor.dtype for name, tensor in onlines.items()}
        flatten_like_(self.module, self.online)

    def _plan_updates(self, tau: Tau, masters: Mapping[str, Tensor] | None = None) -> _Plan:
        pairs = _detached(_shards(match(self.module, self.online, self._exclude)))
        rules = _rules(pairs, tau, self._policy)
        return _Plan(pairs, tau, rules, masters or {}, (self.module, self.online))


class _Plan:
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
        self.set_tau(_check_tau(tau))

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
        for call in self._calls:
            call()

    def copy(self) -> None:
        """Make every tensor equal to its online one, bit for bit."""
        for call in [call for group in self._groups for call in group.copy()]:
            call()
        if self._copied[0]:
            torch._foreach_copy_(*self._copied)

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


# By target: the online network, the options and the plan of the last soft_update.
_plans: WeakKeyDictionary[nn.Module, tuple[ref[nn.Module], object, _Plan]] = WeakKeyDictionary()


def _planned(target: nn.Module, online: nn.Module, tau: Tau, buffers: Buffers) -> _Plan:
    """The plan of two modules: the one of the last call while it still holds."""
    options = (_frozen(tau) if isinstance(tau, Mapping) else None, _frozen(buffers))
    known = _plans.get(target)
    if known is not None:
        last_online, last_options, plan = known
        if last_online() is online and last_options == options and plan.intact():
            if not isinstance(tau, Mapping):
                plan.set_tau(_check_tau(tau))
            return plan
    pairs = _detached(_shards(match(target, online)))
    plan = _Plan(pairs, tau, _rules(pairs, tau, buffers), modules=(target, online))
    _plans[target] = (ref(online), options, plan)
    return plan


def _detached(pairs: list[Pair]) -> list[Pair]:
    return [Pair(p.name, p.target.detach(), p.online.detach(), p.is_buffer) for p in pairs]


def _shards(pairs: list[Pair]) -> list[Pair]:
    """Pairs of what this process holds: all of a plain tensor, its shard of a DTensor."""
    if not any(is_sharded(pair.target) for pair in pairs):
        return pairs
    return [Pair(p.name, shard_of(p.target), shard_of(p.online), p.is_buffer) for p in pairs]


def _frozen(option: object) -> object:
    """A mapping as it is now, its order included: the last pattern that matches counts."""
    return tuple(option.items()) if isinstance(option, Mapping) else option


def _traced_pairs(
    target: nn.Module, online: nn.Module, excluded: Collection[str] = ()
) -> list[Pair]:
    """Pairs by name while torch.compile traces: memory cannot be looked at there."""
    targets = {entry.name: entry for entry in walk(target)}
    onlines = {entry.name: entry.tensor for entry in walk(online)}
    if targets.keys() != onlines.keys():
        raise ValueError(
            f"target and online must have the same names, got {[*targets]} and {[*onlines]}"
        )
    pairs: dict[int, Pair] = {}
    for name, (_, tensor, is_buffer, *_) in targets.items():
        if name in excluded:
            continue
        if tensor.shape != onlines[name].shape:
            raise ValueError(f"{name!r} must have one shape in target and online")
        if tensor is onlines[name]:
            raise ValueError(f"target {name!r} is the tensor of online: clone it")
        pairs.setdefault(id(tensor), Pair(name, tensor, onlines[name], is_buffer))
    return _detached(list(pairs.values()))


def _check_tau(tau: Tau) -> Tau:
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


def _rules(pairs: list[Pair], tau: Tau, buffers: Buffers) -> dict[str, tuple[Policy, float | None]]:
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


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _norm(tensors: list[Tensor], members: bool) -> Tensor:
    """The L2 norm over all tensors, or of each member."""
    flat = [tensor.reshape(tensor.shape[0] if members else 1, -1) for tensor in tensors]
    norms = torch.stack([torch.linalg.vector_norm(rows, dim=-1).float() for rows in flat])
    norm: Tensor = torch.linalg.vector_norm(norms, dim=0)
    return norm if members else norm.squeeze(0)


def _state(network: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a state dict by name, wrappers looked through."""
    if isinstance(network, nn.Module):
        return {entry.name: entry.tensor for entry in walk(network) if entry.is_persistent}
    if not isinstance(network, Mapping):
        raise TypeError(f"networks must be modules or mappings, got {type(network).__name__}")
    return network


def _finish_loading(target: nn.Module, _: object = None) -> None:
    # The weights came after the masters: what is planned on must be what was loaded.
    assert isinstance(target, TargetNetwork)
    target._plan = target._plan_updates(target._tau, target._loaded)
    target._loaded = {}
