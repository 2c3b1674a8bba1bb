"""The tensors of a network that are averaged, read as one vector and written back by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from polyak_rl.buffers import Buffers, Treatment, choose_treatments
from polyak_rl.flat import flat_of
from polyak_rl.pairing import Entry, Watch, is_sharded, match, shard_of, sharding, unwrap, walk
from polyak_rl.swap import Swap, require_online, swaps

_LARGEST = 1 << 53  # no clock reaches it


class Place(NamedTuple):
    """Where a tensor lies in the vector: its offset in real numbers, its stride in its own."""

    name: str
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    is_complex: bool

    def view(self, vector: Tensor) -> Tensor:
        """The tensor inside a vector."""
        start = vector.storage_offset() + self.offset
        if not self.is_complex:
            return vector.as_strided(self.shape, self.stride, start)
        stride = [2 * step for step in self.stride]
        return torch.view_as_complex(vector.as_strided((*self.shape, 2), (*stride, 1), start))


class WeightVector:
    """A fixed layout of a network's averaged tensors, and one operation to read them all.

    The network is only observed. Where it is flat the vector has its layout, so that reading is one
    kernel; elsewhere tensors follow one another and reading takes one ``foreach`` call. Networks
    that are moved, cast, flattened or re-assigned later are followed; the layout stays. Of sharded
    networks it holds the shards of this process. A complex number is two real ones.

    Attributes:
        slots: name, shape, stride and offset of each tensor in the vector.
        size: the real numbers of the vector.
        dtype: float64 where the network has numbers of such precision, else float32.
        device: where the network is now.
        flat: the network itself as such a vector, where it is flat in this layout, else None.
    """

    def __init__(self, module: nn.Module, buffers: Buffers = "copy") -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"averages are of a module, got {type(module).__name__}")
        if any(isinstance(inner, torch.jit.ScriptModule) for inner in module.modules()):
            raise ValueError("TorchScript networks cannot be averaged: average the eager module")
        self.module = module
        self._buffers = buffers
        entries = self._entries()
        if not entries:
            raise ValueError(f"{type(module).__name__} has no floating-point tensor to average")
        for entry in entries:
            if is_lazy(entry.tensor):
                raise ValueError(
                    f"{entry.name!r} is not initialised yet: run one batch through the network"
                )
            if entry.tensor.layout is not torch.strided:
                raise ValueError(f"{entry.name!r} must be dense, got {entry.tensor.layout}")
            if entry.tensor.device.type == "meta":
                raise ValueError(f"{entry.name!r} is on the meta device and has no values")
        self.slots = self._layout(entries)
        last = self.slots[-1]
        self.size = last.offset + last.shape.numel() * (1 + last.is_complex)
        flat = self._flat_buffer()
        if flat is not None:
            self.size = flat.numel()
        self.size += self.size % 2 * any(slot.is_complex for slot in self.slots)
        double = any(entry.tensor.dtype in (torch.float64, torch.complex128) for entry in entries)
        self.dtype = torch.float64 if double else torch.float32
        self._watch: Watch | None = None
        self.follow()

    def __getstate__(self) -> dict[str, Any]:
        # What is found in the module is found anew: a pickle would part it from the module.
        found = ("_watch", "_tensors", "_named", "flat", "_shards", "_treatments", "device")
        return {key: x for key, x in vars(self).items() if key not in found} | {"_watch": None}

    def views(self, vector: Tensor) -> list[Tensor]:
        """The tensors inside a vector, in the order of ``slots``."""
        return [slot.view(vector) for slot in self.slots]

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """The tensors inside a vector by name."""
        return {slot.name: slot.view(vector) for slot in self.slots}

    def follow(self) -> None:
        """Notice a network that moved. Raises ValueError if names or shapes changed."""
        if self._watch is not None and self._watch.intact():
            return
        found = {entry.name: entry.tensor for entry in self._entries()}
        ours = {slot.name: (tuple(slot.shape), slot.is_complex) for slot in self.slots}
        theirs = {n: (tuple(shard_of(x).shape), x.is_complex()) for n, x in found.items()}
        if ours != theirs:
            changed = sorted(set(ours.items()) ^ set(theirs.items()))
            raise ValueError(f"the network has changed since its average began: {changed[:4]}")
        self._named = {slot.name: found[slot.name] for slot in self.slots}
        self._tensors = [shard_of(tensor).detach() for tensor in self._named.values()]
        self.device = self._tensors[0].device
        self.flat = self._flat_buffer()
        self._watch = Watch(self.module)

    def require_online(self, what: str) -> None:
        """Raise RuntimeError where the network holds an average instead of its own weights."""
        if swaps and self._watch is not None:
            require_online(what, self._tensors)

    def read(self, vector: Tensor, views: list[Tensor]) -> None:
        """Copy the network into a vector; ``views`` are those of this vector."""
        if self.flat is not None:
            vector.copy_(self.flat)
        else:
            torch._foreach_copy_(views, self._tensors)

    def now(self) -> Tensor:
        """The network as a new vector."""
        self.follow()
        self.require_online("reading the last iterate")
        now = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        self.read(now, self.views(now))
        return now

    def clone(self) -> dict[str, Tensor]:
        """The network's own tensors, copied."""
        self.follow()
        self.require_online("reading the last iterate")
        plain = torch.contiguous_format
        return {n: shard_of(x).detach().clone(memory_format=plain) for n, x in self._named.items()}

    def swap(self, swap: Swap, vector: Tensor) -> None:
        """Put a vector in place of the network's weights until ``swap.leave()``."""
        self.follow()
        swap.enter(self._named, self.views(vector))

    @torch.no_grad()
    def write(self, vector: Tensor, module: nn.Module) -> None:
        """Copy a vector into a module that matches the network, or into the network itself."""
        self.follow()
        values = self.named(vector)
        if unwrap(module) is unwrap(self.module):
            torch._foreach_copy_(self._tensors, list(values.values()))
            return
        ours, theirs = (
            {entry.name: entry for entry in walk(network)} for network in (self.module, module)
        )
        policies = self._choose([*ours.values(), *(theirs[n] for n in theirs if n not in ours)])
        kept = {name for name, policy in policies.items() if policy == "keep"}
        name_of = {id(entry.tensor): name for name, entry in reversed(ours.items())}
        pairs = match(
            {name: entry.tensor for name, entry in theirs.items() if name not in kept},
            {name: entry.tensor for name, entry in ours.items() if name not in kept},
        )
        for pair in pairs:
            target, online = shard_of(pair.target).detach(), shard_of(pair.online)
            name = name_of[id(pair.online)]
            target.copy_(values.get(name, online))

    def describe(self) -> list[dict[str, Any]]:
        """The layout as plain values, for a file."""
        self.follow()
        return [
            {
                "name": s.name,
                "shape": [*s.shape],
                "stride": [*s.stride],
                "offset": s.offset,
                "shard": self._shards[s.name],
                **({"complex": True} if s.is_complex else {}),
            }
            for s in self.slots
        ]

    def from_layout(self, saved: Sequence[Mapping[str, Any]], vectors: Tensor) -> Tensor:
        """Saved vectors ``[..., size]`` in the layout of this network, tensor by tensor by name.

        Raises:
            ValueError: names, shapes or shards differ; the message names the difference.
        """
        ours = self.describe()
        if list(saved) == ours and vectors.shape[-1] == self.size:
            return vectors
        places = {
            s["name"]: Place(
                s["name"],
                torch.Size(s["shape"]),
                tuple(s["stride"]),
                s["offset"],
                s.get("complex", False),
            )
            for s in saved
        }
        differ = {
            (s["name"], (*s["shape"], s.get("shard", ""), s.get("complex", False))) for s in saved
        } ^ {(s["name"], (*s["shape"], s["shard"], s.get("complex", False))) for s in ours}
        if differ:
            raise ValueError(f"the saved averages are of another network: {sorted(differ)[:4]}")
        rows = vectors.reshape(-1, vectors.shape[-1])
        out = rows.new_zeros(len(rows), self.size)
        for old, new in zip(rows, out, strict=True):
            own = old.clone()  # in memory of its own, so that no place can lie outside of it
            for name, view in self.named(new).items():
                view.copy_(places[name].view(own))
        return out.reshape(*vectors.shape[:-1], self.size)

    def _entries(self) -> list[Entry]:
        """Parameters and buffers whose policy is to be averaged, ties once."""
        inside = list(walk(self.module))
        self._treatments = self._choose(inside)
        kept: dict[int, Entry] = {}
        for entry in inside:
            if self._treatments[entry.name] == "average":
                kept.setdefault(id(entry.tensor), entry)
        self._shards = {entry.name: _which_shard(entry.tensor) for entry in kept.values()}
        return list(kept.values())

    def _choose(self, entries: Sequence[Entry]) -> dict[str, Treatment]:
        # Buffers that are None so far have a name too, which a pattern may mean.
        to_come = [
            (f"{prefix}.{key}".lstrip("."), torch.empty(0, device="cpu"), True)
            for prefix, inner in unwrap(self.module).named_modules()
            for key, buffer in inner._buffers.items()
            if buffer is None
        ]
        return choose_treatments([*(entry[:3] for entry in entries), *to_come], self._buffers)

    def _layout(self, entries: list[Entry]) -> tuple[Place, ...]:
        flat = flat_of(unwrap(self.module))
        if flat is not None and len(flat.layout) == 1 and not flat.buffers[0].is_complex():
            (slots,) = flat.layout.values()
            if [slot.name for slot in slots] == [entry.name for entry in entries]:
                lead = () if flat.members is None else (flat.members,)
                row = () if flat.members is None else (flat.buffers[0].stride(0),)
                return tuple(
                    Place(s.name, torch.Size((*lead, *s.shape)), (*row, *s.stride), s.offset, False)
                    for s in slots
                )
        places, offset = [], 0
        for entry in entries:
            shape, is_complex = shard_of(entry.tensor).shape, entry.tensor.is_complex()
            stride = torch.empty(shape, device="meta").stride()
            offset += offset % 2 * is_complex  # a view of complex numbers begins at an even one
            places.append(Place(entry.name, shape, stride, offset, is_complex))
            offset += shape.numel() * (1 + is_complex)
        return tuple(places)

    def _flat_buffer(self) -> Tensor | None:
        """The network's own vector where it is flat in this very layout."""
        flat = flat_of(unwrap(self.module))
        if flat is None or len(flat.buffers) != 1 or flat.buffers[0].is_complex():
            return None
        same = self._layout(self._entries()) == self.slots
        return flat.buffers[0].view(-1) if same else None


