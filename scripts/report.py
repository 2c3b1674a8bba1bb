"""The report of a comparison: tidy results in, one HTML page, Markdown and figures out.

    python -m scripts.report RESULTS [--out DIR]

RESULTS are CSV files (also .csv.gz) or folders of them, one row an evaluation episode, from
whatever tool, with the columns

    run, env, algo, seed, scheme, step, episode, return   and, optionally, variant

`scheme` names the policy evaluated: `last` or an average of the same run. Runs with a `variant`
(`lr=linear`, `target=soft:0.01`) are strata of their own and never enter the main analysis.
A `runs.json` or `runs.csv` beside the results lists the planned runs (run, env, algo, seed,
variant, status, and where known seconds and config), so that crashed and missing runs are told, not
dropped.
"""

# ruff: noqa: RUF001  (the text has minus signs, dashes and Greek letters, and means them)

import base64
import csv
import gzip
import html
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

import matplotlib
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts import stats
from scripts.stats import Floats, Interval

COLUMNS = ("run", "env", "algo", "seed", "scheme", "step", "episode", "return")
BASE = "last"
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

SCHEMES = {  # in the order of the tables
    "last": "last iterate",
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
    "target": "DDPG's target actor",
    "best": "best checkpoint, fresh episodes (oracle)",
    "placebo": "last iterate, other episodes (placebo)",
}

# Okabe and Ito's colours, told apart with any colour vision.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, GREY = "#0072B2", "#D55E00", "#767676"


# --- reading -------------------------------------------------------------------------------------


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
        return present((self.endpoint(scheme) - self.endpoint(BASE)) / self.span)

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


# --- analysis ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A scheme against last over the paired runs of one or more strata."""

    strata: list[Stratum]
    runs: int
    iqm: Interval  # of the paired differences; NaN ends where no interval may be printed
    mean: Interval
    ties: float  # share of differences that are exactly 0
    wins: int
    losses: int
    better: Interval  # probability of improvement
    p: float  # sign flips of the IQM, or of the mean where ties forbid the IQM; NaN under five runs

    @property
    def tied(self) -> bool:
        """Whether ties forbid an IQM interval, so that the mean speaks."""
        return self.ties > TIES

    @property
    def main(self) -> Interval:
        """The interval that the conclusion rests on."""
        return self.mean if self.tied else self.iqm

    @property
    def known(self) -> bool:
        """Whether the differences are normalised."""
        return all(s.known for s in self.strata)

    @property
    def measure(self) -> str:
        """What `main` is an interval of."""
        return "mean" if self.tied else "interquartile mean"

    @property
    def verdict(self) -> str:
        """One word for what the interval allows to say."""
        if self.runs < FEWEST:
            return "too few runs"
        if self.wins == self.losses == 0:
            return "all tied"
        by_flips = self.ties > MANY_TIES and self.p <= 0.05  # no interval to go by
        if self.main.low > 0 or (by_flips and self.mean.estimate > 0):
            return "better"
        if self.main.high < 0 or (by_flips and self.mean.estimate < 0):
            return "worse"
        if self.known and self.main.inside(MARGIN):
            return "no difference"
        return "open"


def point(estimate: Floats) -> Interval:
    """An estimate without an interval."""
    return Interval(estimate, np.full_like(estimate, np.nan), np.full_like(estimate, np.nan))


def iqm_of(x: Floats, value: float | None = None) -> Interval:
    """The IQM of one stratum's runs [n], with its interval where runs and ties allow one."""
    if x.size < FEWEST or stats.tie_share(x, value) > TIES:
        return point(stats.iqm(x))
    return stats.iqm_interval(x)


def mean_of(*strata: Floats) -> Interval:
    """The mean over the runs of strata, with its interval where runs and ties allow one."""
    pooled = np.concatenate(strata)
    if min(x.size for x in strata) < FEWEST or stats.tie_share(pooled, 0.0) > MANY_TIES:
        return point(stats.mean(pooled))
    return stats.mean_interval(*strata)


def compare(
    strata: Sequence[Stratum], scheme: str, rng: np.random.Generator, resamples: int
) -> Comparison | None:
    """The scheme against last, by whole runs; None where no run has both."""
    strata = [s for s in strata if s.difference(scheme).size]
    return weigh(strata, [s.difference(scheme) for s in strata], rng, resamples) if strata else None


def weigh(
    strata: Sequence[Stratum], d: Sequence[Floats], rng: np.random.Generator, resamples: int
) -> Comparison:
    """All that is said of paired differences d, one array [n] for each stratum.

    Over one stratum the IQM's interval is Tukey and McLaughlin's, over several the bootstrap's.
    """
    pooled = np.concatenate(d)
    ties = stats.tie_share(pooled, 0.0)
    if len(d) == 1 or ties > TIES:
        iqm = iqm_of(pooled, 0.0)
    else:
        iqm = stats.bootstrap_interval(d, rng, resamples=resamples)
    statistic = stats.mean if ties > TIES else stats.iqm
    return Comparison(
        strata=list(strata),
        runs=pooled.size,
        iqm=iqm,
        mean=mean_of(*d),
        ties=ties,
        wins=int((pooled > 0).sum()),
        losses=int((pooled < 0).sum()),
        better=stats.share_interval(stats.improvement_probability(pooled), pooled.size),
        p=math.nan if pooled.size < FEWEST else stats.sign_flip_p(d, rng, statistic, resamples),
    )


def band(x: Floats, rng: np.random.Generator, value: float | None = None) -> Interval:
    """The IQM of curves [n, P] with a simultaneous band; no band under five runs or where tied."""
    out = point(stats.iqm(x.T))
    free = np.array([stats.tie_share(p, value) <= TIES for p in x.T])
    if len(x) >= FEWEST and free.any():
        held = stats.simultaneous_band(x[:, free], rng)
        out.low[free], out.high[free] = held.low, held.high
    return out


def stability(stratum: Stratum, scheme: str) -> dict[str, Floats]:
    """What each run's late evaluations say beyond their mean, normalised, [N] each."""
    scores, tails = stratum.scores[scheme], stratum.endpoint(scheme, stratum.tails)
    whole = np.isfinite(scores).all(axis=1)
    sd, drop = np.full((2, len(scores)), np.nan)
    if whole.any() and scores.shape[1] >= 2:
        sd[whole] = stats.late_sd(scores[whole]) / stratum.span
        drop[whole] = stats.max_drawdown(scores[whole]) / stratum.span
    return {"SD within run": sd, "CVaR 10 %": stratum.normalise(tails), "drawdown": drop}


