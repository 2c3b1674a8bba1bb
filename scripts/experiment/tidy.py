"""Results of runs as the report reads them: tidy rows in, one array a stratum out."""

# ruff: noqa: RUF001  (the text has minus signs, dashes and Greek letters, and means them)

import csv
import gzip
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np

from scripts.experiment import schemes, stats
from scripts.experiment.stats import Floats

COLUMNS = ("run", "env", "algo", "seed", "scheme", "step", "episode", "return")
BASE = "last"
CHECKPOINTS = tuple(name for name in schemes.SCHEMES if name.startswith("checkpoint"))
NO_AVERAGES = (BASE, "best", "placebo", *CHECKPOINTS)
LAST_POINTS = 5  # the endpoint is the mean over these
MARGIN = 0.02  # of the way from a random policy to the reference: smaller does not matter
TIES = 0.25  # beyond this share of ties an IQM interval does not cover,
MANY_TIES = 0.5  # and beyond this one nor does a t interval: a few runs are all it has seen move
FIRM, FEWEST = 10, 5  # runs: "indicative" under the first, no interval under the second

# Scores of a uniformly random policy and of a good one, to put environments on one scale.
SCALES = {
    "CartPole-v1": (22.0, 500.0),
    "Acrobot-v1": (-500.0, -75.0),
    "LunarLander-v3": (-181.0, 250.0),
    "Pendulum-v1": (-1239.0, -150.0),
    "MountainCarContinuous-v0": (-33.0, 95.0),
    "InvertedPendulum-v5": (5.0, 1000.0),
    "InvertedDoublePendulum-v5": (47.0, 9360.0),
    "Hopper-v5": (18.5, 3500.0),
    "HalfCheetah-v5": (-258.0, 12000.0),
    "Swimmer-v5": (-1.7, 350.0),
    "Reacher-v5": (-42.9, -3.0),
    "Walker2d-v5": (2.0, 5000.0),
}

SCHEMES = {  # in the order of the tables; those of the study, and those of the first one
    **{name: scheme.label for name, scheme in schemes.SCHEMES.items()},
    "uniform0": "uniform over all of training",
    "suffix90": "uniform over the last 90 %",
    "suffix75": "uniform over the last 75 %",
    "suffix50": "uniform over the last 50 %",
    "suffix25": "uniform over the last 25 %",
    "suffix10": "uniform over the last 10 %",
    "ema0.1": "EMA, half-life 0.1 %",
    "ema0.3": "EMA, half-life 0.3 %",
    "ema1": "EMA, half-life 1 %",
    "ema3": "EMA, half-life 3 %",
    "ema10": "EMA, half-life 10 %",
    "power6.94": "power function, γ = 6.94",
    "power16.97": "power function, γ = 16.97",
    "lawa": "LAWA, 5 snapshots of the last 5 %",
    "target": "the target actor",
    "best": "best checkpoint, fresh episodes (oracle)",
    "placebo": "last iterate, other episodes (placebo)",
}


@dataclass(frozen=True)
class Run:
    """One planned run and what became of it."""

    env: str
    algo: str
    variant: str
    run: str
    seed: str
    status: str = "finished"  # or crashed, not run, ...
    seconds: float | None = None  # wall-clock
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        """The stratum that it belongs to."""
        return self.env, self.algo, self.variant


@dataclass(frozen=True)
class Stratum:
    """All runs of one algorithm on one environment in one variant, evaluated at the same steps."""

    env: str
    algo: str
    variant: str
    runs: list[str]  # [N]
    seeds: list[str]  # [N]
    steps: Floats  # [P], environment steps
    scores: dict[
        str, Floats
    ]  # scheme -> [N, P], mean return of the episodes, NaN where there is none
    tails: dict[str, Floats]  # the same, mean return of the worst tenth of the episodes

    @property
    def name(self) -> str:
        """As in "DQN CartPole-v1"."""
        algo = self.algo.upper() if len(self.algo) <= 5 else self.algo
        return f"{algo} {self.env}" + (f" ({self.variant})" if self.variant else "")

    @property
    def known(self) -> bool:
        """Whether there is a random and a reference score to normalise with."""
        return self.env in SCALES

    @property
    def span(self) -> float:
        """What one unit of a difference is in raw score: reference - random, or 1 if unknown."""
        random, reference = SCALES.get(self.env, (0.0, 1.0))
        return reference - random

    def normalise(self, score: Floats) -> Floats:
        """(score - random) / (reference - random); the raw score of an unknown environment."""
        return (score - SCALES.get(self.env, (0.0, 1.0))[0]) / self.span

    def endpoint(self, scheme: str, table: dict[str, Floats] | None = None) -> Floats:
        """The raw mean over the last five points, [N]; NaN for a run that lacks one of them."""
        table = self.scores if table is None else table
        missing = np.full((len(self.runs), 1), np.nan)
        return table.get(scheme, missing)[:, -LAST_POINTS:].mean(axis=1)

    def difference(self, scheme: str) -> Floats:
        """Paired, normalised endpoint differences from last, of the runs that have both, [n]."""
        return present(self.gain(scheme))

    def gain(self, scheme: str) -> Floats:
        """The same of every run, [N]; NaN where it lacks one of them."""
        return (self.endpoint(scheme) - self.endpoint(BASE)) / self.span

    def by_seed(self, scheme: str) -> dict[str, float]:
        """Normalised endpoints by training seed, to pair the runs of two variants."""
        score = self.normalise(self.endpoint(scheme))
        return {s: x for s, x in zip(self.seeds, score, strict=True) if np.isfinite(x)}

    def curves(self, *schemes: str) -> list[Floats]:
        """Normalised scores [n, P] of the runs with every scheme at every point; [] if none."""
        if any(scheme not in self.scores for scheme in schemes):
            return []
        both = np.stack([self.scores[scheme] for scheme in schemes])
        whole = np.isfinite(both).all(axis=(0, 2))
        return list(self.normalise(both[:, whole])) if whole.any() else []


