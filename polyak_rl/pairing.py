"""Match two networks tensor by tensor, or say why not.

Everything here runs before the first write: a pairing that cannot be trusted raises a
``ValueError`` that names the tensor, and nothing has changed.

- Modules and mappings are matched by qualified name with exact shapes. Wrappers
  (``torch.compile``, DDP, FSDP, ``AveragedModel``, activation checkpoints) are looked through by
  their type, at any depth. Plain mappings have the textual prefixes of those wrappers stripped
  where that is needed to match, and are refused where it would make two names one.
- Sequences are matched by position.
- Sharded tensors (DTensor) are matched with tensors that are sharded alike. What FSDP2 gathered
  for a forward pass is put back first, so that the shards are what is read and written.
- Tied tensors are paired once. A target that shares memory with the online network, or with
  itself in part, is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import product
from operator import is_, itemgetter, le
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Network: TypeAlias = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]
"""A module, a mapping of name to tensor, or a sequence of tensors."""

# (module that defines the wrapper, its class, the attribute that holds the wrapped network)
_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "CheckpointWrapper",
        "_checkpoint_wrapped_module",
    ),
    ("torch.optim.swa_utils", "AveragedModel", "module"),
)
_START, _END = itemgetter(0), itemgetter(1)
_data_ptr = Tensor.data_ptr
_PRIVATE_NAMES = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


_T = TypeVar("_T")


class Pair(NamedTuple):
    """One tensor of the target and the tensor of the online network that it follows."""

    name: str
    target: Tensor
    online: Tensor
    is_buffer: bool


class Entry(NamedTuple):
    """A tensor inside a module, and the registry that would show its replacement."""

    name: str
    tensor: Tensor
    is_buffer: bool
    is_persistent: bool
    registry: dict[str, Tensor | None]
    key: str


class Beside(Generic[_T]):
    """One thing kept beside each module for as long as that lives.

    Modules are told apart by identity: a ``WeakKeyDictionary`` asks for their ``==``, which need
    not be a bool (TorchRL's ``TensorDictParams``).
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[ref[nn.Module], _T]] = {}

    def get(self, module: nn.Module) -> _T | None:
        """What is kept beside the module, or None."""
        known = self._kept.get(id(module))
        return known[1] if known is not None and known[0]() is module else None

    def __setitem__(self, module: nn.Module, value: _T) -> None:
        key, kept = id(module), self._kept

        def forget(gone: ref[nn.Module]) -> None:
            if key in kept and kept[key][0] is gone:
                del kept[key]

        kept[key] = (ref(module, forget), value)


def unwrap(module: nn.Module) -> nn.Module:
    """The network inside ``torch.compile``, DDP, FSDP, ``AveragedModel`` and the like."""
    while True:
        for home, class_name, attribute in _WRAPPERS:
            # A wrapper whose home was never imported cannot have an instance: no import here.
            wrapper = getattr(sys.modules.get(home), class_name, None)
            if wrapper is not None and isinstance(module, wrapper):
                module = getattr(module, attribute)
                break
        else:
            return module


def walk(module: nn.Module, prefix: str = "") -> Iterator[Entry]:
    """Every parameter and buffer by qualified name, wrappers looked through, ties kept."""
    module = unwrap(module)
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"{prefix[:-1] or type(module).__name__!r} is TorchScript, whose tensors cannot be "
            "watched: give dict(network.named_parameters()) of both networks"
        )
    if _is_fsdp(module):
        module.reshard()  # type: ignore[operator]
    for key, parameter in module._parameters.items():
        if parameter is not None:
            yield Entry(prefix + key, parameter, False, True, module._parameters, key)  # type: ignore[arg-type]
    for key, buffer in module._buffers.items():
        if buffer is not None:
            persistent = key not in module._non_persistent_buffers_set
            yield Entry(prefix + key, buffer, True, persistent, module._buffers, key)
    for key, child in module._modules.items():
        if child is not None:
            yield from walk(child, f"{prefix}{key}.")


def saved_beside(module: nn.Module) -> dict[str, Tensor]:
    """What the state dict of a module has beside its tensors: the clock of a target inside it."""
    inside = {entry.name for entry in walk(module)}
    saved = _strip("module", unwrap(module).state_dict())
    return {name: x for name, x in saved.items() if name not in inside and isinstance(x, Tensor)}


def is_sharded(tensor: object) -> bool:
    """True for a DTensor, whose class costs 0.8 s to import."""
    return hasattr(tensor, "_local_tensor")


