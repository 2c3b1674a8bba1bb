"""What holds while a network has an average in place of its own weights."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from polyak_rl.pairing import shard_of, walk


def require_online(what: str, tensors: Iterable[Tensor]) -> None:
    """Raise RuntimeError where one of the tensors holds an average instead of its own weights.

    Args:
        what: what would be done with the tensors, as the error says it.
        tensors: what would be read or written.
    """
    if swaps and _overlap(tensors, [tensor for swap in swaps for tensor in swap.tensors.values()]):
        raise RuntimeError(
            f"{what} inside applied(): the network holds an average there, and its own weights "
            "come back at the end of the block. The average is had without it by average(name) and "
            "module(name), and as a model of Stable-Baselines3 by save_averaged()"
        )


class Swap:
    """A network that holds other weights, from :meth:`enter` to :meth:`leave`.

    Nothing hangs on the network meanwhile. Entering and leaving may be interrupted at any line:
    ``leave`` can be called again, and until it is through the network counts as swapped.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._thread = threading.get_ident()
        self.tensors: dict[str, Tensor] = {}
        self._own: list[Tensor] | None = None  # what comes back
        # Where to, and which of them; and the names of what was replaced meanwhile.
        self._found: tuple[list[tuple[Tensor, int]], list[str]] | None = None

    @torch.no_grad()
    def enter(self, tensors: dict[str, Tensor], values: Sequence[Tensor]) -> None:
        """Write values to the tensors of the network.

        Raises:
            RuntimeError: another thread has swapped them.
        """
        self.tensors = tensors
        swaps.append(self)
        earlier = swaps[: swaps.index(self)]
        others = [swap.tensors for swap in earlier if swap._thread != self._thread]
        if any(_overlap(tensors.values(), other.values()) for other in others):
            raise RuntimeError(
                "applied() in two threads at once: another thread holds an average in this "
                "network; evaluate a copy, module(name), there"
            )
        with _mode_of(tensors.values()):
            shards = [shard_of(tensor).detach() for tensor in tensors.values()]
            self._own = [shard.clone() for shard in shards]
            _guard(on=True)
            torch._foreach_copy_(shards, list(values))

    @torch.no_grad()
    def leave(self) -> None:
        """Bring the network's own weights back; nothing where that was done.

        Raises:
            RuntimeError: they are back, but tensors were replaced meanwhile; or the network still
                holds the average of a block that was entered later, and they come back after it.
        """
        if self not in swaps:
            return
        later = swaps[swaps.index(self) + 1 :]
        overtaken, replaced = False, list[str]()
        if self._own is not None:
            if self._found is None:
                self._found = self._find_places()
            places, replaced = self._found
            for tensor, i in places:
                heir = next((swap for swap in later if swap._inherit(tensor, self._own[i])), None)
                overtaken |= heir is not None
                if heir is None:
                    with _mode_of([tensor]):
                        shard_of(tensor).detach().copy_(self._own[i])
        if len(swaps) == 1:
            _guard(on=False)
        swaps.remove(self)  # last, so that what an interrupt left undone is done again
        if overtaken:
            raise RuntimeError(
                "applied() blocks must be left in the reverse order of entering: the network still "
                "holds the average of a block that was entered later, and gets its own weights "
                "back when that one is left"
            )
        if replaced:
            raise RuntimeError(
                f"{', '.join(map(repr, replaced[:4]))} was replaced inside applied(): what "
                "is there now was left as it is, and what was there has its own weights back"
            )

    def _inherit(self, tensor: Tensor, own: Tensor) -> bool:
        """Bring back these weights, and not those of the block around that has ended."""
        for i, ours in enumerate(self.tensors.values()):
            if ours is tensor and self._own is not None:
                self._own[i] = own
                return True
        return False

    def _find_places(self) -> tuple[list[tuple[Tensor, int]], list[str]]:
        """The swapped tensors, and those that they became by a move or a cast meanwhile."""
        now = {entry.name: entry.tensor for entry in walk(self.module)}
        assert self._own is not None
        places, replaced = [], []
        for i, (name, tensor) in enumerate(self.tensors.items()):
            current, shard = now.get(name), shard_of(tensor)
            fits = shard.shape == self._own[i].shape
            if fits:
                places.append((tensor, i))  # also where the network has another now
            if current is not tensor and current is not None and _same(shard_of(current), shard):
                places.append((current, i))
            elif current is not tensor or not fits:
                replaced.append(name)
        return places, replaced


swaps: list[Swap] = []
"""The swaps that hold now, in the order of entering; empty almost always."""

_guards: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}  # ours, and what it guards
_hooks: list[RemovableHandle] = []


def _guard(*, on: bool) -> None:
    """While a network is swapped, reading or loading a state that has a part of it raises.

    On the class, since a hook on the network would live on in its copies, and would not see other
    modules that hold the same tensors.
    """
    for name in ("state_dict", "load_state_dict"):
        guard, original = _guards.get(name, (None, None))
        current = getattr(nn.Module, name)
        if on and current is not guard:
            _guards[name] = (_guarded(current), current)
            setattr(nn.Module, name, _guards[name][0])
        elif not on and current is guard:
            setattr(nn.Module, name, original)
    if on and not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_refuse_step))
    while _hooks and not on:
        _hooks.pop().remove()


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def guarded(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        require_online(f"{method.__name__}()", [*module.parameters(), *module.buffers()])
        return method(module, *args, **kwargs)

    return guarded


def _refuse_step(optimizer: Optimizer, *_: object) -> None:
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    require_online("an optimizer step", stepped)


def _extent(tensor: Tensor) -> tuple[int, int, torch.device | None]:
    """The first byte of a tensor and the one after its last; (0, 0) where it has no memory."""
    try:
        shard = shard_of(tensor)
        start = shard.data_ptr()
        span = sum((n - 1) * step for n, step in zip(shard.shape, shard.stride(), strict=True)) + 1
    except (RuntimeError, ValueError):  # sparse, lazy, fake
        return 0, 0, None
    return start, start + (span * shard.element_size() if shard.numel() else 0), shard.device


def _overlap(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """True where two tensors share memory."""
    held = [*map(_extent, others)]
    return any(
        start < other_end and other_start < end and device == other_device
        for start, end, device in map(_extent, some)
        for other_start, other_end, other_device in held
    )


def _same(a: Tensor, b: Tensor) -> bool:
    """True where a holds what b does, as far as a's precision goes."""
    return a.shape == b.shape and torch.allclose(a, b.to(a), rtol=0, atol=0, equal_nan=True)


def _mode_of(tensors: Iterable[Tensor]) -> torch.inference_mode:
    """The mode in which the tensors may be written."""
    return torch.inference_mode(any(tensor.is_inference() for tensor in tensors))
