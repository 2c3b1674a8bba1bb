"""Target networks: ``theta' <- tau theta + (1 - tau) theta'``, safely and in one kernel.

``tau`` always is the weight of the **online** network, and the destination always comes first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from operator import setitem
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from polyak_rl.buffers import Buffers, keeps
from polyak_rl.flat import flatten_like_, lasting
from polyak_rl.guard import Guard, all_finite, check_guard, is_capturing
from polyak_rl.pairing import (
    Beside,
    Network,
    Pair,
    detached,
    is_sharded,
    match,
    matches_any,
    require_direction,
    require_matches,
    saved_beside,
    shards,
    unwrap,
    walk,
)
from polyak_rl.rules import require_int
from polyak_rl.update import Plan, Tau, Terms, check_tau, terms_of


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

    Under ``torch.compile`` give modules, and one ``tau`` and treatment instead of patterns
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
        tau = check_tau(tau)
        with torch.no_grad():
            pairs = _pairs(target, online, tau, buffers)
            Plan(pairs, tau, terms_of(pairs, tau, buffers)).apply()
    elif torch.compiler.is_compiling():
        tau = check_tau(tau)
        pairs = _traced_pairs(target, online, lambda _, is_buffer: is_buffer and buffers == "keep")
        Plan(pairs, tau, terms_of(pairs, tau, buffers)).apply()
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


@torch.inference_mode(False)
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
        New contiguous tensors with the names, dtypes and device of the first network, summed in
        float64, ready for ``load_state_dict`` and safetensors: non-persistent buffers of modules
        are left out. Integer and boolean tensors are copies of the first network's.

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
            average[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
            continue
        exact = torch.complex128 if tensor.is_complex() else torch.float64
        total = tensor.detach().to(exact) * weights[0]
        for other, weight in zip(others, weights[1:], strict=True):
            total += other[i].detach().to(exact) * weight
        average[name] = total.to(tensor.dtype).contiguous()
    return average


class _Unplanned(NamedTuple):
    """What is left of a plan where its networks were loaded or copied: enough to make it again."""

    tau: Tau
    terms: Mapping[str, Terms]
    masters: Mapping[str, Tensor]

    def intact(self) -> bool:
        return False


class TargetNetwork(nn.Module):
    """A frozen copy of a network that follows it: the target network of DQN, DDPG, TD3 and SAC.

    .. math:: \\theta' \\leftarrow \\tau\\,\\theta + (1 - \\tau)\\,\\theta'
       \\quad\\text{at every } N\\text{-th call of update()}

    The copy lies on the device of the online network, does not require grad and stays in eval mode
    whatever mode its parent is put in. Calling the target calls the copy, and an attribute or item
    that the target does not have is read from the copy: ``target.q``, ``target.get_action(x)``,
    ``target["actor"]``. What is set is set on the target alone.

    Noise layers are silent in eval mode: ``target.module.train()`` wakes them, until ``train()`` or
    ``eval()`` is called on the target or around it. Their noise is a buffer and copied at each
    firing; ``buffers={"*epsilon*": "keep"}`` leaves the target its own.

    The state dict is that of the copy, under ``module.``, with ``clock``, ``skipped`` and the
    float32 masters as tensors.

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
        self._buffer_treatment = buffers
        tau = check_tau(tau)
        self._online = (online,)  # a tuple, so that it is not a submodule
        self._clock = self.skipped = 0
        self._guarded = check_guard(guard, online.parameters())
        with lasting():
            self._build(online, target, tau)

    def _build(self, online: nn.Module, target: nn.Module | None, tau: Tau) -> None:
        # What torch.compile traces counts in a tensor: to it an int is a constant.
        self._traced_clock = torch.zeros((), dtype=torch.int64, device="cpu")
        if target is None:
            target = self._copy(online)
        match(target, online, self._exclude, keeps=keeps(self._buffer_treatment))
        onlines = {entry.name: entry.tensor for entry in walk(online)}
        self._dtypes = {name: tensor.dtype for name, tensor in onlines.items()}
        self._shared = {e.name for e in walk(target) if e.tensor is onlines.get(e.name)}
        self._excluded = {e.name for e in walk(target) if matches_any(e.name, self._exclude)}
        for entry in walk(target):
            if not entry.is_buffer and entry.name not in self._excluded:
                entry.tensor.requires_grad_(False)
        flatten_like_(target, online)
        self.module = target.eval()
        self._plan: Plan | _Unplanned = self._plan_updates(tau)
        self.sync()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the copy."""
        return self._modules["module"](*args, **kwargs)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        """Read from the copy what the target itself does not have."""
        copied = self.__dict__.get("_modules", {}).get("module")
        if name == "module" and copied is not None:
            return copied
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Special methods are the business of a type: copying would ask for the copy's own.
            if copied is None or (name.startswith("__") and name.endswith("__")):
                raise
        return getattr(copied, name)

    def __getitem__(self, key: Any) -> Any:
        """Read an item of the copy: a layer of a ``Sequential``, a network of a ``ModuleDict``."""
        copied: Any = self.module
        return copied[key]

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the copy."""
        copied: Any = self.module
        return iter(copied)

    @property
    def online(self) -> nn.Module:
        """The network that is followed."""
        return self._online[0]

    @property
    def tau(self) -> Tau:
        """The weight of the online network at each firing."""
        return self._plan.tau

    @tau.setter
    def tau(self, tau: Tau) -> None:
        tau, plan = check_tau(tau), self._plan
        by_pattern = isinstance(tau, Mapping) or isinstance(plan.tau, Mapping)
        if by_pattern or isinstance(plan, _Unplanned):
            with lasting():
                self._plan = self._plan_updates(tau, plan.masters)
        else:
            plan.set_tau(tau)

    @property
    def clock(self) -> int:
        """How often :meth:`update` was called."""
        return self._clock + int(self._traced_clock)

    def update(self) -> None:
        """Count one gradient step, and at every N-th move the copy towards the online network.

        No allocation and no synchronisation with the device. In a captured CUDA graph ``every``
        must be 1, since what is recorded does not count: a replay does not advance ``clock``.

        Raises:
            ValueError: the online network no longer matches the copy. Nothing moved or counted.
            RuntimeError: a CUDA graph is being captured, and ``every`` or ``guard`` are not what
                can be in one.
        """
        compiling = torch.compiler.is_compiling()
        if (self.every != 1 or self._guarded) and not compiling and is_capturing():
            raise RuntimeError(
                "a TargetNetwork can be captured in a CUDA graph with every=1 and guard=None, got "
                f"every={self.every} and guard={'finite' if self._guarded else None!r}: a replay "
                "neither counts nor reads"
            )
        if self.every != 1 and (self.clock + 1) % self.every:
            if compiling:
                self._traced_clock.add_(1)
            else:  # an assignment would pass nn.Module's checks, at 1.4 us
                self.__dict__["_clock"] = self._clock + 1
            return
        plan = self._plan
        if compiling or isinstance(plan, _Unplanned) or not plan.intact():
            plan = self._current_plan()
        if self._guarded and not all_finite(
            [pair.online for pair in plan.pairs if plan.terms[pair.name].treatment != "keep"]
        ):
            self.skipped += 1
            return
        if compiling:
            plan.apply(partial(self._traced_clock.add_, 1))
        else:
            plan.apply(partial(setitem, self.__dict__, "_clock", self._clock + 1))

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
        plan = self._current_plan()
        plan.require_online("TargetNetwork.lag()")
        pairs = [pair for pair in plan.pairs if not pair.is_buffer]
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

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the copy, the clock and the masters: all of it or, where it is refused, nothing.

        Args:
            state_dict: what ``state_dict()`` returned; masters may be left out, and start anew.
            strict: whether other names are refused.
            assign: as in ``torch.nn.Module.load_state_dict``.

        Raises:
            ValueError: names, shapes, the clock or the masters are not those of this target.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(
                f"a state is a mapping of name to tensor, got {type(state_dict).__name__}"
            )
        ours = {name for name in self.state_dict() if not name.startswith("masters.")}
        theirs = {name for name in _current_state(state_dict) if not name.startswith("masters.")}
        if strict and ours != theirs:
            raise ValueError(
                f"the state is of another target: it lacks {sorted(ours - theirs)} and has "
                f"{sorted(theirs - ours)} beside"
            )
        return super().load_state_dict(state_dict, strict, assign)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("clock", "skipped"):
            destination[prefix + name] = torch.tensor(getattr(self, name), device="cpu")
        for name, master in self._plan.masters.items():
            destination[f"{prefix}masters.{name}"] = master

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *found: Any
    ) -> None:
        # torch loads the copy after this, from state_dict; what is refused is refused before.
        mine = _current_state(
            {k[len(prefix) :]: x for k, x in state_dict.items() if k.startswith(prefix)}
        )
        masters = {k[len("masters.") :]: x for k, x in mine.items() if k.startswith("masters.")}
        _check_masters(masters, self._current_plan().masters)
        for entry in walk(self.module, "module."):
            _check_saved(entry.name, mine.get(entry.name, entry.tensor), entry.tensor)
        counts = {name: _check_count(name, mine.get(name, 0)) for name in ("clock", "skipped")}
        found[0].extend(prefix + name for name in counts if name not in mine)
        left = {k: x for k, x in state_dict.items() if k.startswith(prefix + "module.")}
        super()._load_from_state_dict(left, prefix, metadata, strict, *found)
        self._plan = _Unplanned(self.tau, self._plan.terms, masters)
        self._traced_clock.zero_()
        self.__dict__.update(_clock=counts["clock"], skipped=counts["skipped"])

    def __getstate__(self) -> dict[str, Any]:
        # A plan points into memory: a copy makes its own.
        plan = self._plan
        return {**self.__dict__, "_plan": _Unplanned(plan.tau, plan.terms, plan.masters)}

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

    def _current_plan(self) -> Plan:
        plan = self._plan
        if torch.compiler.is_compiling():
            # What is traced reads the modules anew: a plan would keep tensors that are gone later.
            kept = {name for name, how in plan.terms.items() if how.treatment == "keep"}
            left_out = self._excluded | kept
            pairs = _traced_pairs(self.module, self.online, lambda name, _: name in left_out)
            return Plan(pairs, plan.tau, plan.terms, plan.masters)
        if isinstance(plan, _Unplanned) or not plan.intact():
            with lasting():
                self._follow()
                plan = self._plan = self._plan_updates(plan.tau, plan.masters)
        return plan

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

    def _plan_updates(self, tau: Tau, masters: Mapping[str, Tensor] | None = None) -> Plan:
        buffers = self._buffer_treatment
        pairs = match(self.module, self.online, self._exclude, keeps=keeps(buffers))
        pairs = detached(shards(pairs))
        terms = terms_of(pairs, tau, buffers)
        return Plan(pairs, tau, terms, masters or {}, (self.module, self.online))