def shard_of(tensor: Tensor) -> Tensor:
    """The shard that this process holds of a DTensor; any other tensor as it is."""
    shard: Tensor = getattr(tensor, "_local_tensor", tensor)
    return shard


def sharding(tensor: Any) -> str:
    """How a DTensor is laid out, and over which processes."""
    return f"{[*tensor.placements]} over ranks {tensor.device_mesh.mesh.tolist()}"


class Watch:
    """Notices that modules no longer hold the tensors that they were matched with.

    ``.to()``, ``.double()``, ``load_state_dict(assign=True)``, a parameter or submodule that was
    replaced, added or deleted: each makes ``intact()`` false. It costs about 0.1 microseconds a
    tensor and never touches the device. Parameters that FSDP2 gathered are put back.
    """

    def __init__(
        self, *modules: nn.Module, kinds: Iterable[str] = ("_parameters", "_buffers")
    ) -> None:
        inside = [submodule for module in modules for submodule in _submodules(module)]
        registries = [m.__dict__[kind] for m in inside for kind in ("_modules", *kinds)]
        self._empty = [registry for registry in registries if not registry]
        self._registries = [registry for registry in registries if registry]
        self._before = [dict(registry) for registry in self._registries]
        held = [(r, key, member) for r in self._registries for key, member in r.items()]
        self._tensors = [member for *_, member in held if isinstance(member, Tensor)]
        self._equal_to_others = [x for x in held if _may_equal_another(x[2])]
        self._sharded = any(map(is_sharded, self._tensors))
        self._fsdp = [ref(submodule) for submodule in inside if _is_fsdp(submodule)]
        self._places = self._find()

    def intact(self) -> bool:
        """True while the modules hold the same tensors in the same memory.

        Raises:
            ValueError: a sharded parameter is whole now, and none of the modules can put it back.
        """
        if self._sharded:
            return self._sharded_intact()
        # This runs at every update. Comparing dicts is the fastest look at all members, and ends
        # at their identity if they are the same. Others are compared by ==, which for a tensor
        # raises; a few may be equal to another one, and are looked at one by one.
        try:
            same = self._registries == self._before
        except Exception:
            return False
        if not same or any(self._empty):
            return False
        for registry, key, member in self._equal_to_others:
            if registry[key] is not member:
                return False
        return [*map(_data_ptr, self._tensors)] == self._places

    def look_again(self) -> bool:
        """Take the memory in which the tensors are now for theirs; False if they are others."""
        self._places = self._find()
        return self.intact()

    def _sharded_intact(self) -> bool:
        for module in filter(None, [reference() for reference in self._fsdp]):
            module.reshard()  # type: ignore[operator]
        for registry, before in zip(self._registries, self._before, strict=True):
            for key, now in registry.items():
                if isinstance(now, Tensor) and is_sharded(before.get(key)) > is_sharded(now):
                    raise ValueError(
                        f"{key!r} was sharded and is whole now: call reshard() on the module "
                        "around it that was given to fully_shard"
                    )
            # By identity: comparing the values of shards could start a communication.
            same = all(map(is_, registry.values(), before.values()))
            if not same or registry.keys() != before.keys():
                return False
        return not any(self._empty) and self._find() == self._places

    def _find(self) -> list[int]:
        if self._sharded:
            return [shard_of(tensor).data_ptr() for tensor in self._tensors]
        return [*map(_data_ptr, self._tensors)]


def match(
    target: Network,
    online: Network,
    exclude: Sequence[str] = (),
    *,
    keeps: Callable[[str], bool] = lambda _: False,
    writes: bool = True,
) -> list[Pair]:
    """Pair the tensors of ``target`` with those of ``online``, each target tensor once.

    Args:
        target: what is written.
        online: what is read.
        exclude: name patterns (``fnmatch``) that are left out; each must match something.
        keeps: says by name which buffers are left alone: they may differ in whatever they like,
            and are among the pairs where both networks have them.
        writes: False where the target is only compared: sharing memory does no harm then, and tied
            tensors keep all their names.

    Raises:
        ValueError: a name is missing or extra, a shape, device or kind of number differs, nothing
            matches, or memory is shared. Nothing has been written.
        TypeError: an argument is not a network, or a member of it is not a tensor.
    """
    pairs = _pair(target, online, keeps)
    require_matches("exclude", exclude, [pair.name for pair in pairs])
    if exclude:
        pairs = [pair for pair in pairs if not matches_any(pair.name, exclude)]
    positional = not isinstance(target, nn.Module | Mapping)
    if not pairs and not positional:
        raise ValueError("nothing to update: target and online have no tensor in common")
    kept = [pair for pair in pairs if pair.is_buffer and keeps(pair.name)]
    if kept:
        pairs = [pair for pair in pairs if not (pair.is_buffer and keeps(pair.name))]
    for pair in pairs:
        _check_pair(pair)
    if writes and not _apart([tensor for pair in pairs for tensor in (pair.target, pair.online)]):
        pairs = _drop_ties(pairs)
        _check_memory(pairs)
    return pairs + kept


