"""How the processor treats numbers too small for float32's full precision."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SMALLEST = 2.2250738585072014e-308  # of float64's normal numbers


@contextmanager
def flushed() -> Iterator[None]:
    """Inside, this thread of a CPU takes float32 numbers below 1.2e-38 in size for 0.

    Adam's moments of a weight whose gradient stays 0, as behind a unit that no longer fires, end as
    such numbers and never reach 0: the first after some 800 steps, the second after some 70,000.
    Arithmetic on them is many times slower, and half of a policy's weights may be so. None of them
    can move a weight: a step is the first moment over more than 1e-8. Other threads, and what held
    outside, stay as they were.

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
