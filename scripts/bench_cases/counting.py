"""What a call costs, counted and not timed: operations, bytes and launches."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# Calls of the CUDA runtime and driver that put work on the device.
GRAPH_LAUNCH = "cudaGraphLaunch"
LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaMemcpyAsync",
    "cudaMemsetAsync",
    GRAPH_LAUNCH,
)


def flops(run: Callable[[], object]) -> int:
    """Floating-point operations in the matrix products of a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def allocated(run: Callable[[], object], device: torch.device) -> int:
    """Bytes of the tensors that a call makes on the device, without what a kernel uses inside."""
    for _ in range(2):
        run()
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    where = "cpu" if device.type == "cpu" else "device"
    sizes = [getattr(event, f"self_{where}_memory_usage") for event in profiler.events()]
    return sum(size for size in sizes if size > 0)


def held(thing: object, without: nn.Module | None = None) -> int:
    """Bytes of all tensors that an object of this project leads to, each storage once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def walk(x: object) -> None:
        if id(x) in seen:
            return
        seen.add(id(x))
        if isinstance(x, Tensor):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            walk(x.__dict__)
        elif isinstance(x, dict | list | tuple | set):
            for value in x.values() if isinstance(x, dict) else x:
                walk(value)
        elif isinstance(x, nn.Module) or type(x).__module__.startswith("polyak_rl"):
            walk(vars(x))

    walk(thing)
    for parameter in without.parameters() if without is not None else ():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def launches(run: Callable[[], object]) -> Counter[str]:
    """How often a call puts work on the CUDA device, by the runtime's function."""
    for _ in range(4):
        run()  # graphs are captured after a few calls
    torch.cuda.synchronize()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return Counter(event.name for event in profiler.events() if event.name in LAUNCHES)
