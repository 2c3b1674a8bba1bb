"""What only a GPU shows: launches, and an update beside its replay and beside a copy."""

from collections.abc import Callable
from functools import partial

import torch

from agents.sac import SACConfig
from polyak_rl import TargetNetwork, flatten_
from scripts.bench_cases.counting import GRAPH_LAUNCH, launches
from scripts.bench_cases.timing import Bench
from scripts.bench_cases.trainings import filled, learn
from scripts.bench_cases.updates import (
    TARGET_FLAT,
    TAU,
    compare_flat,
    critic_net,
    our_updates,
)

UPDATE_LAUNCHES, SAC_LAUNCHES = "launches of a target update", "launches of a SAC step"
HUNDRED_MB = "target update of 100 MB"
GRAPH, REPLAY = "target update as a captured graph", "graph replay"


def gpu(bench: Bench) -> None:
    """Launches of an update and of a step, graph replay, and an update of 100 MB."""
    network = critic_net().to(bench.device)
    for name, run in our_updates(network).items():
        bench.value(
            UPDATE_LAUNCHES if name == TARGET_FLAT else f"{name}: launches of an update",
            sum(launches(run).values()),
            "launches",
        )
    training = filled("sac", "HalfCheetah-v5", SACConfig(), bench.device, compile=True)
    counts = launches(partial(learn, training))
    bench.value(SAC_LAUNCHES, sum(counts.values()), "launches")
    bench.value("of these, graphs", counts[GRAPH_LAUNCH], "launches")
    training.close()

    flatten_(network)
    target = TargetNetwork(network, TAU)
    bench.compare(GRAPH, {TARGET_FLAT: target.update, REPLAY: captured(target.update)})
    compare_flat(bench, HUNDRED_MB, "", 25_000_000, 12)


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """The replay of a call that was compiled and captured."""
    return captured(torch.compile(run))


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The replay of a call captured in a CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
