"""The figures of the report."""

# ruff: noqa: RUF001  (the text has minus signs, dashes and Greek letters, and means them)

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.experiment import stats
from scripts.experiment.analysis import Comparison, band, iqm_of, mean_of, stability
from scripts.experiment.stats import Floats, Interval
from scripts.experiment.tidy import BASE, FEWEST, MARGIN, SCHEMES, Stratum, present

# Okabe and Ito's colours, told apart with any colour vision.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, GREY = "#0072B2", "#D55E00", "#767676"


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