# --- numbers as text -----------------------------------------------------------------------------


def number(x: float, normalised: bool = True, sign: bool = False) -> str:
    """Three decimals of a normalised score, four digits of a raw one; a true minus."""
    decimals = 3 if normalised or x == 0 else max(0, 3 - math.floor(math.log10(abs(x))))
    return f"{x:{'+' if sign else ''}.{decimals}f}".replace("-", "−")


def interval(x: Interval, normalised: bool = True, sign: bool = True) -> str:
    """As in "+0.153 [+0.021, +0.280]", or the estimate alone where there are no ends."""
    text = number(float(x.estimate), normalised, sign)
    if np.isnan(x.low):
        return text
    ends = (number(float(end), normalised, sign) for end in (x.low, x.high))
    return f"{text} [{', '.join(ends)}]"


def p_value(p: float) -> str:
    """As in "0.013"; never 0."""
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def percent(x: float) -> str:
    """A share in whole per cent."""
    return f"{100 * x:.0f} %"


def listing(words: Sequence[str]) -> str:
    """As in "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def counted(s: Stratum, runs: int) -> str:
    """As in "DQN CartPole-v1 (7 runs, indicative)"."""
    return f"{s.name} ({runs} run{'s' * (runs != 1)}{', indicative' * (runs < FIRM)})"


def averaging(scheme: str) -> str:
    """The scheme as the subject of a sentence."""
    if match := re.fullmatch(r"suffix([\d.]+)", scheme):
        return f"Averaging the policy's weights uniformly over the last {match[1]} % of training"
    return f"Averaging the policy's weights ({SCHEMES.get(scheme, scheme)})"


def finding(c: Comparison, scheme: str) -> str:
    """What was found, for which environments, with the interval: the report's first sentence."""
    match c.verdict:
        case "better" | "worse":
            found = f"scored {'higher' if c.verdict == 'better' else 'lower'} than the last iterate"
            found += ", yet by less than 2 %," if c.known and c.main.inside(MARGIN) else ""
        case "no difference":
            found = "made no difference that matters (the interval lies inside ±2 %)"
        case "all tied":
            found = "changed nothing (every pair is an exact tie)"
        case "too few runs":
            found = "was tried in too few runs to conclude anything"
        case _:
            found = "showed no clear effect, nor can one be excluded,"
    where = listing([counted(s, s.difference(scheme).size) for s in c.strata])
    numbers = [
        f"{c.measure} of the paired differences {interval(c.main, c.known)} in"
        f" {'normalised' if c.known else 'raw'} score"
    ]
    if not np.isnan(c.main.low):
        numbers.append("95 % interval")
    if not math.isnan(c.p):
        numbers.append(f"sign-flip p {p_value(c.p) if c.p < 0.001 else '= ' + p_value(c.p)}")
    if c.tied:
        numbers.append(f"{percent(c.ties)} of the pairs tied exactly")
    return f"{averaging(scheme)} {found} on {where}: {', '.join(numbers)}."


# --- figures -------------------------------------------------------------------------------------

STYLE = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "legend.fontsize": 10,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "polyak_rl",  # the same results draw the same file
}
WIDTH = 5.6  # inches


