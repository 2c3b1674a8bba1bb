"""The tensors of a network that are averaged, read as one vector and written back by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from polyak_rl.buffers import Buffers, choose_treatments
from polyak_rl.flat import Slot, flat_of
from polyak_rl.pairing import Entry, Watch, is_sharded, match, shard_of, sharding, unwrap, walk


class WeightVector:
    """A fixed layout of a network's averaged tensors, and one operation to read them all.

    The network is only observed. Where it is flat the vector has its layout, so that reading is one
    kernel; elsewhere tensors follow one another and reading takes one ``foreach`` call. Networks
    that are moved, cast, flattened or re-assigned later are followed; the layout stays. Of sharded
    networks it holds the shards of this process.

    Attributes:
        slots: name, shape, stride and offset of each tensor in the vector.
        size: the elements of the vector.
        dtype: float64 where the network has such tensors, else float32.
        device: where the network is now.
        storages: the addresses of the memory that the network's tensors live in.
    """

    def __init__(self, module: nn.Module, buffers: Buffers = "copy") -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"averages are of a module, got {type(module).__name__}")
        self.module = module
        self._policy = buffers
        entries = self._entries()
        if not entries:
            raise ValueError(f"{type(module).__name__} has no floating-point tensor to average")
        self.slots = self._layout(entries)
        last = self.slots[-1]
        self.size = last.offset + last.shape.numel()
        flat = self._flat_buffer()
        if flat is not None:
            self.size = flat.numel()
        double = any(entry.tensor.dtype == torch.float64 for entry in entries)
        self.dtype = torch.float64 if double else torch.float32
        self._observe(entries)

    def views(self, vector: Tensor) -> list[Tensor]:
        """The tensors inside a vector, in the order of ``slots``."""
        start = vector.storage_offset()
        return [vector.as_strided(s.shape, s.stride, start + s.offset) for s in self.slots]

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """The tensors inside a vector by name."""
        return {slot.name: view for slot, view in zip(self.slots, self.views(vector), strict=True)}

    def follow(self) -> bool:
        """Notice a network that moved; True where it did. Raises ValueError if names changed."""
        if self._watch.intact():
            return False
        entries = self._entries()
        ours = {slot.name: tuple(slot.shape) for slot in self.slots}
        theirs = {entry.name: tuple(entry.tensor.shape) for entry in entries}
        if ours != theirs:
            changed = sorted(set(ours.items()) ^ set(theirs.items()))
            raise ValueError(f"the network has changed since its average began: {changed[:4]}")
        self._observe(entries)
        return True

    def read(self, vector: Tensor, views: list[Tensor]) -> None:
        """Copy the network into a vector; ``views`` are those of this vector."""
        if self._flat is not None:
            vector.copy_(self._flat)
        else:
            torch._foreach_copy_(views, self._tensors)

    def now(self) -> Tensor:
        """The network as a new vector."""
        now = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        self.read(now, self.views(now))
        return now

    def clone(self) -> list[Tensor]:
        """The network's own tensors, copied."""
        return [tensor.clone() for tensor in self._tensors]

    @torch.no_grad()
    def restore(self, tensors: list[Tensor]) -> None:
        """Write what :meth:`clone` returned, to where the network is now."""
        self.follow()
        torch._foreach_copy_(self._tensors, tensors)

    def addresses(self) -> list[int]:
        """Where each tensor of the network lies now."""
        return [tensor.data_ptr() for tensor in self._tensors]

    @torch.no_grad()
    def write(self, vector: Tensor, module: nn.Module | None = None) -> None:
        """Copy a vector into the network, or into a module that matches it."""
        values = self.named(vector)
        if module is None:
            return self.restore(list(values.values()))
        name_of = {id(entry.tensor): entry.name for entry in self._entries()}
        for pair in match(module, self.module):
            target, online = shard_of(pair.target), shard_of(pair.online)
            if id(online) in name_of:
                target.copy_(values[name_of[id(online)]])
            elif self._policies[pair.name] == "copy":
                target.copy_(online)
        return None

    def describe(self) -> list[dict[str, Any]]:
        """The layout as plain values, for a file."""
        return [
            {
                "name": s.name,
                "shape": [*s.shape],
                "stride": [*s.stride],
                "offset": s.offset,
                "shard": self._shards[s.name],
            }
            for s in self.slots
        ]

    def from_layout(self, saved: Sequence[Mapping[str, Any]], vectors: Tensor) -> Tensor:
        """Saved vectors ``[..., size]`` in the layout of this network, tensor by tensor by name.

        Raises:
            ValueError: names, shapes or shards differ; the message names the difference.
        """
        theirs = {s["name"]: (*s["shape"], s.get("shard", "")) for s in saved}
        ours = {s.name: (*s.shape, self._shards[s.name]) for s in self.slots}
        if theirs != ours:
            changed = sorted(set(ours.items()) ^ set(theirs.items()))
            raise ValueError(f"the saved averages are of another network: {changed[:4]} differ")
        if list(saved) == self.describe() and vectors.shape[-1] == self.size:
            return vectors
        rows = vectors.reshape(-1, vectors.shape[-1])
        out = rows.new_zeros(len(rows), self.size)
        by_name = {slot["name"]: slot for slot in saved}
        for old, new in zip(rows, out, strict=True):
            for name, view in self.named(new).items():
                slot = by_name[name]
                at = old.storage_offset() + slot["offset"]
                view.copy_(old.as_strided(slot["shape"], slot["stride"], at))
        return out.reshape(*vectors.shape[:-1], self.size)

    def _entries(self) -> list[Entry]:
        """The shards of parameters and of buffers whose policy is to be averaged, ties once."""
        inside = list(walk(self.module))
        self._policies = choose_treatments([entry[:3] for entry in inside], self._policy)
        kept: dict[int, Entry] = {}
        for entry in inside:
            if self._policies[entry.name] == "average":
                kept.setdefault(id(entry.tensor), entry)
        self._shards = {entry.name: _which_shard(entry.tensor) for entry in kept.values()}
        return [entry._replace(tensor=shard_of(entry.tensor)) for entry in kept.values()]

    def _layout(self, entries: list[Entry]) -> tuple[Slot, ...]:
        flat = flat_of(unwrap(self.module))
        if flat is not None and len(flat.layout) == 1:
            (slots,) = flat.layout.values()
            if [slot.name for slot in slots] == [entry.name for entry in entries]:
                lead = () if flat.members is None else (flat.members,)
                row = () if flat.members is None else (flat.buffers[0].stride(0),)
                return tuple(
                    Slot(s.name, torch.Size((*lead, *s.shape)), (*row, *s.stride), s.offset)
                    for s in slots
                )
        slots_, offset = [], 0
        for entry in entries:
            shape = entry.tensor.shape
            stride = torch.empty(shape, device="meta").stride()
            slots_.append(Slot(entry.name, shape, stride, offset))
            offset += shape.numel()
        return tuple(slots_)

    def _flat_buffer(self) -> Tensor | None:
        """The network's own vector where it is flat in this very layout."""
        flat = flat_of(unwrap(self.module))
        if flat is None or len(flat.buffers) != 1 or self._layout(self._entries()) != self.slots:
            return None
        return flat.buffers[0].view(-1)

    def _observe(self, entries: list[Entry]) -> None:
        self._tensors = [entry.tensor.detach() for entry in entries]
        self.device = self._tensors[0].device
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in self._tensors}
        self.storages.discard(0)  # empty shards may have no memory, and so none in common
        self._flat = self._flat_buffer()
        self._watch = Watch(self.module)


