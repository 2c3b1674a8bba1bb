"""Every speed that this project claims, measured beside what it is compared with, in one process.

    python -m scripts.bench                          # all sections, about a quarter of an hour
    python -m scripts.bench updates steps            # some of them
    python -m scripts.bench --device cuda            # adds launches and rooflines

Contenders take turns (`bench_cases/timing.py`), ours beside other libraries (`rivals.py`) and what
cannot be beaten (`floors.py`); `goals.py` says what must be reached. On a CPU the process is pinned
to as many cores as it has threads. Libraries that are not installed are left out (group `bench`).

Written under `--out`: `bench.md` to read, and `bench.json` with every round of every contender.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from scripts.bench_cases.averages import averaging, many_averages
from scripts.bench_cases.floors import peaks
from scripts.bench_cases.goals import goals
from scripts.bench_cases.gpu import gpu
from scripts.bench_cases.loops import loops
from scripts.bench_cases.memory import memory
from scripts.bench_cases.steps import dead_units, many_seeds, steps
from scripts.bench_cases.tables import machine, to_json, to_markdown
from scripts.bench_cases.timing import Bench, Clock, pinned
from scripts.bench_cases.updates import growing, updates
from scripts.experiment.paths import make_folder

Section = Literal["gpu", "updates", "steps", "scaling", "averaging", "memory", "loops"]
# In the order in which they are measured: where minutes are few, the loops are cut.
SECTIONS: dict[str, Sequence[Callable[[Bench], None]]] = {
    "gpu": [gpu],
    "updates": [updates],
    "steps": [steps, dead_units],
    "scaling": [many_seeds, growing, many_averages],
    "averaging": [averaging],
    "memory": [memory],
    "loops": [loops],
}


@dataclass(frozen=True)
class Options:
    """Measure this project's speed beside what it is compared with."""

    sections: tyro.conf.Positional[tuple[Section, ...]] = ()
    """what to measure; all where none is named, "gpu" on a CUDA device only"""
    device: str = "cpu"
    """where networks live, as torch names it: cpu or cuda"""
    threads: int = 1
    """threads inside one operation; on a CPU also the cores that the process is pinned to"""
    clock: Clock = "wall"
    """what a turn is timed by; "cpu" counts this process alone, for a machine that others use"""
    rounds: int = 21
    """turns that each contender gets"""
    minutes: float = math.inf
    """comparisons that would begin later than this are left out, and named"""
    compile: bool = True
    """measure compiled steps too, where a C++ compiler is at hand; ten seconds each to begin"""
    quick: bool = False
    """one call a turn and the two smallest of all sizes: to see that everything runs"""
    out: Path = Path("runs/bench")
    """folder of bench.md and bench.json"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = tyro.cli(Options, args=argv, prog="python -m scripts.bench", description=__doc__)
    try:
        chosen = check(options)
        make_folder(options.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    bench = Bench(
        device,
        options.rounds,
        options.clock,
        compile=options.compile,
        quick=options.quick,
        minutes=options.minutes,
        peaks=peaks(device) if on_gpu else None,
    )
    plain = {
        name: value if isinstance(value, (int, float)) else str(value)
        for name, value in dataclasses.asdict(options).items()
    }
    with pinned(options.threads, cores=not on_gpu):
        for bench.section in chosen:
            for measure in SECTIONS[bench.section]:
                measure(bench)
            # After each, so that an interrupted run keeps what it has.
            facts, required = machine(bench), [*goals()]
            text = to_markdown(bench, required, facts, SECTIONS)
            figures = to_json(bench, required, facts, plain)
            (options.out / "bench.md").write_text(text, encoding="utf-8")
            (options.out / "bench.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(text)
    return 0


def check(options: Options) -> Sequence[str]:
    """The sections of a command line, in its order.

    Raises:
        ValueError: An option is out of its range, or the device is not there.
    """
    for name in ("threads", "rounds"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")
    if not options.minutes > 0:
        raise ValueError(f"minutes must be positive, got {options.minutes}")
    kind = options.device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {options.device!r}")
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {options.device!r} cannot be used here: {reason}") from None
    if "gpu" in options.sections and kind != "cuda":
        raise ValueError("the section 'gpu' needs --device cuda")
    return options.sections or [name for name in SECTIONS if name != "gpu" or kind == "cuda"]


if __name__ == "__main__":
    sys.exit(main())