def _which_shard(tensor: Any) -> str:
    """The place of this process among those that share a DTensor; nothing for other tensors."""
    if not is_sharded(tensor):
        return ""
    return f"shard {[*(tensor.device_mesh.get_coordinate() or ())]} of {sharding(tensor)}"


def check_clock(state: Mapping[str, Any], key: str, least: int = 0) -> int:
    """A whole number of a saved state; ValueError where it is none, or out of range."""
    value = state[key]
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < _LARGEST:
        raise ValueError(f"the saved {key} must be a whole number from {least} on, got {value!r}")
    return value


def check_vectors(state: Mapping[str, Any], key: str, shape: Sequence[int]) -> Tensor:
    """Finite vectors of a saved state; all of ``[*shape, any size]``, or ValueError."""
    value = state[key]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ValueError(f"the saved {key} must be a tensor of real numbers, got {type(value)}")
    if value.dim() != len(shape) + 1 or [*value.shape[:-1]] != [*shape]:
        raise ValueError(f"the saved {key} must be {[*shape, '...']}, got {[*value.shape]}")
    if value.layout is not torch.strided or not bool(value.isfinite().all()):
        raise ValueError(f"the saved {key} must be finite")
    return value


Keeper = TypeVar("Keeper")


def twin(keeper: Keeper) -> Keeper:
    """Another one with the same attributes, to change and then take over as a whole."""
    other = object.__new__(type(keeper))
    vars(other).update(vars(keeper))
    return other