def present(x: Floats) -> Floats:
    """The entries that are not NaN."""
    return x[np.isfinite(x)]


def open_text(path: Path) -> TextIO:
    """The file as text, unpacked where its name ends in .gz."""
    if path.suffix == ".gz":
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8", newline=""))
    return path.open(encoding="utf-8", newline="")


def result_files(paths: Iterable[Path]) -> list[Path]:
    """The CSV files named, and those in the folders named, at any depth."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"results must be a CSV file or a folder of them, got {path}: no such")
        found = [path] if path.is_file() else [*path.rglob("*.csv"), *path.rglob("*.csv.gz")]
        files += sorted(f for f in found if not f.name.startswith("runs.csv"))
    if not files:
        raise ValueError(f"expected .csv or .csv.gz files, found none in {[*map(str, paths)]}")
    return list(dict.fromkeys(files))


Episodes = dict[tuple[str, int], dict[str, float]]  # (scheme, step) -> episode -> return


def read_results(files: Iterable[Path]) -> list[Stratum]:
    """All strata in tidy CSV files, in order of their names; a row given twice counts once."""
    table: dict[tuple[str, str, str], dict[tuple[str, str], Episodes]] = {}
    for path in files:
        with open_text(path) as lines:
            rows = csv.DictReader(lines)
            missing = [c for c in COLUMNS if c not in (rows.fieldnames or [])]
            if missing:
                raise ValueError(f"{path}: expected the columns {COLUMNS}, missing {missing}")
            for row in rows:
                place = f"{path}, line {rows.line_num}"
                try:
                    step, score = int(float(row["step"])), float(row["return"])
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{place}: step and return must be numbers, {error}") from None
                if not math.isfinite(score):
                    raise ValueError(f"{place}: return must be finite, got {score}")
                runs = table.setdefault((row["env"], row["algo"], row.get("variant") or ""), {})
                episodes = runs.setdefault((row["run"], row["seed"]), {})
                cell = episodes.setdefault((row["scheme"], step), {})
                if cell.setdefault(row["episode"], score) != score:
                    raise ValueError(
                        f"{place}: one return an episode, got {cell[row['episode']]} and {score}"
                        f" for run {row['run']}, {row['scheme']}, step {step}"
                    )
    return [stratum(key, runs) for key, runs in sorted(table.items())]


def stratum(key: tuple[str, str, str], table: dict[tuple[str, str], Episodes]) -> Stratum:
    """Lay out one stratum's episodes as arrays; runs must share their evaluation steps."""
    runs = sorted(table, key=lambda run: (len(run[1]), run[1], run[0]))  # seed 2 before seed 10
    evaluated = {run: {step for _, step in table[run]} for run in runs}
    grid = sorted(max(evaluated.values(), key=len))
    for run in runs:
        if alien := evaluated[run] - set(grid):
            raise ValueError(
                f"runs of {key} must be evaluated at the same steps,"
                f" got {sorted(alien)[:3]} in run {run[0]} alone"
            )
    schemes = sorted({scheme for episodes in table.values() for scheme, _ in episodes}, key=rank)
    shape = (len(runs), len(grid))
    scores = {scheme: np.full(shape, np.nan) for scheme in schemes}
    tails = {scheme: np.full(shape, np.nan) for scheme in schemes}
    column = {step: j for j, step in enumerate(grid)}
    for i, run in enumerate(runs):
        for (scheme, step), cell in table[run].items():
            returns = list(cell.values())
            scores[scheme][i, column[step]] = np.mean(returns)
            tails[scheme][i, column[step]] = stats.cvar(returns, 0.1)
    names, seeds = zip(*runs, strict=True)
    return Stratum(*key, list(names), list(seeds), np.array(grid, float), scores, tails)


def rank(scheme: str) -> tuple[int, str]:
    """Where a scheme stands in a table: known ones in order, then others by name."""
    known = list(SCHEMES)
    return (known.index(scheme) if scheme in known else len(known), scheme)


def read_runs(files: Iterable[Path]) -> tuple[list[Run], dict[str, Any]]:
    """The planned runs in runs.json or runs.csv beside the results, and what else is said there."""
    runs: dict[tuple[str, ...], Run] = {}
    about: dict[str, Any] = {}
    for folder in dict.fromkeys(path.parent for path in files):
        entries: list[dict[str, Any]] = []
        if (folder / "runs.json").exists():
            said = json.loads((folder / "runs.json").read_text(encoding="utf-8"))
            if isinstance(said, dict):
                about |= {k: v for k, v in said.items() if k != "runs"}
                said = said.get("runs", [])
            entries += said
        if (folder / "runs.csv").exists():
            with (folder / "runs.csv").open(encoding="utf-8", newline="") as lines:
                entries += csv.DictReader(lines)
        for entry in entries:
            if missing := [k for k in ("run", "env", "algo", "seed", "status") if k not in entry]:
                raise ValueError(f"runs in {folder}: missing {missing} in {entry}")
            config, seconds = entry.get("config") or {}, entry.get("seconds")
            run = Run(
                env=entry["env"],
                algo=entry["algo"],
                variant=entry.get("variant") or "",
                run=str(entry["run"]),
                seed=str(entry["seed"]),
                status=entry["status"].replace("_", " "),
                seconds=float(seconds) if seconds not in (None, "") else None,
                config=json.loads(config) if isinstance(config, str) else config,
            )
            runs[*run.key, run.run] = run
    return list(runs.values()), about
