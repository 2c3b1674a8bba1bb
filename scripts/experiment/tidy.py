"""Results of runs as the report reads them: tidy rows in, one array a stratum out."""

import csv
import gzip
import json
import lzma
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
from numpy.typing import NDArray

from polyak_rl.choose import mean_of_worst
from scripts.experiment.schemes import KNOWN, is_late
from scripts.experiment.stats import Floats

COLUMNS = ("run", "env", "algo", "seed", "scheme", "step", "episode", "return")

Scale = tuple[float, float]  # scores of a uniformly random policy, and of a good one

SCALES: Mapping[str, Scale] = {
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
LARGEST = {"CartPole-v1": 500.0, "InvertedPendulum-v5": 1000.0}  # no return is above

Key = tuple[str, str, str]  # environment, algorithm, variant


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
    evaluating: float | None = None  # of these
    config: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """The stratum that it belongs to."""
        return self.env, self.algo, self.variant


@dataclass(frozen=True, eq=False)
class Stratum:
    """All runs of one algorithm on one environment in one variant, evaluated at the same steps."""

    env: str
    algo: str
    variant: str
    runs: list[str]  # their names, [N]
    seeds: list[str]  # their training seeds, [N]
    steps: Floats  # the environment steps of the evaluations, [P]
    scores: dict[str, Floats]  # by scheme the mean return, [N, P]; NaN where there is none
    final: dict[str, Floats]  # by scheme the last point's returns, [N, E]; NaN as above
    scale: Scale | None  # what is 0 and what is 1 of a normalised score; None: scores are raw

    @property
    def key(self) -> Key:
        """Environment, algorithm and variant."""
        return self.env, self.algo, self.variant

    def only(self, keep: NDArray[np.bool_]) -> "Stratum":
        """The same with those of its runs, [N], that are to be kept."""
        return replace(
            self,
            runs=[run for run, kept in zip(self.runs, keep, strict=True) if kept],
            seeds=[seed for seed, kept in zip(self.seeds, keep, strict=True) if kept],
            scores={name: x[keep] for name, x in self.scores.items()},
            final={name: x[keep] for name, x in self.final.items()},
        )

    @property
    def name(self) -> str:
        """As in "DQN CartPole-v1"."""
        algo = self.algo.upper() if len(self.algo) <= 5 else self.algo
        return f"{algo} {self.env}" + (f" ({self.variant})" if self.variant else "")

    @property
    def share(self) -> Floats:
        """How much of the run lies before each evaluation, [P]."""
        return np.asarray(self.steps / max(1.0, self.steps[-1]))

    def normalise(self, score: Floats) -> Floats:
        """(score - random) / (reference - random), or the score where these are not known."""
        random, reference = self.scale or (0.0, 1.0)
        return np.asarray((score - random) / (reference - random))

    def curve(self, scheme: str) -> Floats:
        """Normalised scores at all points, [N, P]."""
        missing = np.full((len(self.runs), len(self.steps)), np.nan)
        return self.normalise(self.scores.get(scheme, missing))

    def episodes(self, scheme: str, *beside: str) -> Floats:
        """Returns of the last point's episodes that all these schemes played, [N, E]."""
        missing = np.full((len(self.runs), 1), np.nan)
        rows = [self.final.get(name, missing) for name in (scheme, *beside)]
        return np.where(np.isfinite(sum(rows)), rows[0], np.nan)

    def follows(self, *schemes: str) -> bool:
        """Whether a run has all these schemes at every point of several."""
        together = np.sum([self.curve(scheme) for scheme in schemes], axis=0)
        return len(self.steps) > 1 and bool(np.isfinite(together).all(axis=1).any())

    def shipped(self, scheme: str, *beside: str) -> Floats:
        """The normalised score at the end of the run, [N]; NaN for a run that lacks it.

        `beside` are others to compare it with: episodes that one of them did not play are out.
        """
        return self.normalise(each(self.episodes(scheme, *beside), np.mean))

    def late(self, scheme: str, *beside: str) -> Floats:
        """The normalised mean over the points from `LATE` of the run on, [N]; NaN as above."""
        points = self.curve(scheme)[:, is_late(self.steps, self.steps[-1])]
        points[:, -1] = self.shipped(scheme, *beside)
        return np.asarray(points.mean(axis=1))

    def worst(self, scheme: str, *beside: str) -> Floats:
        """The normalised mean of the worst tenth of the last point's episodes, [N]."""
        episodes = self.episodes(scheme, *beside)
        return self.normalise(each(episodes, lambda row: mean_of_worst(row.tolist(), 0.1)))

    def wobble(self, scheme: str) -> Floats:
        """The standard deviation of each run's curve over (50 %, 75 %] of the run, [N].

        It lies before every endpoint, so that what it predicts is not made of the same numbers.
        """
        before = self.curve(scheme)[:, (self.share > 0.5) & (self.share <= 0.75)]
        if before.shape[1] < 2:
            return np.full(len(self.runs), np.nan)
        return np.asarray(before.std(axis=1, ddof=1))


def each(rows: Floats, statistic: Callable[[Floats], Any]) -> Floats:
    """The statistic of what is not NaN in each row, [N, E] -> [N]; NaN where nothing is."""
    parts = (row[np.isfinite(row)] for row in rows)
    return np.array([statistic(part) if part.size else np.nan for part in parts])


def result_files(paths: Sequence[Path]) -> list[Path]:
    """The CSV files named, and those in the folders named, at any depth."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"results must be a CSV file or a folder of them, got {path}: no such")
        endings = ("*.csv", "*.csv.gz", "*.csv.xz")
        found = [path] if path.is_file() else [f for ending in endings for f in path.rglob(ending)]
        files += sorted(f for f in found if not f.name.startswith("runs.csv"))
    if not paths:
        raise ValueError("give results: CSV files, or folders of them")
    if not files:
        said = [*map(str, paths)]
        raise ValueError(f"expected .csv, .csv.gz or .csv.xz files, found none in {said}")
    return list(dict.fromkeys(files))


def read_table(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV file, packed where its name ends in .gz or .xz, each with its place.

    Raises:
        ValueError: The file is no table.
    """
    try:
        opened: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
        with cast(TextIO, opened(path, "rt", encoding="utf-8", newline="")) as lines:
            rows = csv.DictReader(lines)
            if missing := [c for c in COLUMNS if c not in (rows.fieldnames or [])]:
                raise ValueError(f"{path}: expected the columns {COLUMNS}, missing {missing}")
            for row in rows:
                yield f"{path}, line {rows.line_num}", row
    except (csv.Error, UnicodeError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path}: cannot be read as a table, {error}") from None


Episodes = dict[tuple[str, int], dict[str, float]]  # (scheme, step) -> episode -> return


def read_results(files: Iterable[Path], scales: Mapping[str, Scale] = SCALES) -> list[Stratum]:
    """All strata in tidy CSV files, in order of their names; see `read_episodes`."""
    return [stratum(key, runs, scales.get(key[0])) for key, runs in read_episodes(files).items()]


def read_episodes(files: Iterable[Path]) -> dict[Key, dict[tuple[str, str], Episodes]]:
    """What tidy CSV files hold, by stratum in order and by (run, seed).

    Raises:
        ValueError: A row is none, or contradicts another; one that is given twice counts once.
    """
    table: dict[Key, dict[tuple[str, str], Episodes]] = {}
    for path in files:
        for place, row in read_table(path):
            try:
                step, score = int(float(row["step"])), float(row["return"])
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{place}: step and return must be numbers, {error}") from None
            if not math.isfinite(score):
                raise ValueError(f"{place}: return must be finite, got {score}")
            if step < 0 or any(row[column] is None for column in COLUMNS):
                raise ValueError(f"{place}: expected {len(COLUMNS)} values and a step from 0 on")
            runs = table.setdefault((row["env"], row["algo"], row.get("variant") or ""), {})
            episodes = runs.setdefault((row["run"], row["seed"]), {})
            cell = episodes.setdefault((row["scheme"], step), {})
            if cell.setdefault(row["episode"], score) != score:
                raise ValueError(
                    f"{place}: one return an episode, got {cell[row['episode']]} and {score}"
                    f" for run {row['run']}, {row['scheme']}, step {step}"
                )
    return dict(sorted(table.items()))


def stratum(key: Key, table: dict[tuple[str, str], Episodes], scale: Scale | None) -> Stratum:
    """Lay out one stratum's episodes as arrays; runs must share their evaluation steps."""
    runs = sorted(table, key=lambda run: (natural(run[1]), run[0]))
    evaluated = {run: {step for _, step in table[run]} for run in runs}
    _, grid = max((len(steps), sorted(steps)) for steps in evaluated.values())
    for run in runs:
        if alien := evaluated[run] - set(grid):
            raise ValueError(
                f"runs of {key} must be evaluated at the same steps,"
                f" got {sorted(alien)[:3]} in run {run[0]} alone"
            )
    column = {step: j for j, step in enumerate(grid)}
    named = {scheme for episodes in table.values() for scheme, _ in episodes}
    schemes = sorted(named, key=rank)
    scores = {scheme: np.full((len(runs), len(grid)), np.nan) for scheme in schemes}
    ends = [cell for every in table.values() for (_, at), cell in every.items() if at == grid[-1]]
    place = {name: i for i, name in enumerate(sorted({*chain(*ends)}, key=natural))}
    final = {scheme: np.full((len(runs), len(place)), np.nan) for scheme in schemes}
    for i, run in enumerate(runs):
        for (scheme, step), cell in table[run].items():
            scores[scheme][i, column[step]] = np.mean([*cell.values()])
            if step == grid[-1]:
                for episode, score in cell.items():
                    final[scheme][i, place[episode]] = score
    names, seeds = zip(*runs, strict=True)
    return Stratum(*key, list(names), list(seeds), np.array(grid, float), scores, final, scale)


def natural(number: str) -> tuple[int, str]:
    """Sorts seed 2 before seed 10."""
    return len(number), number


def rank(scheme: str) -> tuple[int, str]:
    """Where a scheme stands in a table: known ones in order, then others by name."""
    known = list(KNOWN)
    return (known.index(scheme) if scheme in known else len(known), scheme)


def label(scheme: str) -> str:
    """A scheme in words."""
    return KNOWN[scheme].label if scheme in KNOWN else scheme


def place_of(scheme: str) -> tuple[str, float] | None:
    """A scheme's place in the figure of the averages."""
    return KNOWN[scheme].place if scheme in KNOWN else None


def read_runs(files: Iterable[Path]) -> tuple[list[Run], dict[str, Any]]:
    """The planned runs in runs.json or runs.csv beside the results, and what else is said there.

    Raises:
        ValueError: Such a file is no list of runs.
    """
    runs: dict[tuple[str, ...], Run] = {}
    about: dict[str, Any] = {}
    for folder in dict.fromkeys(path.parent for path in files):
        entries: list[Any] = []
        try:
            if (path := folder / "runs.json").exists():
                said = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(said, dict):
                    scores = {"scores": said["scores"]} if "scores" in said else {}
                    about |= {key: str(said[key]) for key in said if key != "runs"} | scores
                    said = said.get("runs", [])
                entries += said
            if (path := folder / "runs.csv").exists():
                with path.open(encoding="utf-8", newline="") as lines:
                    entries += csv.DictReader(lines)
            planned = [planned_run(entry) for entry in entries]
        except (ValueError, TypeError, KeyError, RecursionError, csv.Error, OSError) as error:
            raise ValueError(f"{path}: not a list of runs, {error or 'too deep'}") from None
        runs |= {(*run.key, run.run): run for run in planned}
    return list(runs.values()), about


def planned_run(entry: Any) -> Run:
    """A run as runs.json or runs.csv has it."""
    if not isinstance(entry, dict):
        raise ValueError(f"a run must have names and values, got {str(entry)[:60]}")
    if missing := [k for k in ("run", "env", "algo", "seed", "status") if k not in entry]:
        raise ValueError(f"missing {missing} in {str(entry)[:200]}")
    config = entry.get("config") or {}
    if isinstance(config, str):
        config = json.loads(config)
    seconds, evaluating = (
        None if entry.get(name) in (None, "") else float(entry[name])
        for name in ("seconds", "evaluating")
    )
    key = (str(entry["env"]), str(entry["algo"]), str(entry.get("variant") or ""))
    status = str(entry["status"]).replace("_", " ")
    config = {str(name): str(value) for name, value in dict(config).items()}
    return Run(*key, str(entry["run"]), str(entry["seed"]), status, seconds, evaluating, config)
