"""How the process's allocator treats what a gradient step frees."""

import ctypes
import sys

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_BLOCK = 32 << 20  # bytes; the largest threshold that every glibc takes
_SPARE = 256 << 20  # bytes


def keep_freed_memory(keep: bool = True) -> bool:
    """Keep up to 256 MiB of freed memory in the process, for the next gradient step.

    glibc gives large blocks, and what is free at the end of its heap, back to the system at once;
    the activations of a batch are both, so that each step has its pages mapped and cleared anew.
    No number changes.

    Args:
        keep: False goes back to glibc's thresholds of 128 KiB.

    Returns:
        True where the C library is one that can be asked.

    Example:
        >>> keep_freed_memory(False) == keep_freed_memory()
        True
    """
    block, spare = (_BLOCK, _SPARE) if keep else (128 << 10, 128 << 10)
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, block) and mallopt(_M_TRIM_THRESHOLD, spare))
