"""The figures of `scripts.bench`, written as tables and as plain values."""

import contextlib
import dataclasses
import datetime
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from agents.versions import commit
from scripts.bench_cases.timing import Bench, Case, Goal, Value


def machine(bench: Bench) -> dict[str, Any]:
    """What the figures depend on."""
    packages = ("torch", "numpy", "stable_baselines3", "sbx-rl", "jax", "optax", "timm")
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit() or "unknown",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": bench.clock,
        "device": str(bench.device),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: found for name in packages if (found := package_version(name))},
        "load average": "{:.1f} {:.1f} {:.1f}".format(*os.getloadavg()),
    }
    if bench.device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(bench.device)
    if bench.peaks is not None:
        facts["copy"] = f"{bench.peaks.bandwidth / 1e12:.3g} TB/s"
        facts["product"] = f"{bench.peaks.flops / 1e12:.3g} TFLOP/s"
    if bench.wall:
        # Below 1 the machine was shared: the rest of the time somebody else had the core.
        facts["share of the core"] = round(bench.cpu / bench.wall, 3)
    return facts


def processor() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def package_version(name: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def to_json(
    bench: Bench, goals: Iterable[Goal], facts: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """All figures as plain values; times in seconds."""
    judged = []
    for goal in goals:
        reached = bench.reached(goal)
        judged.append(
            {
                "goal": goal.text,
                "required": goal.bound,
                "reached": reached and reached._asdict(),
                "verdict": goal.verdict(reached),
            }
        )
    cases = [
        dataclasses.asdict(case)
        | {"summary": {name: case.seconds(name)._asdict() for name in case.rounds}}
        for case in bench.cases
    ]
    return {
        "machine": facts,
        "options": options,
        "goals": judged,
        "cases": cases,
        "values": [value._asdict() for value in bench.values],
        "left out": bench.left_out,
    }


def to_markdown(
    bench: Bench, goals: Iterable[Goal], facts: dict[str, Any], sections: Iterable[str]
) -> str:
    """All figures as tables, in the order of the sections."""
    parts = [
        "# Benchmarks",
        "; ".join(f"{key} {value}" for key, value in facts.items()),
        "Medians over the rounds, quartiles in brackets.",
    ]
    rows = []
    for goal in goals:
        reached = bench.reached(goal)
        shown = "" if reached is None else str(reached)
        rows.append([goal.text, goal.bound, shown, goal.verdict(reached)])
    parts += ["## Goals", table(["ratio", "required", "reached", "verdict"], rows)]
    for section in sections:
        cases = [case for case in bench.cases if case.section == section]
        values = [value for value in bench.values if value.section == section]
        if cases or values:
            parts.append(f"## {section.capitalize()}")
        for title in dict.fromkeys(case.title for case in cases):
            group = [case for case in cases if case.title == title]
            parts += [f"### {title.capitalize() if title.islower() else title}"]
            parts += [group[0].note] if group[0].note else []
            parts.append(by_size(group) if len(group) > 1 else by_contender(group[0]))
        if values:
            parts.append(table(["", ""], [[v.name, counted(v)] for v in values]))
    if bench.left_out:
        parts.append(f"Left out: {'; '.join(bench.left_out)}.")
    return "\n\n".join(parts) + "\n"


def by_contender(case: Case) -> str:
    """A row a contender: its figure, and how many times as fast as the baseline it is."""
    base = case.baseline if case.baseline in case.rounds else next(iter(case.rounds))
    rows = [
        [name, figure(case, name), str(case.ratio(base, name)) if name != base else "1"]
        for name in case.rounds
    ]
    if case.roofline:
        times = f"{case.seconds(base).median / case.roofline:.3g}"
        rows.append(["roofline", in_unit(case.roofline), times])
    return table([case.size and f"size {case.size}", case.unit, f"times as fast as {base}"], rows)


def by_size(cases: list[Case]) -> str:
    """A row a size, a column a contender."""
    names = list(dict.fromkeys(name for case in cases for name in case.rounds))
    rows = [
        [case.size, *(figure(case, name) if name in case.rounds else "" for name in names)]
        for case in cases
    ]
    if any(case.roofline for case in cases):
        names = [*names, "roofline"]
        rows = [[*row, in_unit(c.roofline)] for row, c in zip(rows, cases, strict=True)]
    return table(["size", *names], rows)


def figure(case: Case, name: str) -> str:
    """Median and quartiles in a unit that suits them."""
    seconds = case.seconds(name)
    if case.unit == "steps/s":
        return f"{1 / seconds.median:,.0f} [{1 / seconds.high:,.0f}, {1 / seconds.low:,.0f}]"
    factor, unit = unit_of(seconds.median)
    return f"{seconds.scaled(factor)} {unit}"


def in_unit(seconds: float) -> str:
    """A time in a unit that suits it."""
    factor, unit = unit_of(seconds)
    return f"{seconds * factor:.3g} {unit}"


def unit_of(seconds: float) -> tuple[float, str]:
    """How many of a unit that suits a time are in a second, and the unit."""
    units = ((1e6, "µs"), (1e3, "ms"))
    return next(((f, unit) for f, unit in units if seconds * f < 1000), (1.0, "s"))


def counted(value: Value) -> str:
    """A value with its unit."""
    digits = f"{value.value:,.4g}" if abs(value.value) < 1000 else f"{value.value:,.0f}"
    return f"{digits} {value.unit}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
