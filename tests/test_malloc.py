import subprocess
import sys

import pytest

from agents.malloc import keep_freed_memory

FAULTS = """
import resource
import torch
from agents.malloc import keep_freed_memory

def faults(keep):
    keep_freed_memory(keep)
    for k in range(60):  # the first of them make room
        if k == 40:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(2**22).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(False), faults(True))
"""


@pytest.mark.skipif(not keep_freed_memory(), reason="needs glibc's allocator")
def test_memory_that_is_kept_is_not_mapped_anew():
    """Pages mapped by twenty tensors of 16 MiB, each freed before the next, in a new process."""
    command = [sys.executable, "-c", FAULTS]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    given_back, kept = map(int, result.stdout.split())
    assert 10 * kept < given_back