def require_direction(pairs: Iterable[Pair]) -> None:
    """Raise where an average would go the wrong way, which training has left its marks on.

    What ``requires_grad`` says is no proof: a critic is frozen during the actor's step while its
    target never was, and a network may be set back to its target. A destination that has gradients
    and a source that neither has nor takes any are a network and its target.
    """
    pairs = [*pairs]
    trained = [pair for pair in pairs if pair.target.is_leaf and pair.target.grad is not None]
    if trained and not any(
        pair.online.requires_grad or (pair.online.is_leaf and pair.online.grad is not None)
        for pair in pairs
    ):
        raise ValueError(
            f"target {trained[0].name!r} has a gradient, and online is frozen and has none: the "
            "arguments look swapped (the destination comes first). If they are not, clear the "
            "gradients of the destination first"
        )


def detached(pairs: list[Pair]) -> list[Pair]:
    """The same pairs apart from any graph."""
    return [Pair(p.name, p.target.detach(), p.online.detach(), p.is_buffer) for p in pairs]


def shards(pairs: list[Pair]) -> list[Pair]:
    """Pairs of what this process holds: all of a plain tensor, its shard of a DTensor."""
    if not any(is_sharded(pair.target) for pair in pairs):
        return pairs
    return [Pair(p.name, shard_of(p.target), shard_of(p.online), p.is_buffer) for p in pairs]


def require_matches(argument: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Raise where a pattern matches no name: most likely it is misspelt."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"{argument} pattern {pattern!r} matches no tensor; the names are {_some(names)}"
            )


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """True where one of the patterns (``fnmatch``) matches the name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _submodules(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    inner = unwrap(module)
    if inner is not module:
        yield inner
    for child in inner._modules.values():
        if child is not None:
            yield from _submodules(child)


def _may_equal_another(member: object) -> bool:
    """True where ``==`` does not tell this member of a module from another one."""
    if isinstance(member, Tensor):
        return member.numel() == 1
    return type(member).__eq__ is not object.__eq__


def _is_fsdp(module: nn.Module) -> bool:
    """True for what ``fully_shard`` (FSDP2) was called on; without an import, as in unwrap()."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def _pair(target: Network, online: Network, keeps: Callable[[str], bool]) -> list[Pair]:
    if target is online:
        raise ValueError("target and online are the same object: an average needs two networks")
    by_name = [isinstance(network, nn.Module | Mapping) for network in (target, online)]
    if all(by_name):
        return _pair_by_name(target, online, keeps)  # type: ignore[arg-type]
    if any(by_name):
        raise TypeError(
            "target and online must both have names (modules, mappings) or both be sequences, "
            f"got {type(target).__name__} and {type(online).__name__}"
        )
    return _pair_by_position(_tensors("target", target), _tensors("online", online))


def _tensors(role: str, network: Network) -> list[Tensor]:
    if isinstance(network, Tensor) or not isinstance(network, Iterable):
        raise TypeError(
            f"{role} must be a module, a mapping of name to tensor or a sequence of tensors, "
            f"got {type(network).__name__}"
        )
    tensors: list[Any] = [*network]
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{role}[{i}] must be a tensor, got {type(tensor).__name__}")
    return tensors


def _pair_by_position(target: list[Tensor], online: list[Tensor]) -> list[Pair]:
    if len(target) != len(online):
        raise ValueError(
            f"target and online must have as many tensors, got {len(target)} and {len(online)}"
        )
    both = zip(target, online, strict=True)
    return [Pair(f"[{i}]", t, o, False) for i, (t, o) in enumerate(both)]


