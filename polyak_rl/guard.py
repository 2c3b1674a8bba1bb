"""Keep out what must not be in: NaN and Inf, captured graphs, damaged states, interrupts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import call
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from polyak_rl.pairing import is_sharded

Guard: TypeAlias = Literal["finite"] | None
"""``"finite"``: an update that would take in NaN or Inf is left out, and counted as skipped."""


def check_guard(guard: Guard, tensors: Iterable[Tensor]) -> bool:
    """True where updates are guarded.

    Raises:
        ValueError: there is no such guard, or the network is sharded.
    """
    if guard not in ("finite", None):
        raise ValueError(f"guard must be 'finite' or None, got {guard!r}")
    if guard and any(map(is_sharded, tensors)):
        raise ValueError(
            "guard='finite' needs the whole network, and a shard cannot know of the others: check "
            "the gradient norm, which fully_shard reduces over all of them, before the step"
        )
    return guard is not None


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """True where no element is NaN or Inf; reads one number back from the device.

    Example:
        >>> import torch
        >>> all_finite([torch.ones(2), torch.tensor([3e38, 3e38])])    # their sum overflows
        True
        >>> all_finite([torch.ones(2), torch.tensor([0.0, math.nan])])
        False
    """
    floats = [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
    if not floats:
        return True
    # A sum is one pass without a temporary, and finite only where every element is.
    sums = [tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in floats]
    total = torch.stack([one.to(sums[0].device) for one in sums]).abs().sum()
    return math.isfinite(total) or all(bool(tensor.isfinite().all()) for tensor in floats)


try:
    torch.cuda.is_current_stream_capturing()
    _without_cuda = None
except RuntimeError:
    _without_cuda = torch.cuda.is_current_stream_capturing


def is_capturing() -> bool:
    """True while the current CUDA stream records a graph: what Python does is not in it."""
    ask = torch.cuda.is_current_stream_capturing
    return ask is not _without_cuda and ask()


def refuse_capture(what: str, instead: str) -> None:
    """Raise RuntimeError while a CUDA graph is captured, which would record nothing of a clock."""
    if is_capturing():
        raise RuntimeError(
            f"{what} cannot be captured in a CUDA graph: its clock moves on the host, and a replay "
            f"would not advance it. {instead}"
        )


Call: TypeAlias = Callable[[], object]


def at_once(calls: Iterable[Call]) -> None:
    """Make calls of C functions in one call of C: an interrupt comes before all or after all.

    Example:
        >>> from functools import partial
        >>> numbers = []
        >>> at_once([partial(numbers.append, 1), partial(numbers.append, 2)])
        >>> numbers
        [1, 2]
    """
    [*map(call, calls)]


@contextmanager
def damage_is_a_value_error(what: str) -> Iterator[None]:
    """What a state that was made up raises while it is checked comes out as ValueError."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"the saved {what} is damaged: {error!r}") from error