def panels(
    strata: Sequence[Stratum], height: float, rows: int = 1, ratios: Sequence[float] = (1,)
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with a column of `rows` axes for each stratum, two strata side by side."""
    across = min(2, len(strata))
    down = math.ceil(len(strata) / across)
    figure = Figure(figsize=(WIDTH, height * down + 0.6), layout="constrained")
    grid = figure.subplots(
        down * rows, across, squeeze=False, gridspec_kw={"height_ratios": [*ratios] * down}
    )
    for unused in grid[(down - 1) * rows :, 1:].ravel() if len(strata) % across else ():
        unused.set_axis_off()
    cells = [
        grid[i // across * rows : i // across * rows + rows, i % across] for i in range(len(strata))
    ]
    for s, column in zip(strata, cells, strict=True):
        column[0].set_title(s.name.replace(" ", "\n", 1), loc="left")
    return figure, [list(column) for column in cells]


def thousands(steps: Floats) -> tuple[Floats, str]:
    """Steps in the unit that keeps tick labels short."""
    if steps.max() >= 1e6:
        return steps / 1e6, "steps (millions)"
    if steps.max() >= 1e4:
        return steps / 1e3, "steps (thousands)"
    return steps, "steps"


def zero(axes: Axes, known: bool = True, vertical: bool = True) -> None:
    """The line of no difference, and around it what does not matter."""
    line, span = (axes.axvline, axes.axvspan) if vertical else (axes.axhline, axes.axhspan)
    if known:
        span(-MARGIN, MARGIN, color=GREY, alpha=0.2, linewidth=0)
    line(0, color=BLACK, linewidth=0.8)


def bar(axes: Axes, x: float, y: float, i: Interval, vertical: bool = False, **style: Any) -> None:
    """An estimate at (x, y) with its interval, or a hollow marker where there is none."""
    if np.isnan(i.low):
        style |= {"markerfacecolor": "white"}
        axes.plot(x, y, linestyle="none", **style)
        return
    half = [[float(i.estimate - i.low)], [float(i.high - i.estimate)]]
    axes.errorbar(x, y, **{"yerr" if vertical else "xerr": half}, linestyle="none", **style)


def draw_forest(rows: Sequence[Comparison], total: Comparison | None) -> Figure:
    """Each environment's difference with its interval, and the aggregate below."""
    everything = [*rows, *([total] if total else [])]
    figure = Figure(figsize=(WIDTH, 0.62 * len(everything) + 1.1), layout="constrained")
    axes = figure.subplots()
    zero(axes)
    for y, c in enumerate(everything):
        shape = (
            {"marker": "D", "color": BLACK, "markersize": 8}
            if c is total
            else {"marker": "s" if c.tied else "o", "color": BLUE, "markersize": 7}
        )
        bar(axes, float(c.main.estimate), -y, c.main, **shape)
    names = [
        c.strata[0].name.replace(" ", "\n", 1) if c is not total else "all runs" for c in everything
    ]
    axes.set_yticks(
        range(0, -len(everything), -1),
        [f"{name} (n={c.runs})" for name, c in zip(names, everything, strict=True)],
    )
    if total:
        axes.axhline(0.5 - len(rows), color=GREY, linewidth=0.6)
    axes.set_ylim(-len(everything) + 0.4, 0.6)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel("difference from last\n(normalised; → averaging better)")
    return figure


def draw_curves(strata: Sequence[Stratum], scheme: str, rng: np.random.Generator) -> Figure:
    """Learning curves of last and the average, and their paired difference below."""
    figure, cells = panels(strata, 3.3, rows=2, ratios=(1.6, 1))
    for s, (above, below) in zip(strata, cells, strict=True):
        last, average = s.curves(BASE, scheme)
        x, unit = thousands(s.steps)
        for y, color, style, label in (
            (last, ORANGE, "--", "last iterate"),
            (average, BLUE, "-", SCHEMES.get(scheme, scheme)),
        ):
            middle = band(y, rng)
            above.plot(x, middle.estimate, style, color=color, label=label)
            above.fill_between(x, middle.low, middle.high, color=color, alpha=0.22, linewidth=0)
        above.tick_params(labelbottom=False)
        above.set_ylabel("score")
        zero(below, s.known, vertical=False)
        middle = band(average - last, rng, 0.0)
        below.plot(x, middle.estimate, color=GREEN)
        below.fill_between(x, middle.low, middle.high, color=GREEN, alpha=0.25, linewidth=0)
        below.set_ylabel("difference")
        below.set_xlabel(unit)
        for axes in (above, below):
            axes.locator_params(axis="y", nbins=4)
            axes.locator_params(axis="x", nbins=5)
    figure.legend(*cells[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def draw_profile(strata: Sequence[Stratum], scheme: str) -> Figure:
    """The share of runs above each score, pooled over environments."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    ends = {
        name: np.concatenate([s.normalise(s.endpoint(name))[paired(s, scheme)] for s in strata])
        for name in (BASE, scheme)
    }
    everything = np.concatenate(list(ends.values()))
    at = np.linspace(min(0, everything.min()), max(1, everything.max()), 201)
    for (name, x), color, style in zip(ends.items(), (ORANGE, BLUE), ("--", "-"), strict=True):
        share = stats.share_interval(stats.performance_profile(x, at), x.size)
        label = f"{SCHEMES.get(name, name)}"
        axes.step(at, share.estimate, style, where="post", color=color, label=label)
        if x.size >= FEWEST:
            axes.fill_between(
                at, share.low, share.high, step="post", color=color, alpha=0.2, linewidth=0
            )
    axes.set(xlabel="normalised score τ", ylabel="share of runs above τ", ylim=(0, 1.02))
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def paired(s: Stratum, scheme: str) -> np.ndarray:
    """Which runs have an endpoint of both last and the scheme, [N]."""
    return np.isfinite(s.endpoint(scheme)) & np.isfinite(s.endpoint(BASE))


def draw_sensitivity(strata: Sequence[Stratum]) -> Figure:
    """The difference against where uniform averaging starts, and against EMA's half-life."""
    figure = Figure(figsize=(WIDTH, 1.75 * len(strata) + 0.9), layout="constrained")
    grid = figure.subplots(len(strata), 2, sharey="row", sharex="col", squeeze=False)
    for s, row in zip(strata, grid, strict=True):
        starts = {
            100 - float(m[1]): scheme
            for scheme in s.scores
            if (m := re.fullmatch(r"suffix([\d.]+)", scheme))
        }
        if "uniform0" in s.scores:
            starts[0.0] = "uniform0"
        halves = {
            float(m[1]): scheme
            for scheme in s.scores
            if (m := re.fullmatch(r"ema([\d.]+)", scheme))
        }
        for axes, schemes, color in zip(row, (starts, halves), (BLUE, RED), strict=True):
            zero(axes, s.known, vertical=False)
            found = {x: s.difference(scheme) for x, scheme in sorted(schemes.items())}
            effects = {x: iqm_of(d, 0.0) for x, d in found.items() if d.size}
            axes.plot([*effects], [e.estimate for e in effects.values()], color=color, linewidth=1)
            for x, effect in effects.items():
                bar(axes, x, float(effect.estimate), effect, True, marker="o", color=color)
            axes.locator_params(axis="y", nbins=4)
        row[0].set_ylabel("difference")
        row[0].set_title(s.name, loc="left")
    grid[-1, 0].set_xlabel("averaging starts at\n(% of the run)")
    grid[-1, 0].set_xticks([0, 25, 50, 75])
    grid[-1, 1].set_xlabel("EMA's half-life\n(% of the run)")
    grid[-1, 1].set_xscale("log")
    grid[-1, 1].set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
    return figure


def draw_stability(strata: Sequence[Stratum], scheme: str) -> Figure:
    """Paired differences of spread, tail and drawdown, environment by environment."""
    figure = Figure(figsize=(WIDTH, 0.55 * len(strata) + 1.5), layout="constrained")
    columns = figure.subplots(1, 3, sharey=True)
    for y, s in enumerate(strata):
        base, average = stability(s, BASE), stability(s, scheme)
        for axes, name in zip(columns, base, strict=True):
            d = 100 * present(average[name] - base[name])
            if d.size:
                bar(axes, float(d.mean()), -y, mean_of(d), marker="o", color=BLUE)
    arrows = ("← steadier\n(%)", "better tail →\n(%)", "← smaller\n(%)")
    for axes, name, arrow in zip(columns, base, arrows, strict=True):
        zero(axes, known=False)
        axes.set_title(f"{name} ".replace(" ", "\n", 1))
        axes.set_xlabel(arrow)
        axes.locator_params(axis="x", nbins=3)
        axes.set_ylim(-len(strata) + 0.4, 0.6)
    columns[0].set_yticks(
        range(0, -len(strata), -1), [s.name.replace(" ", "\n", 1) for s in strata]
    )
    return figure


def draw_line(strata: Sequence[Stratum], scheme: str) -> Figure:
    """The return along the line from the last weights to the averaged ones."""
    figure, cells = panels(strata, 2.1)
    for s, (axes,) in zip(strata, cells, strict=True):
        zero(axes, s.known, vertical=False)
        points = line_points(s, scheme)
        axes.plot([*points], [e.estimate for e in points.values()], color=GREEN, linewidth=1)
        for x, effect in points.items():
            bar(axes, x, float(effect.estimate), effect, True, marker="o", color=GREEN)
        axes.set_xticks([-0.5, 0, 0.5, 1, 1.5], ["−½", "last", "½", "avg", "1½"])
        axes.set_ylabel("difference")
        axes.locator_params(axis="y", nbins=4)
    return figure


def line_points(s: Stratum, scheme: str) -> dict[float, Interval]:
    """At the last point, theta_last + x (theta_average - theta_last) against x = 0."""
    at = {
        float(m[1]): scores[:, -1]
        for name, scores in s.scores.items()
        if (m := re.fullmatch(r"line(-?[\d.]+)", name))
    }
    if not at:
        return {}
    if scheme in s.scores:
        at.setdefault(1.0, s.scores[scheme][:, -1])
    origin = at.setdefault(0.0, s.scores[BASE][:, -1])
    effects = {x: present((score - origin) / s.span) for x, score in sorted(at.items())}
    return {x: iqm_of(d, None if x == 0 else 0.0) for x, d in effects.items() if d.size}


def draw_decay(pairs: Sequence[tuple[Stratum, Stratum]], scheme: str) -> Figure:
    """The 2 x 2: constant or decaying learning rate, last or averaged policy."""
    figure, cells = panels([plain for plain, _ in pairs], 2.4)
    for pair, (axes,) in zip(pairs, cells, strict=True):
        for name, color, style, shift in ((BASE, ORANGE, "--", -0.04), (scheme, BLUE, "-", 0.04)):
            cell = [iqm_of(present(s.normalise(s.endpoint(name)))) for s in pair]
            at = [0 + shift, 1 + shift]
            label = SCHEMES.get(name, name)
            axes.plot(at, [c.estimate for c in cell], style, color=color, label=label)
            for x, c in zip(at, cell, strict=True):
                bar(axes, x, float(c.estimate), c, True, marker="o", color=color)
        axes.set_xlim(-0.4, 1.4)
        axes.set_xticks([0, 1], ["constant", "decay"])
        axes.set_ylabel("score")
        axes.locator_params(axis="y", nbins=4)
    figure.legend(*cells[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def draw_targets(studies: Sequence[Sequence[tuple[int, Stratum, Stratum]]]) -> Figure:
    """The final score with hard and soft target networks of matched mean age."""
    figure, cells = panels([study[0][1] for study in studies], 2.4)
    for study, (axes,) in zip(studies, cells, strict=True):
        s = study[0][1]
        axes.set_title(f"{s.algo.upper()}\n{s.env}", loc="left")
        periods = [period for period, _, _ in study]
        _, hard, soft = zip(*study, strict=True)
        for kind, label, color, style, shift in (
            (hard, "hard copy", ORANGE, "--", 0.96),
            (soft, "soft", BLUE, "-", 1.04),
        ):
            at = [period * shift for period in periods]
            cell = [iqm_of(present(s.normalise(s.endpoint(BASE)))) for s in kind]
            axes.plot(at, [c.estimate for c in cell], style, color=color, label=label)
            for x, c in zip(at, cell, strict=True):
                bar(axes, x, float(c.estimate), c, True, marker="o", color=color)
        axes.set_xscale("log")
        axes.set_xticks(periods, [str(period) for period in periods])
        axes.minorticks_off()
        axes.set_xlim(min(periods) / 1.6, max(periods) * 1.6)
        axes.set_xlabel("C (soft: τ = 2 / (C + 1))")
        axes.set_ylabel("score of last")
        axes.locator_params(axis="y", nbins=4)
    figure.legend(*cells[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


# --- the page ------------------------------------------------------------------------------------

CSS = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 70rem; margin: 0 auto; padding: 1rem 1rem 4rem; overflow-wrap: anywhere; }
p, ul, figure { max-width: 46rem; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2.6rem; border-bottom: 1px solid #ddd; padding-bottom: .25rem; }
p.finding { font-size: 1.1rem; border-left: 4px solid #0072B2; padding-left: .9rem; }
.scroll { overflow-x: auto; overflow-wrap: normal; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem .3rem 0; text-align: left; white-space: nowrap;
         border-bottom: 1px solid #e6e6e6; vertical-align: top; }
th { border-bottom: 2px solid #999; white-space: normal; vertical-align: bottom; }
figure { margin: 1.2rem 0; }
figure img { width: 100%; max-width: 38rem; height: auto; }
figcaption, .caption { color: #444; font-size: .9rem; }
code { font-size: .9em; }
"""


class Page:
    """One text, written as Markdown and as HTML at once; `**bold**` and `code` mean the same."""

    def __init__(self, title: str, out: Path) -> None:
        self.out = out
        (out / "figures").mkdir(parents=True, exist_ok=True)
        self.title = title
        self.markdown = [f"# {title}"]
        self.html = [f"<h1>{self.inline(title)}</h1>"]

    @staticmethod
    def inline(text: str) -> str:
        """The text with its two kinds of mark-up as HTML."""
        text = html.escape(text, quote=False).replace(" %", "&nbsp;%")
        text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
        return re.sub(r"`(.+?)`", r"<code>\1</code>", text)

    def heading(self, text: str) -> None:
        """Begin a section."""
        self.markdown.append(f"## {text}")
        self.html.append(f"<h2>{self.inline(text)}</h2>")

    def text(self, text: str, finding: bool = False) -> None:
        """A paragraph, set off where it is the finding."""
        self.markdown.append(f"**{text}**" if finding else text)
        self.html.append(f"<p{' class=finding' * finding}>{self.inline(text)}</p>")

    def bullets(self, items: Sequence[str]) -> None:
        """A list, or nothing."""
        if items:
            self.markdown.append("\n".join(f"- {item}" for item in items))
            rows = "\n".join(f"<li>{self.inline(item)}</li>" for item in items)
            self.html.append(f"<ul>\n{rows}\n</ul>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table, which scrolls by itself on a narrow screen."""
        cells = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
        cells.insert(1, ["---"] * len(header))
        self.markdown.append("\n".join(f"| {' | '.join(row)} |" for row in cells))
        head = "".join(f"<th>{self.inline(cell)}</th>" for cell in header)
        body = "\n".join(
            "<tr>" + "".join(f"<td>{self.inline(cell)}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        self.html.append(
            f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody></table></div>"
        )

    def figure(self, name: str, figure: Figure, caption: str) -> None:
        """Save the figure as PNG and SVG, and embed the latter."""
        png, svg = (self.out / "figures" / f"{name}.{kind}" for kind in ("png", "svg"))
        figure.savefig(png, dpi=200)
        figure.savefig(svg, metadata={"Date": None})
        self.markdown.append(f"![{re.split('[.,:;]', caption)[0]}](figures/{png.name})")
        self.markdown.append(caption)
        data = base64.b64encode(svg.read_bytes()).decode()
        self.html.append(
            f'<figure><img alt="{html.escape(caption)}" src="data:image/svg+xml;base64,{data}">\n'
            f"<figcaption>{self.inline(caption)}</figcaption></figure>"
        )

    def save(self) -> None:
        """Write report.md and report.html."""
        (self.out / "report.md").write_text("\n\n".join(self.markdown) + "\n", encoding="utf-8")
        body = "\n".join(self.html)
        (self.out / "report.html").write_text(
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(self.title)}</title>\n<style>{CSS}</style>\n</head>\n"
            f"<body>\n{body}\n</body>\n</html>\n",
            encoding="utf-8",
        )


# --- the report ----------------------------------------------------------------------------------

WORDS = {
    "better": "better",
    "worse": "worse",
    "no difference": "no difference that matters",
    "all tied": "all runs tied",
    "open": "not settled",
    "too few runs": "too few runs",
}


@dataclass(frozen=True)
class Options:
    """What to report and where."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """CSV files in the tidy columns (also .csv.gz), or folders of them."""
    out: Path | None = None
    """Folder for report.html, report.md and figures/ (default: the first results' folder)."""
    primary: str = "suffix50"
    """The scheme of the one primary comparison against last."""
    resamples: int = 10_000
    """Bootstrap resamples, and sign flips."""


def write_report(options: Options) -> Path:
    """Read the results, write the report, and say where it is."""
    files = result_files(options.results)
    strata = read_results(files)
    planned, about = read_runs(files)
    main = [s for s in strata if not s.variant]
    if not any(s.difference(options.primary).size for s in main):
        schemes = sorted({scheme for s in main for scheme in s.scores}, key=rank)
        raise ValueError(
            f"expected finished runs with the schemes {BASE} and {options.primary} (--primary) and"
            f" without a variant, got {len(main)} such environments with the schemes {schemes}"
        )
    first = options.results[0]
    out = options.out or (first if first.is_dir() else first.parent)
    page = Page("Does averaging the policy's weights help?", out)
    report = Report(page, options, strata, planned, np.random.default_rng(0))
    report.findings()
    report.curves()
    report.schemes()
    report.sensitivity()
    report.stability()
    report.line()
    report.learning_rate_decay()
    report.target_networks()
    report.variants()
    report.runs(about)
    report.method()
    page.save()
    return out / "report.html"


class Report:
    """The sections of the report, in order; each writes to the page what the results allow."""

    def __init__(
        self,
        page: Page,
        options: Options,
        strata: Sequence[Stratum],
        planned: Sequence[Run],
        rng: np.random.Generator,
    ) -> None:
        self.page, self.planned, self.rng = page, planned, rng
        self.primary, self.resamples = options.primary, options.resamples
        self.strata = strata
        self.main = [s for s in strata if not s.variant]

    def compare(self, strata: Sequence[Stratum], scheme: str) -> Comparison | None:
        """The scheme against last over these strata, None where no run has both."""
        return compare(strata, scheme, self.rng, self.resamples)

    def pooled(self, scheme: str) -> list[Stratum]:
        """The strata that an aggregate may hold: on a known scale, five paired runs or more."""
        return [s for s in self.main if s.known and s.difference(scheme).size >= FEWEST]

    def findings(self) -> None:
        """The first sentence, what it leaves out, each environment, the forest plot."""
        page, primary = self.page, self.primary
        rows = [c for s in self.main if (c := self.compare([s], primary))]
        pooled = self.pooled(primary)
        total = self.compare(pooled, primary) if len(pooled) > 1 else None
        each = [
            f"{counted(c.strata[0], c.runs)}: {WORDS[c.verdict]}, {interval(c.main, c.known)}"
            for c in rows
        ]
        headline = total or next((c for c in rows if c.strata == pooled), None)
        if headline or len(rows) == 1:
            page.text(finding(headline or rows[0], primary), finding=True)
            if len(rows) > 1:
                page.bullets(each)
        else:
            page.text(
                f"{averaging(primary)}, against the last iterate (paired differences, 95 %"
                f" intervals) – {'; '.join(each)}.",
                finding=True,
            )
        if notes := self.caveats(rows, total):
            page.text("To be read with:")
            page.bullets(notes)

        adjusted = np.full(len(rows), np.nan)
        tested = np.array([not math.isnan(c.p) for c in rows])
        adjusted[tested] = stats.holm([c.p for c in rows if not math.isnan(c.p)])
        table = []
        for c, p in zip(rows, adjusted, strict=True):
            (s,) = c.strata
            table.append([s.name, str(c.runs), *self.ends(s), *effects(c), p_value(p), says(c)])
        if total:
            table.append(
                [
                    "**all runs**",
                    str(total.runs),
                    "",
                    "",
                    *effects(total),
                    p_value(total.p),
                    says(total),
                ]
            )
        page.table(
            [
                "",
                "runs",
                "last",
                "averaged",
                "difference, IQM",
                "difference, mean",
                "better / tied / worse",
                "p",
                "",
            ],
            table,
        )
        page.text(
            "Scores are raw interquartile means over runs; differences are paired by run and"
            " normalised so that 0 is a random policy and 1 the reference"
            f"{'' if all(s.known for s in self.main) else ' (raw where there is none)'}."
            " Brackets are 95 % intervals. They are not adjusted for the number of environments;"
            " the p-values of the environments are, by Holm's method. The p-value of all runs is"
            " the one primary test."
        )
        known = [c for c in rows if c.strata[0].known]
        if known:
            page.figure(
                "forest",
                draw_forest(known, total),
                "Difference in final score, averaged minus last, with 95 % intervals. Grey: ±2 %,"
                " too small to matter. Circles: interquartile mean; squares: mean, where ties"
                " forbid the former; hollow: no interval may be given; diamond: all runs.",
            )

    def caveats(self, rows: Sequence[Comparison], total: Comparison | None) -> list[str]:
        """What a reader must know before the numbers."""
        notes = []
        if unknown := [s.name for s in self.main if not s.known]:
            notes.append(
                f"No random and reference score is known for {listing(unknown)}: raw scores, no"
                " statement of equivalence, not in any aggregate."
            )
        if few := [c.strata[0].name for c in rows if c.runs < FEWEST]:
            notes.append(
                f"Under {FEWEST} runs on {listing(few)}: no interval, not in any aggregate."
            )
        if indicative := [c.strata[0].name for c in rows if FEWEST <= c.runs < FIRM]:
            notes.append(f"Under {FIRM} runs, so indicative only: {listing(indicative)}.")
        for c in [*rows, *([total] if total else [])]:
            if c.tied and c.runs >= FEWEST:
                where = "Over all runs" if c is total else f"On {c.strata[0].name}"
                stand_in = "p-value decides" if c.ties > MANY_TIES else "mean stands in"
                notes.append(
                    f"{where}, {percent(c.ties)} of the pairs are exact ties: no interval of the"
                    f" IQM{' nor of the mean' * (c.ties > MANY_TIES)} would cover; the {stand_in}."
                )
        lost = Counter(
            s.name for s, _, status, _ in self.unfinished() if status != "not run" and not s.variant
        )
        if lost:
            each = listing([f"{count} on {name}" for name, count in lost.items()])
            text = f"Runs that ended before their last evaluations: {each}."
            if pooled := self.pooled(self.primary):
                # Both policies of a crashed run fail alike: its paired difference is 0.
                d = [np.append(s.difference(self.primary), np.zeros(lost[s.name])) for s in pooled]
                c = weigh(pooled, d, self.rng, self.resamples)
                text += f" Counting them as no difference: {c.measure} {interval(c.main)}."
            notes.append(text)
        return notes

    def ends(self, s: Stratum) -> list[str]:
        """Raw IQM of last and of the primary scheme over the paired runs."""
        both = paired(s, self.primary)
        schemes = (BASE, self.primary)
        return [number(float(stats.iqm(s.endpoint(n)[both])), normalised=False) for n in schemes]

    def followed(self) -> list[Stratum]:
        """The strata where both policies were evaluated all along, not at the end only."""
        return [s for s in self.main if len(s.steps) > 1 and s.curves(BASE, self.primary)]

    def curves(self) -> None:
        """Learning curves, where the schemes were evaluated all along."""
        strata = self.followed()
        if strata:
            self.page.heading("Learning curves")
            self.page.figure(
                "curves",
                draw_curves(strata, self.primary, self.rng),
                "Above: interquartile mean over runs of the last iterate and of the average of the"
                " run so far; below: of their paired difference. Bands are simultaneous: each holds"
                " at all points at once with 95 %. No band under five runs, or at points where over"
                " a quarter of the runs are tied.",
            )

    def schemes(self) -> None:
        """Every scheme in every environment, then over all of them."""
        page = self.page
        page.heading("Every scheme")
        names = sorted(
            {n for s in self.main for n in s.scores if not n.startswith("line")}, key=rank
        )
        table = []
        placebo = []
        for name in names:
            c = self.compare(self.pooled(name), name)
            if name == BASE or c is None:
                continue
            table.append(
                [
                    label(name),
                    str(len(c.strata)),
                    str(c.runs),
                    *effects(c),
                    interval(c.better, sign=False),
                ]
            )
        if len(self.pooled(self.primary)) > 1:
            page.text("Over all environments on a known scale, against the last iterate:")
            page.table(
                [
                    "scheme",
                    "environments",
                    "runs",
                    "difference, IQM",
                    "difference, mean",
                    "better / tied / worse",
                    "P(improvement)",
                ],
                table,
            )
            pooled = self.pooled(self.primary)
            page.figure(
                "profile",
                draw_profile(pooled, self.primary),
                "Performance profile: the share of runs whose final score is above τ, all"
                " environments pooled; pointwise 95 % intervals (Wilson).",
            )
        for s in self.main:
            page.text(f"**{counted(s, int(paired(s, BASE).sum()))}**")
            rows = []
            for name in (n for n in names if n in s.scores):
                score = iqm_of(present(s.endpoint(name)))
                c = self.compare([s], name)
                if c is None:
                    continue
                cells = ["", "", ""] if name == BASE else effects(c)
                rows.append([label(name), interval(score, False, sign=False), *cells])
                if name == "placebo" and not np.isnan(c.mean.low):
                    placebo.append(c.mean.low > 0 or c.mean.high < 0)
            page.table(
                [
                    "scheme",
                    "score, IQM",
                    "difference, IQM",
                    "difference, mean",
                    "better / tied / worse",
                ],
                rows,
            )
        page.text(
            "Only the primary comparison was planned as a test; the other schemes are shown with"
            " unadjusted intervals and no p-values. † An oracle: it chooses by the evaluations and"
            " no method can. ‡ A placebo: the same weights as last, evaluated on other episodes."
        )
        if placebo:
            page.text(
                f"The placebo's interval of the mean misses 0 on {sum(placebo)} of {len(placebo)}"
                " environments (about 1 in 20 would by chance)."
            )

    def sensitivity(self) -> None:
        """The averaging start and the half-life, where several were evaluated."""
        strata = [
            s for s in self.main if sum(n.startswith(("suffix", "ema")) for n in s.scores) > 2
        ]
        if strata:
            self.page.heading("Where to start, how long to remember")
            self.page.figure(
                "sensitivity",
                draw_sensitivity(strata),
                "Difference from the last iterate (IQM, 95 % intervals, hollow where none may be"
                " given) against where the uniform average starts, and against EMA's half-life."
                " A start or half-life chosen here must be tested on other seeds.",
            )

    def stability(self) -> None:
        """Spread, tail and drawdown of the schemes that were evaluated all along."""
        strata = self.followed()
        if not strata:
            return
        page = self.page
        page.heading("Stability")
        table = []
        for s in strata:
            base = stability(s, BASE)
            for name in s.scores:
                if len(s.curves(BASE, name)) == 0:
                    continue
                measured = stability(s, name)
                cells = []
                for key, x in measured.items():
                    text = number(float(present(x).mean()), s.known)
                    if name != BASE and (d := present(x - base[key])).size:
                        text += f" ({interval(mean_of(d), s.known)})"
                    cells.append(text)
                table.append([s.name, label(name), *cells])
        page.table(["", "scheme", "SD within run", "CVaR 10 %", "maximum drawdown"], table)
        page.text(
            "Means over runs, normalised where a scale is known; in brackets the paired difference"
            " from last with its 95 % interval. SD within run: of the last fifth of evaluations."
            " CVaR 10 %: the mean of the worst tenth of the episodes at the last points. Drawdown:"
            " the largest fall of the learning curve from its best so far."
        )
        if known := [s for s in strata if s.known]:
            page.figure(
                "stability",
                draw_stability(known, self.primary),
                "Averaged minus last, paired, mean with 95 % interval: spread of the late"
                " evaluations inside a run, mean of the worst tenth of the episodes, largest fall"
                " of the curve; in % of the way from random to reference.",
            )

    def line(self) -> None:
        """The return along the line from last to average, where it was evaluated."""
        strata = [s for s in self.main if line_points(s, self.primary)]
        if strata:
            self.page.heading("From the last weights to the averaged ones")
            self.page.figure(
                "line",
                draw_line(strata, self.primary),
                "Difference in return from the last iterate along the straight line through the"
                " last and the averaged weights, at the end of training (IQM, 95 % intervals).",
            )

    def learning_rate_decay(self) -> None:
        """The 2 x 2: does averaging still help where the learning rate decays?"""
        plain = {(s.env, s.algo): s for s in self.main}
        pairs = [
            (plain[s.env, s.algo], s)
            for s in self.strata
            if s.variant == "lr=linear" and (s.env, s.algo) in plain
        ]
        if not pairs:
            return
        page = self.page
        page.heading("Averaging or learning-rate decay")
        table = []
        for pair in pairs:
            rows = {}
            for rate, s in zip(("constant", "linear decay"), pair, strict=True):
                ends = [iqm_of(present(s.normalise(s.endpoint(n)))) for n in (BASE, self.primary)]
                rows[rate] = [
                    *(interval(end, sign=False) for end in ends),
                    interval(mean_of(s.difference(self.primary))),
                ]
            last, average = (by_seed(pair[1], pair[0], n) for n in (BASE, self.primary))
            both = sorted(last.keys() & average.keys())
            if both:
                effects = [np.array([d[seed] for seed in both]) for d in (last, average)]
                rows["decay − constant"] = [
                    interval(mean_of(d)) for d in (*effects, effects[1] - effects[0])
                ]
            table += [[pair[0].name, rate, *cells] for rate, cells in rows.items()]
        page.table(["", "learning rate", "last", "averaged", "averaged − last"], table)
        page.text(
            "Normalised scores: IQM over runs in the first two rows; differences are means, paired"
            " by run across and by training seed down. The last cell is the interaction: below 0,"
            " averaging and decay do the same work."
        )
        page.figure(
            "decay",
            draw_decay(pairs, self.primary),
            "Final score (IQM, 95 % intervals) with a constant and a decaying learning rate.",
        )

    def target_networks(self) -> None:
        """Hard copies every C updates against soft ones of the same mean age."""
        studies = []
        for key in dict.fromkeys((s.env, s.algo) for s in self.strata):
            same = [s for s in self.strata if (s.env, s.algo) == key]
            if matched := list(match_targets(same)):
                studies.append(matched)
        if not studies:
            return
        page = self.page
        page.heading("Hard or soft target networks")
        table = []
        for study in studies:
            for period, hard, soft in study:
                ends = [iqm_of(present(s.normalise(s.endpoint(BASE)))) for s in (hard, soft)]
                d = np.array(list(by_seed(soft, hard, BASE).values()))
                table.append([
                    f"{hard.algo.upper()} {hard.env}",
                    str(period),
                    f"{2 / (period + 1):.4g}",
                    f"{(period - 1) / 2:g}",
                    *(interval(end, sign=False) for end in ends),
                    interval(mean_of(d)) if d.size else "–",
                ])  # fmt: skip
        page.table(["", "C", "τ", "mean age", "hard", "soft", "soft − hard"], table)
        page.text(
            "A hard copy every C updates and a soft update with τ = 2 / (C + 1) have the same mean"
            " age, (C − 1) / 2 updates. Score of the last iterate, normalised: IQM over runs; the"
            " difference is a mean, paired by training seed; 95 % intervals."
        )
        page.figure(
            "targets",
            draw_targets(studies),
            "Final score of the last iterate (IQM, 95 % intervals) with hard and soft targets of"
            " matched mean age.",
        )

    def variants(self) -> None:
        """The primary comparison in each variant."""
        rows = [c for s in self.strata if s.variant and (c := self.compare([s], self.primary))]
        if rows:
            self.page.heading("Variants")
            self.page.text("The primary comparison in every variant; none is in the main analysis.")
            self.page.table(
                [
                    "",
                    "runs",
                    "last",
                    "averaged",
                    "difference, IQM",
                    "difference, mean",
                    "better / tied / worse",
                    "",
                ],
                [
                    [s.name, str(c.runs), *self.ends(s), *effects(c), says(c)]
                    for c in rows
                    for s in c.strata
                ],
            )

    def unfinished(self) -> list[tuple[Stratum, str, str, float]]:
        """(stratum, run, status, last step) of each run without an endpoint, planned or seen."""
        planned: dict[tuple[str, ...], Run] = {(*r.key, r.run): r for r in self.planned}
        empty = np.zeros(0)
        strata = {(s.env, s.algo, s.variant): s for s in self.strata}
        for run in self.planned:  # an environment may have no results at all
            strata.setdefault(run.key, Stratum(*run.key, [], [], empty, {}, {}))
        found = []
        for key, s in strata.items():
            ended = s.endpoint(BASE)
            for i, name in enumerate(s.runs):
                run = planned.pop((*key, name), None)
                if np.isnan(ended[i]) or (run and run.status != "finished"):
                    seen = s.steps[np.isfinite(s.scores[BASE][i])] if BASE in s.scores else empty
                    status = run.status if run and run.status != "finished" else "incomplete"
                    found.append((s, name, status, float(seen.max(initial=0))))
        for run in planned.values():
            status = run.status if run.status != "finished" else "without results"
            found.append((strata[run.key], run.run, status, 0.0))
        return found

    def runs(self, about: dict[str, Any]) -> None:
        """What was planned, what became of it, with which settings and at what cost."""
        page = self.page
        page.heading("Runs")
        page.bullets([f"{key}: `{value}`" for key, value in about.items()])
        unfinished = self.unfinished()
        groups = {s.name: s for s in self.strata} | {s.name: s for s, *_ in unfinished}
        table = []
        for s in groups.values():
            plan = [run for run in self.planned if run.key == (s.env, s.algo, s.variant)]
            lost = Counter(status for group, _, status, _ in unfinished if group.name == s.name)
            seconds = [run.seconds for run in plan if run.seconds is not None]
            table.append([
                s.name,
                str(len(plan)) if plan else "–",
                str(np.isfinite(s.endpoint(BASE)).sum()),
                ", ".join(f"{count} {status}" for status, count in lost.items()) or "none",
                f"{s.steps.max(initial=0):,.0f}".replace(",", " "),
                str(len(s.steps)),
                seeds(s.seeds),
                f"{np.mean(seconds) / 60:.1f}" if seconds else "–",
                f"{sum(seconds) / 3600:.2f}" if seconds else "–",
            ])  # fmt: skip
        page.table(
            [
                "",
                "planned",
                "with an endpoint",
                "not finished",
                "steps",
                "points",
                "seeds",
                "minutes a run",
                "hours in all",
            ],
            table,
        )
        if unfinished:
            page.text("Runs without an endpoint, or not reported as finished:")
            page.table(
                ["", "run", "status", "last evaluated step"],
                [[s.name, run, status, f"{step:.0f}"] for s, run, status, step in unfinished],
            )
        configs = {s.name: c for s in self.strata if (c := settings(s, self.planned))}
        names = sorted({name for config in configs.values() for name in config})
        if names:
            page.text("Hyper-parameters:")
            page.table(
                ["", *configs],
                [[f"`{n}`", *(config.get(n, "–") for config in configs.values())] for n in names],
            )
        else:
            page.text("Hyper-parameters are not recorded in these results.")

    def method(self) -> None:
        """What the numbers mean."""
        points = min(LAST_POINTS, *(len(s.steps) for s in self.main))
        self.page.heading("How it was computed")
        self.page.bullets([
            "All policies of a run come from one training run, which averaging never touches; they"
            " are evaluated on the same episodes, so every comparison is paired by run.",
            f"The endpoint is the mean over the last {points} evaluation points of a run's mean"
            " episode return, normalised as (score − random) / (reference − random). The unit of"
            " every interval and test is the run.",
            f"All runs: stratified percentile bootstrap of the IQM of the paired differences"
            f" ({self.resamples} resamples inside each environment), sign flips of whole runs, t"
            " interval of the mean with Welch's degrees of freedom. One environment: Tukey and"
            " McLaughlin's interval of the IQM, paired t interval of the mean.",
            "In simulation these cover 92–97 % at 10 and 20 runs where the skewness is up to 1;"
            " with exponential scores the t interval covers about 90 % at 10 runs. The bands of the"
            " learning curves, which hold at all points at once, cover 90–96 %.",
            "Where over a quarter of the differences are exactly 0 (a ceiling), no interval of the"
            " IQM is given; nor of a score's where over a quarter of the runs have one value.",
            "“No difference that matters” is said only where the whole 95 % interval lies"
            " inside ±2 % of the way from random to reference.",
        ])  # fmt: skip


def label(scheme: str) -> str:
    """The scheme's name in a table, with the marks of the oracle and the placebo."""
    return SCHEMES.get(scheme, scheme) + {"best": " †", "placebo": " ‡"}.get(scheme, "")


def effects(c: Comparison) -> list[str]:
    """Cells of a comparison: IQM and mean of the differences, and how many runs went which way."""
    tied = c.runs - c.wins - c.losses
    counts = f"{c.wins} / {tied} / {c.losses}"
    return [interval(c.iqm, c.known), interval(c.mean, c.known), counts]


def says(c: Comparison) -> str:
    """The verdict in words."""
    return WORDS[c.verdict] + (", indicative" if FEWEST <= c.runs < FIRM else "")


def by_seed(a: Stratum, b: Stratum, scheme: str) -> dict[str, float]:
    """Normalised endpoint of `a` minus that of `b`, for the training seeds that both have."""
    x, y = a.by_seed(scheme), b.by_seed(scheme)
    return {seed: x[seed] - y[seed] for seed in x if seed in y}


def match_targets(strata: Sequence[Stratum]) -> Iterable[tuple[int, Stratum, Stratum]]:
    """(C, hard, soft) with tau = 2 / (C + 1), up to the rounding of tau in the variant's name."""
    kinds: dict[str, dict[float, Stratum]] = defaultdict(dict)
    for s in strata:
        if match := re.fullmatch(r"target=(hard|soft):([\d.e-]+)", s.variant):
            kinds[match[1]][float(match[2])] = s
    for period, hard in sorted(kinds["hard"].items()):
        for tau, soft in kinds["soft"].items():
            if math.isclose(tau, 2 / (period + 1), rel_tol=0.02):
                yield int(period), hard, soft


def seeds(names: Sequence[str]) -> str:
    """Training seeds, as a range where they are one."""
    if all(name.isdigit() for name in names) and len(names) > 2:
        numbers = sorted(map(int, names))
        if numbers == list(range(numbers[0], numbers[-1] + 1)):
            return f"{numbers[0]}–{numbers[-1]}"
    return ", ".join(names)


def settings(s: Stratum, planned: Sequence[Run]) -> dict[str, str]:
    """The hyper-parameters of a stratum's runs; those that differ between runs are said to."""
    values: dict[str, set[str]] = defaultdict(set)
    for run in planned:
        if run.key == (s.env, s.algo, s.variant):
            for name, value in run.config.items():
                values[name].add(str(value))
    values.pop("seed", None)
    return {name: v.pop() if len(v) == 1 else "varies" for name, v in values.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report and print where it is."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    with matplotlib.rc_context(STYLE):
        try:
            print(write_report(options))
        except ValueError as error:
            raise SystemExit(f"report: {error}") from None


if __name__ == "__main__":
    main()