def _pair_by_name(
    target: nn.Module | Mapping[str, Tensor],
    online: nn.Module | Mapping[str, Tensor],
    keeps: Callable[[str], bool],
) -> list[Pair]:
    if isinstance(target, nn.Module) and isinstance(online, nn.Module):
        if unwrap(target) is unwrap(online):
            raise ValueError("target and online are the same module: an average needs two networks")
        states = False
    else:
        states = True
    targets, target_buffers, target_optional = _named("target", target, states)
    onlines, online_buffers, online_optional = _named("online", online, states)
    if targets.keys() != onlines.keys():
        if isinstance(target, Mapping):
            targets = _strip("target", targets)
        if isinstance(online, Mapping):
            onlines = _strip("online", onlines)
        # 'module' is also an honest name for a child: only what one has more of is a wrapper's.
        surplus = _depth(targets) - _depth(onlines)
        if isinstance(target, Mapping) and surplus > 0:
            targets = {name.split(".", surplus)[-1]: t for name, t in targets.items()}
        if isinstance(online, Mapping) and surplus < 0:
            onlines = {name.split(".", -surplus)[-1]: t for name, t in onlines.items()}
    buffers = target_buffers | online_buffers
    optional = target_optional | online_optional | {name for name in buffers if keeps(name)}
    missing = [name for name in targets if name not in onlines and name not in optional]
    extra = [name for name in onlines if name not in targets and name not in optional]
    if states and (missing or extra):
        for network in (target, online):
            beside = saved_beside(network) if isinstance(network, nn.Module) else ()
            missing = [name for name in missing if name not in beside]
            extra = [name for name in extra if name not in beside]
    if missing or extra:
        found = [
            f"online lacks {_some(missing)}" if missing else "",
            f"target lacks {_some(extra)}" if extra else "",
        ]
        raise ValueError(
            "target and online must have the same tensor names; "
            + " and ".join(filter(None, found))
        )
    return [
        Pair(name, tensor, onlines[name], name in buffers)
        for name, tensor in targets.items()
        if name in onlines
    ]


def _named(
    role: str, network: nn.Module | Mapping[str, Tensor], states: bool
) -> tuple[dict[str, Tensor], set[str], set[str]]:
    """Tensors by name, which of them are buffers, and which a plain mapping may lack."""
    if isinstance(network, nn.Module):
        entries = list(walk(network))
        buffers = {entry.name for entry in entries if entry.is_buffer}
        tensors = {entry.name: entry.tensor for entry in entries}
        optional = {entry.name for entry in entries if states and not entry.is_persistent}
        return tensors, buffers, optional
    tensors = {}
    for name, tensor in network.items():
        if not isinstance(name, str):
            raise TypeError(f"the names of {role} must be strings, got {name!r}")
        if not isinstance(tensor, Tensor):
            hint = ""
            if isinstance(tensor, Mapping):
                flatten = f"{role}.flatten_keys('.')"
                hint = f": give {flatten if hasattr(network, 'flatten_keys') else 'one level'}"
            raise TypeError(f"{role}[{name!r}] must be a tensor, got {type(tensor).__name__}{hint}")
        tensors[name] = tensor
    return tensors, set(), set()


