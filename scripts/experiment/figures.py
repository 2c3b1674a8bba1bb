"""The figures of the report."""

# ruff: noqa: RUF001  (the text has minus signs, dashes and Greek letters, and means them)

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.experiment import stats
from scripts.experiment.analysis import FEWEST, MARGIN, Effect, gain, present
from scripts.experiment.schemes import LAST
from scripts.experiment.stats import Floats, Interval
from scripts.experiment.tidy import Stratum, label, place_of

# Okabe and Ito's colours, told apart with any colour vision.
BLACK, ORANGE, GREEN = "#000000", "#E69F00", "#009E73"
BLUE, RED, GREY = "#0072B2", "#D55E00", "#767676"

STYLE: Any = {  # matplotlib types the keys one by one
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
    "text.parse_math": False,  # a $ in a name is a $
    "svg.hashsalt": "polyak_rl",  # the same results draw the same file
}
FOREST = (
    "Difference of the shipped weights' score, averaged minus last. Mean, 95 % interval. Grey:"
    f" within {MARGIN:g} standard deviations of last over runs, too small to matter. Hollow: too"
    " few runs for an interval. No interval is adjusted."
)
DOSE = (
    "The difference of the shipped weights against how much last moved within a run before. The"
    " standard deviation is over points after 50 and up to 75 % of the run, none of which is part"
    " of an endpoint; mean over runs; 95 % intervals, not adjusted."
)
CURVES = (
    "Learning curves of last and of the average of the run so far, and their paired difference."
    " Means over runs; a band holds at all points at once with 95 %, and is paler where over half"
    " of the runs have one value, as at a ceiling: there it holds less often. No band under five"
    " runs."
)
SHARES = (
    "Difference from last against how much of the run is averaged. Shipped weights, means with 95 %"
    " intervals, not adjusted; hollow: too few runs. What is chosen here must be tested on other"
    " seeds."
)

WIDTH = 5.8  # inches
TIES = 0.5  # share of runs with one value beyond which a band holds less often than it says


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
    cells = []
    for i, s in enumerate(strata):
        row, column = i // across * rows, i % across
        cells.append([*grid[row : row + rows, column]])
        cells[-1][0].set_title(s.name.replace(" ", "\n", 2), loc="left")
    return figure, cells


def thousands(steps: Floats) -> tuple[Floats, str]:
    """Steps in the unit that keeps tick labels short."""
    if steps.max() >= 1e6:
        return steps / 1e6, "steps (millions)"
    if steps.max() >= 1e4:
        return steps / 1e3, "steps (thousands)"
    return steps, "steps"


def unit(*strata: Stratum) -> str:
    """What scores are in."""
    return "normalised" if all(s.scale for s in strata) else "raw"


def bar(axes: Axes, x: float, y: float, i: Interval, vertical: bool = True, **style: Any) -> None:
    """An estimate at (x, y) with its interval, or a hollow marker where there is none."""
    if np.isnan(i.low):
        axes.plot(x, y, **{"linestyle": "none", "markerfacecolor": "white", **style})
        return
    half = [[float(i.estimate - i.low)], [float(i.high - i.estimate)]]
    error: dict[str, Any] = {"yerr" if vertical else "xerr": half}
    axes.errorbar(x, y, **error, **{"linestyle": "none", **style})


def draw_forest(rows: Mapping[str, Effect], total: Effect | None) -> Figure:
    """Each stratum's difference with its interval and margin, and the primary one below."""
    everything = {**rows, **({"primary test": total} if total else {})}
    figure = Figure(figsize=(WIDTH, 0.5 * len(everything) + 1.1), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=BLACK, linewidth=0.8)
    for y, effect in enumerate(everything.values()):
        if effect.margin > 0:
            axes.barh(-y, 2 * effect.margin, 0.7, -effect.margin, color=GREY, alpha=0.2)
        last = effect is total
        style = {"marker": "D" if last else "o", "color": BLACK if last else BLUE, "markersize": 7}
        bar(axes, float(effect.interval.estimate), -y, effect.interval, vertical=False, **style)
    names = [
        f"{name.replace(' (', chr(10) + '(')}, n = {effect.runs}"
        for name, effect in everything.items()
    ]
    axes.set_yticks(range(0, -len(everything), -1), names)
    axes.set_ylim(-len(everything) + 0.4, 0.6)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel("averaged − last, normalised\n(→ averaging is better)")
    return figure


