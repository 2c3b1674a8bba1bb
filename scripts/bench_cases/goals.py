"""Which ratios must be reached on a CPU, and which times on an H100."""

from collections.abc import Iterator

from scripts.bench_cases.averages import AVERAGING, PLAIN, TWELVE
from scripts.bench_cases.floors import COPY, LERP
from scripts.bench_cases.gpu import GRAPH, HUNDRED_MB, REPLAY, SAC_LAUNCHES, UPDATE_LAUNCHES
from scripts.bench_cases.loops import DQN_LOOP, LOOP64, LOOP256, SAC_LOOP
from scripts.bench_cases.rivals import SB3, SBX
from scripts.bench_cases.steps import (
    ALONE,
    DDPG_STEP,
    DQN64_SEEDS,
    DQN64_STEP,
    DQN256_STEP,
    GEMMS,
    SAC_SEEDS,
    SAC_STEP,
    STEPS,
    TF32,
    TOGETHER,
)
from scripts.bench_cases.timing import Goal
from scripts.bench_cases.trainings import COMPILED, OURS
from scripts.bench_cases.updates import NARROW, PARAMETERS, SOFT, TARGET_FLAT, TWIN


def faster(title: str, name: str, rival: str, times: float, size: str = "") -> Goal:
    """How many times as fast as its rival a contender must be."""
    text = f"{title}, {name}: times as fast as {rival}"
    return Goal(text, title, size, over=rival, under=name, at_least=times)


def slower(title: str, name: str, floor: str, times: float, size: str = "") -> Goal:
    """How many times as long as its floor a contender may take."""
    text = f"{title}{size and ', '}{size}, {name}: times as long as {floor}"
    return Goal(text, title, size, over=name, under=floor, at_most=times)


def on_gpu(text: str, title: str, name: str, most: float, size: str = "", scale: float = 1) -> Goal:
    """How many microseconds a contender may take on a GPU; an item is one of `scale` parts."""
    text = f"{text}, µs"
    return Goal(text, title, size, under=name, at_most=most, scale=1e6 * scale, gpu=True)


def goals() -> Iterator[Goal]:
    """All of them, in the order in which they are reported."""
    yield faster(TWIN, TARGET_FLAT, SB3, 8)
    yield faster(NARROW, TARGET_FLAT, SB3, 12)
    yield slower(TWIN, TARGET_FLAT, LERP, 1.1)
    for title in (TWIN, NARROW):
        yield faster(title, SOFT, SB3, 2)
    for size in ("1e+06", "1e+07", "1e+08"):
        yield slower(PARAMETERS, TARGET_FLAT, COPY, 1.5, size)
    for title in (SAC_STEP, DDPG_STEP):
        yield slower(title, OURS, GEMMS, 1.5)
        yield faster(title, OURS, SB3, 1.5)
    for title in (DQN64_STEP, DQN256_STEP):
        yield faster(title, OURS, SB3, 1.6)
    for title in STEPS:
        yield faster(title, COMPILED, SBX, 1)
    yield faster(SAC_LOOP, OURS, SB3, 1.6)
    yield faster(SAC_LOOP, COMPILED, SBX, 1.6)
    yield faster(DQN_LOOP, OURS, SB3, 2)
    yield faster(DQN_LOOP, COMPILED, SBX, 1.5)
    yield slower(AVERAGING, TWELVE, PLAIN, 1.03)
    yield faster(LOOP64, TOGETHER, ALONE, 3, "20")
    yield faster(LOOP256, TOGETHER, ALONE, 1.3, "20")

    yield Goal("launches of a flat target update", UPDATE_LAUNCHES, at_most=1, gpu=True)
    # Replaying a graph with random numbers first writes a seed and an offset: two launches more.
    yield Goal("launches of a SAC step, one graph replay", SAC_LAUNCHES, at_most=3, gpu=True)
    yield Goal(  # an update moves three vectors, a copy two
        "bandwidth of an update of 100 MB over a device copy's",
        HUNDRED_MB,
        over=COPY,
        under=TARGET_FLAT,
        scale=1.5,
        at_least=0.85,
        gpu=True,
    )
    yield on_gpu("flat target update, 1e6 parameters", PARAMETERS, TARGET_FLAT, 8, "1e+06")
    yield on_gpu("flat target update, twin critic, in a graph", GRAPH, REPLAY, 3)
    yield on_gpu("flat target update, 1e8 parameters", PARAMETERS, TARGET_FLAT, 440, "1e+08")
    for seeds, sac, dqn in ((1, 200, 60), (20, 400, None), (128, 1000, 100), (1024, 3500, 300)):
        text, size = f"step in one replay, seeds {seeds}", str(seeds)
        precision = TOGETHER if seeds == 1 else TF32
        yield on_gpu(f"SAC {text}", SAC_SEEDS, precision, sac, size, seeds)
        if dqn:
            yield on_gpu(f"DQN 64 units, {text}", DQN64_SEEDS, TOGETHER, dqn, size, seeds)
    yield on_gpu("SAC on HalfCheetah-v5, an environment step", SAC_LOOP, COMPILED, 500)