# By target: the online network, the options and the plan of the last soft_update.
_plans: Beside[tuple[ref[nn.Module], object, Plan]] = Beside()


def _planned(target: nn.Module, online: nn.Module, tau: Tau, buffers: Buffers) -> Plan:
    """The plan of two modules: the one of the last call while it still holds."""
    options = (_frozen(tau) if isinstance(tau, Mapping) else _is_copy(tau), _frozen(buffers))
    known = _plans.get(target)
    if known is not None:
        last_online, last_options, plan = known
        if last_online() is online and last_options == options and plan.intact():
            if type(tau) is not float or type(plan.tau) is not float or tau != plan.tau:
                plan.set_tau(check_tau(tau))
            return plan
    tau = check_tau(tau)
    with lasting():
        pairs = detached(_pairs(target, online, tau, buffers))
        plan = Plan(pairs, tau, terms_of(pairs, tau, buffers), modules=(target, online))
    _plans[target] = (ref(online), options, plan)
    return plan


def _pairs(target: Network, online: Network, tau: Tau, buffers: Buffers) -> list[Pair]:
    pairs = match(target, online, keeps=keeps(buffers))
    if not _is_copy(tau):
        require_direction(pairs)
    return shards(pairs)


def _is_copy(tau: Tau) -> bool:
    return not isinstance(tau, Tensor | Mapping) and tau == 1