def draw_curves(strata: Sequence[Stratum], scheme: str) -> Figure:
    """Learning curves of last and of the average, and their paired difference below."""
    figure, cells = panels(strata, 3.3, rows=2, ratios=(1.6, 1))
    for s, (above, below) in zip(strata, cells, strict=True):
        last, average = s.curve(LAST.name), s.curve(scheme)
        both = np.isfinite(last + average).all(axis=1)
        x, steps = thousands(s.steps)
        for axes, y, color, style, name in (
            (above, last, ORANGE, "--", LAST.label),
            (above, average, BLUE, "-", label(scheme)),
            (below, average - last, GREEN, "-", None),
        ):
            axes.plot(x, y[both].mean(axis=0), style, color=color, label=name)
            shade(axes, x, y[both], color)
        above.tick_params(labelbottom=False)
        above.set_ylabel(f"score,\n{unit(s)}")
        below.axhline(0, color=BLACK, linewidth=0.8)
        below.set_ylabel("difference")
        below.set_xlabel(steps)
        for axes in (above, below):
            axes.locator_params(axis="y", nbins=4)
            axes.locator_params(axis="x", nbins=5)
    figure.legend(*cells[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def shade(axes: Axes, x: Floats, curves: Floats, color: str) -> None:
    """The simultaneous band of the mean of [N, P]; a hatched one where runs tie."""
    if len(curves) < FEWEST:
        return
    band = stats.simultaneous_band(curves)
    tied = np.array([np.unique(point, return_counts=True)[1].max() for point in curves.T])
    many = tied > TIES * len(curves)
    style: dict[str, Any] = {"color": color, "linewidth": 0}
    axes.fill_between(x, band.low, band.high, alpha=0.1, **style)
    near = many[:-1] | many[1:]
    for i in np.flatnonzero(~near):
        axes.fill_between(
            x[i : i + 2], band.low[i : i + 2], band.high[i : i + 2], alpha=0.18, **style
        )


def draw_shares(strata: Sequence[Stratum]) -> Figure:
    """The difference against the length of a uniform tail, and against an EMA's half-life."""
    figure, cells = panels(strata, 2.4)
    for s, (axes,) in zip(strata, cells, strict=True):
        axes.axhline(0, color=BLACK, linewidth=0.8)
        for kind, color, marker, name in (
            ("tail", BLUE, "o", "uniform: the last so much of the run"),
            ("ema", RED, "s", "EMA: half-life"),
        ):
            effects = {}
            for scheme in s.scores:
                place = place_of(scheme)
                if place and place[0] == kind and (effect := gain(s, scheme=scheme)).runs:
                    effects[place[1]] = effect.interval
            for i, (x, effect_at) in enumerate(sorted(effects.items())):
                style: dict[str, Any] = {"marker": marker, "color": color}
                style["label"] = None if i else name
                bar(axes, x, float(effect_at.estimate), effect_at, **style)
            line = [(x, e.estimate) for x, e in sorted(effects.items())]
            axes.plot(*np.array(line).reshape(-1, 2).T, color=color, linewidth=1)
        axes.set_xscale("log")
        axes.set_xticks([1, 5, 25, 100], ["1", "5", "25", "100"])
        axes.minorticks_off()
        axes.set_xlabel("% of the run")
        axes.set_ylabel(f"averaged − last,\n{unit(s)}")
        axes.locator_params(axis="y", nbins=4)
    figure.legend(*cells[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def dose_rows(strata: Mapping[str, Stratum], scheme: str) -> dict[str, tuple[Stratum, Effect]]:
    """The strata with their differences, of those of which it is known how much last moved."""
    return {
        name: (s, effect)
        for name, s in strata.items()
        if s.scale and (effect := gain(s, scheme=scheme)).runs and present(s.wobble(LAST.name)).size
    }


def draw_dose(rows: Mapping[str, tuple[Stratum, Effect]]) -> Figure:
    """Each stratum's difference against how much the last iterate moved within a run before."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color=BLACK, linewidth=0.8)
    for i, (name, (s, effect)) in enumerate(rows.items()):
        x = float(present(s.wobble(LAST.name)).mean())
        color = (BLUE, RED, GREEN, ORANGE, BLACK, GREY)[i % 6]
        marker = "osD^v<>pPX*hd"[i % 13]
        style: dict[str, Any] = {"marker": marker, "color": color, "label": name}
        bar(axes, x, float(effect.interval.estimate), effect.interval, **style)
    axes.set_xlabel("standard deviation within a run,\nafter 50 and up to 75 % of it, normalised")
    axes.set_ylabel("averaged − last, normalised")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure
