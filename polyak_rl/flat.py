"""Lay a network's parameters in one buffer, so that an operation over all of them is one kernel."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from polyak_rl.pairing import Beside, Entry, Pair, Watch, find_overlap, unwrap, walk

ALIGNMENT = 64  # bytes; a view off 16 bytes changes the bits of some matrix products
_ROW = 256  # bytes; whole vectors of any width, so that no element's bits depend on its neighbours

_flat: Beside[Flat] = Beside()


class Slot(NamedTuple):
    """Where one parameter lies in its buffer, counted in elements of a member's row."""

    name: str
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class FlatParameter(nn.Parameter):
    """All parameters of one dtype and device as one ``[P]`` or ``[members, P]`` tensor.

    Give it to the optimizer in place of ``module.parameters()``: one tensor, one kernel. Its
    gradient is the buffer that ``backward()`` fills; ``zero_grad`` clears it in place. A parameter
    that had no gradient counts as one with a gradient of zero.

    Example:
        >>> import torch
        >>> network = torch.nn.Linear(3, 2)
        >>> (parameter,) = flatten_(network).parameters
        >>> network(torch.ones(1, 3)).sum().backward()
        >>> parameter.grad.sum().item()      # six weights and two biases, each with a gradient of 1
        8.0
    """

    gradient: Tensor
    _flat: Flat

    def __new__(cls, buffer: Tensor, gradient: Tensor, flat: Flat) -> FlatParameter:  # noqa: D102
        parameter = super().__new__(cls, buffer)
        parameter.gradient, parameter._flat = gradient, flat
        return parameter

    @property
    def grad(self) -> Tensor:
        """The gradient buffer; raises RuntimeError once the network has left its flat memory."""
        self._flat.require_same_frozen()
        self._flat.gather_gradients()
        return self.gradient

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self._flat.gather_gradients()
        if value is None:
            self.gradient.zero_()
        elif value is not self.gradient:
            self.gradient.copy_(value)

    def __deepcopy__(self, memo: object) -> FlatParameter:
        raise TypeError("a FlatParameter cannot be copied: copy the module and flatten_ the copy")

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError("a FlatParameter cannot be pickled: save state_dict() of the optimizer")


