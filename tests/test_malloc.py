import resource
import sys

import pytest
import torch

from agents.malloc import keep_freed_memory


def faults(keep):
    """Pages mapped by twenty tensors of 16 MiB, one after another, each freed before the next."""
    keep_freed_memory(keep)
    torch.empty(2**22).fill_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(2**22).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_memory_that_is_kept_is_not_mapped_anew():
    if not keep_freed_memory():
        pytest.skip("another C library")
    assert 10 * faults(keep=True) < faults(keep=False)
    keep_freed_memory()