def _strip(role: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the private attributes that wrappers leave in a state dict."""
    stripped: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in _PRIVATE_NAMES)
        if short in origin:
            raise ValueError(
                f"{role} names {origin[short]!r} and {name!r} are one name ({short!r}) once the "
                "prefixes of wrappers are stripped"
            )
        origin[short] = name
        stripped[short] = tensor
    return stripped


def _depth(names: Collection[str]) -> int:
    """How many times ``module.`` stands before every name: DDP and DataParallel put it there."""
    depth = 0
    while names and all(name.startswith("module." * (depth + 1)) for name in names):
        depth += 1
    return depth


def _some(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _check_pair(pair: Pair) -> None:
    name, target, online, _ = pair
    if is_lazy(target) or is_lazy(online):
        raise ValueError(f"{name!r} is not initialised yet: run one batch through both networks")
    if target.shape != online.shape:
        raise ValueError(
            f"{name!r} must have one shape, got {tuple(target.shape)} in target and "
            f"{tuple(online.shape)} in online"
        )
    device = target.device
    if device != online.device:
        raise ValueError(
            f"{name!r} must be on one device, got {device} in target and {online.device} in online"
        )
    if device.type == "meta":
        raise ValueError(f"{name!r} is on the meta device and has no values")
    if target.layout is not torch.strided or online.layout is not torch.strided:
        raise ValueError(
            f"{name!r} must be dense, got {target.layout} in target and {online.layout} in online"
        )
    sharded = is_sharded(target)
    if sharded != is_sharded(online):
        raise ValueError(
            f"{name!r} must be sharded in both networks or in neither, got it sharded in "
            f"{'target' if sharded else 'online'} only"
        )
    if sharded and sharding(target) != sharding(online):
        raise ValueError(
            f"{name!r} must be sharded alike in both networks, got {sharding(target)} in target "
            f"and {sharding(online)} in online"
        )
    if target.dtype is not online.dtype and _kind(target) != _kind(online):
        raise ValueError(
            f"{name!r} must hold one kind of number, got {target.dtype} in target and "
            f"{online.dtype} in online"
        )


def _kind(tensor: Tensor) -> object:
    """What may be converted: between real precisions and between complex ones, nothing else."""
    if tensor.is_floating_point():
        return "real"
    return "complex" if tensor.is_complex() else tensor.dtype


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Where a tensor's values are: equal for two views that show the same values."""
    shard = shard_of(tensor)
    return (shard.data_ptr(), tuple(shard.shape), shard.stride(), shard.dtype)


def _drop_ties(pairs: list[Pair]) -> list[Pair]:
    """Tied tensors once; a tie that the online network does not have is refused."""
    kept: dict[tuple[object, ...], Pair] = {}
    for pair in pairs:
        if shard_of(pair.target).numel() == 0:
            continue
        first = kept.setdefault(_place(pair.target), pair)
        if first is not pair and _place(first.online) != _place(pair.online):
            raise ValueError(
                f"target {first.name!r} and {pair.name!r} are one tensor, but online has two"
            )
    return list(kept.values())


def _check_memory(pairs: list[Pair]) -> None:
    """Refuse a target that shares bytes with the online network or, in part, with itself."""
    shared = find_overlap(
        [(pair.name, pair.target) for pair in pairs], [(pair.name, pair.online) for pair in pairs]
    )
    if shared is None:
        return
    mine, theirs, with_online = shared
    if not with_online:
        raise ValueError(f"target {mine!r} and {theirs!r} overlap in memory")
    raise ValueError(
        f"target {mine!r} shares memory with online {theirs!r}: updating it would change "
        "the online network. Clone it, or exclude it where sharing is meant"
    )


def find_overlap(
    written: Iterable[tuple[str, Tensor]], read: Iterable[tuple[str, Tensor]] = ()
) -> tuple[str, str, bool] | None:
    """Two names whose tensors share bytes, the first one written, and whether the other is read.

    Tensors that are only read may share memory with each other.
    """
    blocks = [(*block, True, name) for name, tensor in written for block in _blocks(tensor)]
    blocks += [(*block, False, name) for name, tensor in read for block in _blocks(tensor)]
    blocks.sort()
    written_end, read_end = -1, -1  # the last byte that either reaches so far, and whose it is
    writer = reader = ""
    for start, end, is_written, name in blocks:
        if start < written_end:
            return (writer, name, not is_written)
        if is_written:
            if start < read_end:
                return (name, reader, True)
            written_end, writer = end, name
        elif end > read_end:
            read_end, reader = end, name
    return None


def _apart(tensors: Iterable[Tensor]) -> bool:
    """True where no two tensors share a byte: each block ends before the next one starts."""
    blocks = sorted([block for tensor in tensors for block in _blocks(tensor)])
    return all(map(le, map(_END, blocks), map(_START, blocks[1:])))


def _blocks(tensor: Tensor) -> list[tuple[int, int]]:
    """The address ranges that a tensor fills: one if it is dense, else one a row."""
    local = getattr(tensor, "_local_tensor", tensor)
    base = local.data_ptr()
    if not local.is_cpu:
        # Addresses of two devices may coincide: keep them apart.
        base += (1 + (local.device.index or 0)) << 64
    if local.is_contiguous():
        length = local.nbytes
        return [(base, base + length)] if length else []
    size, dense = local.element_size(), 1
    outer: list[Iterable[int]] = []
    for stride, n in sorted(zip(local.stride(), local.shape, strict=True)):
        if n > 1 and stride == dense and not outer:
            dense *= n
        elif n > 1:
            outer.append(range(0, n * stride, stride) if stride else [0] * n)
    starts = (base + sum(offsets) * size for offsets in product(*outer))
    return [(start, start + dense * size) for start in starts]