Which = TypeVar("Which")


class Averages(Generic[Which]):
    """What every keeper of averages can do with one of them; it gives ``vector(which)``."""

    _vector: WeightVector

    def vector(self, which: Which) -> Tensor:
        """One average as a vector in the layout of the network."""
        raise NotImplementedError

    @torch.inference_mode(False)
    @torch.no_grad()
    def average(self, which: Which) -> dict[str, Tensor]:
        """One average by tensor name, in the precision in which it is kept.

        The tensors are plain, contiguous and share no memory: ``safetensors.torch.save_file`` takes
        them as they are, and ``load_state_dict(..., strict=False)`` of the network too.
        """
        named = self._vector.named(self.vector(which))
        return {n: x.clone(memory_format=torch.contiguous_format) for n, x in named.items()}

    @contextmanager
    def applied(self, which: Which) -> Iterator[nn.Module]:
        """The network with an average in place of its weights, which come back bit for bit.

        They come back on an exception too. May be nested. Inside, what would take the average for
        the network's own weights raises RuntimeError, here and in any other module that shares its
        tensors: ``state_dict()`` and ``load_state_dict()``, steps of their optimizer, recording,
        and updates of a target. ``parameters()`` and copies have the average.

        Raises:
            RuntimeError: another thread is in such a block of the network. On leaving: blocks are
                left in another order than they were entered, or a layer was replaced; the message
                says what is where.
        """
        swap = Swap(self._vector.module)
        try:
            try:
                self._vector.swap(swap, self.vector(which))
                yield self._vector.module
            finally:
                swap.leave()
        finally:
            swap.leave()  # where an interrupt has cut the first short; else it does nothing

    @torch.inference_mode(False)
    @torch.no_grad()
    def module(self, which: Which) -> nn.Module:
        """An independent copy of the network that holds an average.

        Raises:
            ValueError: the network cannot be deep-copied; build a second one and use ``copy_to``.
        """
        network = unwrap(self._vector.module)
        try:
            twin = copy.deepcopy(network)
        except Exception as error:
            raise ValueError(
                f"{type(network).__name__} cannot be deep-copied ({error}): build a second one and "
                "give it to copy_to"
            ) from error
        self._vector.write(self.vector(which), twin)
        return twin

    def copy_to(self, which: Which, module: nn.Module) -> None:
        """Write an average into another module of the same names and shapes, or the network itself.

        Raises:
            RuntimeError: the network holds an average, inside :meth:`applied`.
            ValueError: the modules do not match, as in :func:`polyak_rl.soft_update`.
        """
        self._vector.require_online("copy_to()")
        self._vector.write(self.vector(which), module)