class Flat:
    """The buffers behind a flattened network; returned by :func:`flatten_`.

    Attributes:
        parameters: what to give to an optimizer, one :class:`FlatParameter` per dtype and device.
        buffers: all the memory, ``[P]`` or ``[members, P]`` each; frozen parameters have their own.
        layout: where each parameter lies; networks of equal layout update in one kernel a buffer.
        members: the size of the leading dimension, None where there is none.

    Example:
        >>> import torch
        >>> network = torch.nn.Linear(3, 2)
        >>> flat = flatten_(network)
        >>> network(torch.ones(1, 3)).sum().backward()
        >>> print(f"{flat.clip_grad_norm_(max_norm=1.0):.4f}")     # the norm before clipping
        2.8284
        >>> flat.zero_grad()
        >>> network.weight.grad.any().item()
        False
    """

    def __init__(
        self, module: nn.Module, groups: dict[_Group, list[Entry]], members: int | None
    ) -> None:
        self.members = members
        self.parameters: list[FlatParameter] = []
        self.buffers: list[Tensor] = []
        self.layout: dict[_Group, tuple[Slot, ...]] = {}
        self._trained: list[tuple[str, Tensor, Tensor]] = []  # each with its place in the gradient
        self._frozen: list[tuple[str, Tensor]] = []
        self._homes: list[tuple[Tensor, Tensor]] = []  # each parameter with its place in a buffer
        for group, entries in groups.items():
            self._lay(group, entries)
        self._watch = Watch(module, kinds=["_parameters"])
        if self.parameters:
            self.gather_gradients()

    def intact(self) -> bool:
        """True while every parameter still lies where :func:`flatten_` put it."""
        if self._watch.intact():
            return True
        # share_memory() and sending to another process move a buffer with all that is in it.
        together = all(tensor.data_ptr() == home.data_ptr() for tensor, home in self._homes)
        return together and self._watch.look_again()

    def gather_gradients(self) -> None:
        """Bring gradients that were dropped, or put elsewhere, back into the buffer.

        ``module.zero_grad()`` drops them and ``backward(create_graph=True)`` replaces them. Called
        at every access to ``FlatParameter.grad``, so that an optimizer never sees a stale one.

        Raises:
            RuntimeError: the network has left this buffer.
        """
        if not self.intact():
            raise RuntimeError(
                "the network has left this flat buffer (it was moved, cast or re-assigned): call "
                "flatten_ again and build the optimizer on the result"
            )
        for _, parameter, place in self._trained:
            grad = parameter.grad
            if grad is not place:
                place.zero_() if grad is None else place.copy_(grad.detach())
                parameter.grad = place

    def require_same_frozen(self) -> None:
        """Raise RuntimeError where a parameter was frozen, or unfrozen, after :func:`flatten_`."""
        changed = [name for name, parameter, _ in self._trained if not parameter.requires_grad]
        changed += [name for name, parameter in self._frozen if parameter.requires_grad]
        if changed:
            raise RuntimeError(
                f"{changed[0]!r} was frozen or unfrozen after flatten_: call flatten_ again and "
                "build the optimizer on the result"
            )

    def zero_grad(self) -> None:
        """Clear every gradient, one call per buffer."""
        for parameter in self.parameters:
            parameter.grad = None

    def grad_norm(self) -> Tensor:
        """The L2 norm of the gradient, ``[members]``, or a 0-dim tensor without members."""
        norm, *others = [torch.linalg.vector_norm(one.grad, dim=-1) for one in self.parameters]
        if others:
            both = torch.stack([norm, *(other.to(norm) for other in others)])
            norm = torch.linalg.vector_norm(both, dim=0)
        result: Tensor = norm
        return result

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale gradients to an L2 norm of at most ``max_norm``, each member's on its own.

        A norm of NaN scales nothing: it would reach what lies between the parameters, and stay.

        Returns:
            The norms before clipping, ``[members]``, or a 0-dim tensor without members.
        """
        norm = self.grad_norm()
        # torch.nn.utils.clip_grad_norm_'s rule
        scale = (max_norm / (norm + 1e-6)).clamp_(max=1.0).nan_to_num_(nan=1.0).unsqueeze(-1)
        for parameter in self.parameters:
            gradient = parameter.gradient
            gradient.mul_(scale if scale.dtype == gradient.dtype else scale.to(gradient))
        return norm

    def _lay(self, group: _Group, entries: list[Entry]) -> None:
        slots, offset = [], 0
        for entry in entries:
            shape = entry.tensor.shape if self.members is None else entry.tensor.shape[1:]
            # A dense layout keeps its strides, also a transposed one; others become contiguous.
            dense = entry.tensor if self.members is None else torch.empty(shape, device="meta")
            slots.append(
                Slot(entry.name, shape, torch.empty_like(dense, device="meta").stride(), offset)
            )
            offset = _round_up(offset + math.prod(shape), ALIGNMENT // group.dtype.itemsize)
        row = _round_up(offset, _ROW // group.dtype.itemsize)
        size = (row,) if self.members is None else (self.members, row)
        buffer = torch.zeros(size, dtype=group.dtype, device=group.device)
        self.buffers.append(buffer)
        self.layout[group] = tuple(slots)
        for entry, slot in zip(entries, slots, strict=True):
            view = self.view(buffer, slot)
            view.copy_(entry.tensor.detach())
            entry.tensor.data = view
            self._homes.append((entry.tensor, view))
        if not entries[0].tensor.requires_grad:
            self._frozen += [(entry.name, entry.tensor) for entry in entries]
            return
        gradient = torch.zeros_like(buffer)
        self.parameters.append(FlatParameter(buffer, gradient, self))
        self._trained += [
            (entry.name, entry.tensor, self.view(gradient, slot))
            for entry, slot in zip(entries, slots, strict=True)
        ]

    def view(self, buffer: Tensor, slot: Slot) -> Tensor:
        """The tensor at ``slot`` of a buffer of this layout."""
        if self.members is None:
            return buffer.as_strided(slot.shape, slot.stride, slot.offset)
        return buffer.as_strided(
            (self.members, *slot.shape), (buffer.stride(0), *slot.stride), slot.offset
        )


class _Group(NamedTuple):
    """What shares a buffer."""

    dtype: torch.dtype
    device: torch.device
    trained: bool


def flatten_(module: nn.Module, *, members: int | None = None) -> Flat:
    """Re-home a network's parameters and gradients as views of one buffer, in place.

    The ``Parameter`` objects stay the same objects with the same names, shapes and values; tied
    ones stay tied. Every tensor starts on 64 bytes. ``soft_update``, ``TargetNetwork`` and the
    averages then take one kernel for all of them, and so does an optimizer that is given
    ``flat.parameters``. Buffers (batch-norm statistics) stay where they are.

    A network that is moved or cast afterwards leaves the buffer. Averages notice and go on tensor
    by tensor; an optimizer on the flat parameters raises at its next step, and so it does where a
    parameter was frozen or unfrozen; calling ``flatten_`` again lays the network anew. Deep copies
    and unpickled networks are ordinary, not flat. ``torch.save`` writes the buffer once; plain
    ``pickle`` would write it once a parameter, so pickle a deep copy. Formats that want tensors
    with memory of their own (safetensors) are given
    ``{name: x.clone(memory_format=torch.contiguous_format) for name, x in state_dict.items()}``
    and loaded by ``load_state_dict``.

    Args:
        module: the network; flattening a flat one returns what it has.
        members: the size of the leading dimension that every parameter shares, for networks that
            hold several members (seeds); the buffer is then ``[members, P]``, a row a member.

    Raises:
        ValueError: no parameters; one is on the meta device, sparse, sharded (DTensor), not
            initialised, made in inference mode or not the leaf of its graph; two share memory
            without being one Parameter; or a first dimension is not ``members``. Nothing has been
            moved.

    Example:
        >>> import torch
        >>> network = torch.nn.Linear(3, 2)
        >>> flat = flatten_(network)
        >>> optimizer = torch.optim.Adam(flat.parameters, lr=1e-3)
        >>> network(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> [tuple(p.shape) for p in flat.parameters], flat.intact()
        ([(64,)], True)
    """
    module = unwrap(module)
    if members is not None and members < 1:
        raise ValueError(f"members must be at least 1, got {members}")
    if members is not None:
        # What several members have in their rows is not dense, and backward() would remark on it.
        warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract")
    groups = _grouped(module, members)
    known = flat_of(module)
    if known is None or known.members != members or _names(known.layout) != _names(groups):
        with lasting():
            known = Flat(module, groups, members)
        _flat[module] = known
    return known


@contextmanager
def lasting() -> Iterator[None]:
    """What is made inside outlives the inference mode that the caller may be in."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def flatten_like_(module: nn.Module, other: nn.Module) -> None:
    """Give a frozen copy the layout of a flat network; do nothing if ``other`` is not flat.

    A copy that shares tensors with ``other``, or is of another dtype or device, stays as it is.
    """
    module, other = unwrap(module), unwrap(other)
    known = flat_of(other)
    if known is None:
        return
    entries = {entry.name: entry for entry in walk(module) if not entry.is_buffer}
    theirs = {id(entry.tensor) for entry in walk(other)}
    groups = {
        group: [entries[slot.name] for slot in slots] for group, slots in known.layout.items()
    }
    alike = all(
        (entry.tensor.dtype, entry.tensor.device) == (group.dtype, group.device)
        for group, members in groups.items()
        for entry in members
    )
    if alike and not any(id(entry.tensor) in theirs for entry in entries.values()):
        with lasting():
            _flat[module] = Flat(module, groups, known.members)


def coalesce(pairs: list[Pair], target: nn.Module, online: nn.Module) -> list[Pair]:
    """Pair whole buffers where both networks are flat alike and all their parameters are paired."""
    ours, theirs = flat_of(unwrap(target)), flat_of(unwrap(online))
    if ours is None or theirs is None or ours.members != theirs.members:
        return pairs
    parameters = [pair for pair in pairs if not pair.is_buffer]
    slots = [*ours.layout.values()]
    if slots != [*theirs.layout.values()] or len(parameters) != sum(map(len, slots)):
        return pairs
    whole = [
        Pair("flat buffer", *buffers, False)
        for buffers in zip(ours.buffers, theirs.buffers, strict=True)
    ]
    return whole + [pair for pair in pairs if pair.is_buffer]


def flat_of(module: nn.Module) -> Flat | None:
    """The buffers of a network that is flat now; None for one that is not, or is no longer."""
    known = _flat.get(module)
    return known if known is not None and known.intact() else None


def _grouped(module: nn.Module, members: int | None) -> dict[_Group, list[Entry]]:
    """The parameters by buffer, tied ones once, each checked."""
    distinct: dict[int, Entry] = {}
    for entry in walk(module):
        if not entry.is_buffer:
            distinct.setdefault(id(entry.tensor), entry)
    entries = [*distinct.values()]
    if not entries:
        raise ValueError(f"{type(module).__name__} has no parameters to flatten")
    groups: dict[_Group, list[Entry]] = {}
    for entry in entries:
        _check(entry, members)
        group = _Group(entry.tensor.dtype, entry.tensor.device, entry.tensor.requires_grad)
        groups.setdefault(group, []).append(entry)
    shared = find_overlap((entry.name, entry.tensor) for entry in entries)
    if shared is not None:
        raise ValueError(
            f"cannot flatten: {shared[0]!r} and {shared[1]!r} share memory and are two Parameters; "
            "tie them by assigning one Parameter to both"
        )
    return groups


def _names(groups: Mapping[_Group, Sequence[Slot | Entry]]) -> dict[_Group, list[str]]:
    return {group: [one.name for one in inside] for group, inside in groups.items()}


def _check(entry: Entry, members: int | None) -> None:
    name, tensor = entry.name, entry.tensor
    why = None
    if isinstance(tensor, nn.UninitializedParameter):
        why = "is not initialised yet: run one batch through the network first"
    elif hasattr(tensor, "_local_tensor"):
        why = "is sharded (DTensor): sharded networks are updated tensor by tensor"
    elif tensor.is_meta:
        why = "is on the meta device and has no values"
    elif tensor.layout != torch.strided:
        why = f"must be dense, got layout {tensor.layout}"
    elif tensor.is_inference():
        why = "was made in inference mode and can never be trained"
    elif not tensor.is_leaf:
        why = "is computed from other tensors, not a leaf"
    elif members is not None and (tensor.dim() == 0 or tensor.shape[0] != members):
        why = f"must have a leading dimension of {members} members, got {tuple(tensor.shape)}"
    if why is not None:
        raise ValueError(f"cannot flatten: {name!r} {why}")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