def _which_shard(tensor: Any) -> str:
    """The place of this process among those that share a DTensor; nothing for other tensors."""
    if not is_sharded(tensor):
        return ""
    return f"shard {[*(tensor.device_mesh.get_coordinate() or ())]} of {sharding(tensor)}"


Which = TypeVar("Which")


class Averages(Generic[Which]):
    """What every keeper of averages can do with one of them; it gives ``vector(which)``."""

    _vector: WeightVector

    def vector(self, which: Which) -> Tensor:
        """One average as a vector in the layout of the network."""
        raise NotImplementedError

    def average(self, which: Which) -> dict[str, Tensor]:
        """One average by tensor name, in the precision in which it is kept."""
        return {name: view.clone() for name, view in self._vector.named(self.vector(which)).items()}

    @contextmanager
    def applied(self, which: Which) -> Iterator[nn.Module]:
        """The network with an average in place of its weights, which come back bit for bit.

        They come back on an exception too. May be nested. Inside, recording the network and
        stepping an optimizer of its weights raise RuntimeError, and ``state_dict()`` of the network
        or of a module around it holds the online weights.
        """
        with swapped(self._vector, self.vector(which)):
            yield self._vector.module

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
        """Write an average into another module of the same names and shapes.

        Raises:
            ValueError: the modules do not match, as in :func:`polyak_rl.soft_update`.
        """
        self._vector.write(self.vector(which), module)


_swaps: list[WeightVector] = []


def require_online(vector: WeightVector, what: str) -> None:
    """Raise RuntimeError where the network holds an average instead of its own weights."""
    if _swaps and any(vector.storages & swap.storages for swap in _swaps):
        raise RuntimeError(f"{what} inside applied(): the network holds an average there")


@contextmanager
def swapped(vector: WeightVector, values: Tensor) -> Iterator[nn.Module]:
    """The network of ``vector`` with other weights, as :meth:`AverageBank.applied` describes."""
    vector.follow()
    module = vector.module
    online = vector.clone()

    def keep_online(_: nn.Module, state: dict[str, Any], *__: object) -> None:
        vector.follow()
        saved = {at: x for at, x in zip(vector.addresses(), online, strict=True) if x.numel()}
        for key, tensor in state.items():
            address = shard_of(tensor).data_ptr() if isinstance(tensor, Tensor) else 0
            if address in saved:
                state[key] = tensor.detach().clone()
                shard_of(state[key]).copy_(saved[address])

    def refuse_step(optimizer: Optimizer, *_: object) -> None:
        stepped = {
            shard_of(p).untyped_storage().data_ptr()
            for g in optimizer.param_groups
            for p in g["params"]
        }
        if stepped & vector.storages:
            raise RuntimeError(
                "an optimizer step inside applied(): the network holds an average there, and the "
                "step would be lost"
            )

    hooks = [
        unwrap(module).register_state_dict_post_hook(keep_online),  # type: ignore[no-untyped-call]
        register_optimizer_step_pre_hook(refuse_step),
    ]
    _swaps.append(vector)
    try:
        vector.write(values)
        yield module
    finally:
        _swaps.remove(vector)
        for hook in hooks:
            hook.remove()
        vector.restore(online)