def _frozen(option: object) -> object:
    """A mapping as it is now, its order included: the last pattern that matches counts."""
    return tuple(option.items()) if isinstance(option, Mapping) else option


def _traced_pairs(
    target: nn.Module, online: nn.Module, left_out: Callable[[str, bool], bool]
) -> list[Pair]:
    """Pairs by name while torch.compile traces: memory cannot be looked at there."""
    targets = {e.name: e for e in walk(target) if not left_out(e.name, e.is_buffer)}
    onlines = {e.name: e.tensor for e in walk(online) if not left_out(e.name, e.is_buffer)}
    if targets.keys() != onlines.keys():
        raise ValueError(
            f"target and online must have the same names, got {[*targets]} and {[*onlines]}"
        )
    pairs: dict[int, Pair] = {}
    for name, (_, tensor, is_buffer, *_) in targets.items():
        if tensor.shape != onlines[name].shape:
            raise ValueError(f"{name!r} must have one shape in target and online")
        if tensor is onlines[name]:
            raise ValueError(f"target {name!r} is the tensor of online: clone it")
        pairs.setdefault(id(tensor), Pair(name, tensor, onlines[name], is_buffer))
    return detached(list(pairs.values()))


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
        own = {entry.name: entry.tensor for entry in walk(network) if entry.is_persistent}
        return own | saved_beside(network)
    if not isinstance(network, Mapping):
        raise TypeError(f"networks must be modules or mappings, got {type(network).__name__}")
    return network


def _current_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of a target as it is saved now; before, what is no weight was in one mapping."""
    beside = state.get("_extra_state")
    if not isinstance(beside, Mapping):
        return state
    masters = {f"masters.{name}": x for name, x in beside.get("masters", {}).items()}
    counts = {name: beside.get(name, 0) for name in ("clock", "skipped")}
    return {n: x for n, x in state.items() if n != "_extra_state"} | counts | masters


def _check_count(name: str, value: object) -> int:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise ValueError(f"{name} must be a whole number of at least 0, got {value!r}")
    return value


def _check_masters(masters: Mapping[str, Any], ours: Mapping[str, Tensor]) -> None:
    if masters and masters.keys() != ours.keys():
        raise ValueError(f"the saved masters {[*masters]} do not fit this target's {[*ours]}")
    for name, master in masters.items():
        _check_saved(f"masters.{name}", master, ours[name])


def _check_saved(name: str, saved: object, ours: Tensor) -> None:
    if not isinstance(saved, Tensor):
        raise ValueError(f"{name!r} must be a tensor, got {type(saved).__name__}")
    castable = saved.is_complex() == ours.is_complex()
    if saved.layout is not torch.strided or saved.is_meta or not castable:
        raise ValueError(
            f"{name!r} must be dense and {ours.dtype}, or what can be cast to that, got "
            f"{saved.layout} {saved.dtype} on {saved.device}"
        )
    if saved.shape != ours.shape:
        raise ValueError(
            f"{name!r} must have the shape {tuple(ours.shape)}, got {tuple(saved.shape)}"
        )
