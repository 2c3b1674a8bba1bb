"""How the processor treats numbers too small for float32's full precision."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SMALLEST = 2.2250738585072014e-308  # of float64's normal numbers


@contextmanager
def flushed() -> Iterator[None]:
    """Inside, this thread of a CPU takes float32 numbers below 1.2e-38 in size for 0.

    Adam's first moment of a unit that no longer fires shrinks by a tenth at each step and after
    some 800 is such a number, for good; with them a processor is many times slower, and half of a
    policy's units may be so. Divided by the square root of the second moment plus 1e-8 it moves no
    weight. What held outside holds there again.

    Example:
        >>> tiny = torch.tensor(1e-30)
        >>> with flushed():
        ...     (tiny * 1e-10).item()
        0.0
        >>> (tiny * 1e-10).item() > 0
        True
    """
    before = _SMALLEST / 2 == 0  # nothing in PyTorch tells
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
