"""Target updates: on networks of several shapes, and as parameters and tensors grow."""

import copy
import math
import os
from collections.abc import Callable
from itertools import pairwise

import torch
from stable_baselines3.common.utils import polyak_update
from torch import nn

from polyak_rl import TargetNetwork, flatten_, soft_update
from scripts.bench_cases.floors import bare_updates, on_one_vector
from scripts.bench_cases.rivals import SB3, rival_updates
from scripts.bench_cases.timing import Bench, Needs

TAU = 0.005
SOFT, SOFT_FLAT = "soft_update", "soft_update, flat"
TARGET, TARGET_FLAT = "TargetNetwork", "TargetNetwork, flat"
TWIN, NARROW, CONV = "twin critic 256x256", "three-layer 64-unit net", "160 conv tensors"
PARAMETERS, TENSORS = "parameters", "tensors"


def dense(*sizes: int) -> nn.Module:
    """Linear layers with a ReLU between each two."""
    layers: list[nn.Module] = []
    for pair in pairwise(sizes):
        layers += [nn.Linear(*pair), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def critic_net() -> nn.Module:
    """SAC's twin critic at HalfCheetah's shapes: 12 tensors, 0.6 MB."""
    return nn.ModuleList([dense(17 + 6, 256, 256, 1) for _ in range(2)])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    TWIN: critic_net,
    NARROW: lambda: dense(4, 64, 64, 2),  # 6 tensors, 19 kB
    CONV: lambda: nn.ModuleList([nn.Conv2d(40, 40, 3) for _ in range(80)]),  # 4.6 MB
}


def updates(bench: Bench) -> None:
    """One target update on networks of several shapes."""
    for title, build in NETWORKS.items():
        network = build().to(bench.device)
        contenders = {
            **rival_updates(network, TAU),
            **our_updates(network),
            **bare_updates(network, TAU),
        }
        size = sum(p.numel() for p in network.parameters())
        note = f"{len([*network.parameters()])} tensors, {size:,} parameters"
        bench.compare(title, contenders, note=note, baseline=SB3, needs=Needs(3 * 4 * size))


def our_updates(network: nn.Module) -> dict[str, Callable[[], object]]:
    """What this library offers."""
    online, target = copy.deepcopy(network), copy.deepcopy(network)
    flat_online, flat_target = copy.deepcopy(network), copy.deepcopy(network)
    flatten_(flat_online)
    flatten_(flat_target)
    return {
        "soft_update, sequences": lambda: soft_update(
            target.parameters(), online.parameters(), TAU
        ),
        SOFT: lambda: soft_update(target, online, TAU),
        TARGET: TargetNetwork(online, TAU).update,
        SOFT_FLAT: lambda: soft_update(flat_target, flat_online, TAU),
        TARGET_FLAT: TargetNetwork(flat_online, TAU).update,
    }


def growing(bench: Bench) -> None:
    """What an update costs as parameters and tensors grow."""
    for count in bench.sizes([10**n for n in range(4, 9)]):
        needed = 4 * 4 * count  # online weights, their gradients, the target, one more vector
        if needed < free_bytes(bench.device) / 2:
            compare_flat(bench, PARAMETERS, f"{count:.0e}", count, 12)
    for tensors in bench.sizes((6, 30, 100, 300, 1000)):
        compare_flat(bench, TENSORS, str(tensors), 1_000_000, tensors)


def compare_flat(bench: Bench, title: str, size: str, parameters: int, tensors: int) -> None:
    """Updates of one flat pair, and the plain copy of the same bytes."""
    pieces = [torch.randn(parameters // tensors, device=bench.device) for _ in range(tensors)]
    online = nn.ParameterList(pieces)
    flat = flatten_(online)
    target = TargetNetwork(online, TAU)
    contenders = {
        SB3: lambda: polyak_update(online.parameters(), target.parameters(), TAU),
        SOFT_FLAT: lambda: soft_update(target.module, online, TAU),
        TARGET_FLAT: target.update,
        **on_one_vector(flat.buffers[0], TAU),
    }
    note = f"{parameters:,} parameters in {tensors} tensors; all work on the same memory"
    bench.compare(title, contenders, size=size, note=note, needs=Needs(3 * 4 * parameters))


def free_bytes(device: torch.device) -> float:
    """The memory that is free on the device, as far as the system says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf
