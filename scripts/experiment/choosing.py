"""What choosing the weights to ship is worth: stored episodes replayed at every budget.

Of each run the schemes at its last step are the candidates, and of its past the stretches and
checkpoints that were evaluated there, or else the last iterate at the evaluations of the last
fifth. A replay deals the stored episodes out at random: some to choose on, the others to score.
Nothing is dealt twice; a rule that needs more episodes than are stored is left out.
"""

# ruff: noqa: RUF001  (the text has minus signs and means them)

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from polyak_rl.choose import Play, choose, one_by_one, rounds
from scripts.experiment import stats
from scripts.experiment.analysis import FEWEST, MARGIN
from scripts.experiment.figures import BLACK, BLUE, GREEN, GREY, ORANGE
from scripts.experiment.replay import BUDGETS
from scripts.experiment.schemes import KNOWN, LAST, PRIMARY, TARGET, is_late
from scripts.experiment.stats import Floats, Interval
from scripts.experiment.tidy import SCALES, Episodes, Key, read_episodes
from scripts.experiment.wording import table

BASE = LAST.name
SKY = "#56B4E9"  # of Okabe and Ito's as well

PRIOR = PRIMARY.name
HELD_OUT = 4  # fewer episodes than this do not score a choice
LATEST = 9  # evaluations from `LATE` of the run on stand for its past, at most so many
CHECKPOINTS = {name for name, scheme in KNOWN.items() if scheme.is_checkpoint}
# In the order of belief: a budget too small for all candidates takes the first ones.
BELIEF = (PRIOR, BASE, "tail10", "tail50", "ema1", "tail5", TARGET.name)


@dataclass(frozen=True)
class Run:
    """The candidates of one run and their stored returns."""

    key: Key
    name: str
    returns: dict[str, dict[str, float]]  # candidate -> episode -> return
    past: list[str]  # candidates of the past, the newest first
    learned: float  # the best evaluation of the last iterate minus the worst one, or 1

    @property
    def averages(self) -> list[str]:
        """The last iterate and the averages, in order of belief."""
        now = [name for name in self.returns if name not in self.past]
        known = [name for name in BELIEF if name in now]
        return known + sorted(set(now) - {*known})

    @property
    def checkpoints(self) -> list[str]:
        """The last iterate and those of the past, or stretches of the past in their place."""
        return [BASE, *([name for name in self.past if name in CHECKPOINTS] or self.past)]

    @property
    def all(self) -> list[str]:
        """Averages that are believed in, stretches of the past (or checkpoints), other averages."""
        believed = [name for name in self.averages if name in BELIEF]
        past = [name for name in self.past if name not in CHECKPOINTS] or self.past
        return believed + past + [name for name in self.averages if name not in BELIEF]

    def table(self, names: Iterable[str]) -> dict[str, Floats]:
        """Returns on the episodes that all of these and the last iterate have, by name."""
        rows = {name: self.returns[name] for name in (*names, BASE)}
        common = sorted(set.intersection(*(set(row) for row in rows.values())))
        return {name: np.array([row[e] for e in common]) for name, row in rows.items()}


@dataclass(frozen=True)
class Group:
    """Runs that are averaged over, and the unit of their gains."""

    name: str
    runs: list[Run]
    pooled: bool = False  # runs of several strata

    def span(self, run: Run) -> float:
        """What a gain of 1 is: reference minus random, or what the run learned."""
        if self.pooled or run.key[0] not in SCALES:
            return run.learned
        random, reference = SCALES[run.key[0]]
        return reference - random

    @property
    def top(self) -> float:
        """The gain of what is best on all stored episodes of each run: a bound, which flatters."""
        gains = []
        for run in self.runs:
            mean = {name: row.mean() for name, row in run.table(run.all).items()}
            gains.append((max(mean.values()) - mean[BASE]) / self.span(run))
        return float(np.mean(gains))

    @property
    def margin(self) -> float:
        """What does not matter, in the unit of the gains; NaN for runs that are not alike."""
        if self.pooled:
            return math.nan
        last = [np.mean([*run.returns[BASE].values()]) / self.span(run) for run in self.runs]
        return MARGIN * float(np.std(last, ddof=1))


def read(files: Iterable[Path]) -> list[Run]:
    """The runs in tidy rows, in order of their names."""
    return [
        as_run(key, name, episodes)
        for key, runs in read_episodes(files).items()
        for (name, _), episodes in sorted(runs.items())
    ]


def as_run(key: Key, name: str, episodes: Episodes) -> Run:
    """One run's candidates at its last step, and of its past."""
    end = max(step for _, step in episodes)
    now = {scheme: row for (scheme, step), row in episodes.items() if step == end}
    now = {n: row for n, row in now.items() if n not in KNOWN or KNOWN[n].candidate}
    ends = {n: KNOWN[n].until or 0 for n in now if n in KNOWN}  # 0: it is not of the past
    past = sorted((n for n in ends if ends[n]), key=lambda n: -ends[n])
    curve = {step: row for (n, step), row in sorted(episodes.items()) if n == BASE}
    if not past:
        late = [step for step in curve if is_late(step, end) and step < end][-LATEST:]
        then = {f"iterate of step {step}": curve[step] for step in late[::-1]}
        now, past = now | then, [*then]
    means = [np.mean([*row.values()]) for row in curve.values()]
    learned = float(max(means, default=0) - min(means, default=0)) or 1.0
    return Run(key, name, now, past, learned)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """One group a stratum of enough runs; the runs of smaller ones together."""
    strata = defaultdict(list)
    for run in runs:
        strata[run.key].append(run)
    groups, others = [], []
    for (env, algo, variant), members in strata.items():
        if len(members) >= FEWEST:
            name = f"{algo.upper()} {env}" + (f" ({variant})" if variant else "")
            groups.append(Group(name, members))
        else:
            others += members
    if others:
        groups.append(Group(f"Strata of fewer than {FEWEST} runs, together", others, pooled=True))
    return groups


# --- rules ----------------------------------------------------------------------------------------

Deal = dict[str, Floats]  # candidate -> returns in the order in which they are dealt out
Pick = Callable[[Deal], str]

play: Play[Floats] = one_by_one(lambda row, episodes: row[episodes.start : episodes.stop].tolist())


def affordable(names: Sequence[str], budget: int) -> list[str]:
    """As many of the candidates, in their order, as halving can choose among on the budget."""
    for count in range(len(names), 1, -1):
        try:
            rounds(count, budget)
        except ValueError:
            continue
        return list(names[:count])
    return list(names[:1])


def halving(names: Sequence[str], budget: int) -> tuple[int, Pick]:
    """How many episodes of one candidate `polyak_rl.choose` may deal out, and its winner.

    The first name is the prior.
    """
    names = affordable(names, budget)
    settings: Any = {"budget": budget, "prior": names[0], "last": names[0], "fresh": 0}
    used = sum(episodes for _, episodes in rounds(len(names), budget))
    return used, lambda deal: choose({n: deal[n] for n in names}, play, **settings).winner


def best(names: Sequence[str], budget: int) -> tuple[int, Pick]:
    """As an evaluation callback: the same number of episodes each, the first of the best stays."""
    tried = names[: max(1, budget)][::-1]  # the oldest first
    each = budget // len(tried)
    if each == 0:
        return 0, lambda _: names[0]
    return each, lambda deal: max(tried, key=lambda name: deal[name][:each].mean())


@dataclass(frozen=True)
class Rule:
    """A way to come to the weights that are shipped."""

    label: str
    colour: str
    names: Callable[[Run], list[str]]  # what it chooses among, the first without episodes
    plan: Callable[[Sequence[str], int], tuple[int, Pick]] = halving


RULES = (
    Rule("always tail25", GREY, lambda run: [PRIOR] * (PRIOR in run.returns)),
    Rule("best checkpoint", ORANGE, lambda run: run.checkpoints, best),
    Rule("checkpoints, by choose", SKY, lambda run: run.checkpoints),
    Rule("averages, by choose", BLUE, lambda run: run.averages),
    Rule("all, by choose", GREEN, lambda run: run.all),
)


# --- replay ---------------------------------------------------------------------------------------


def replay(run: Run, rule: Rule, budget: int, splits: int, seed: int = 0) -> float:
    """The mean gain in return over the last iterate on held-out episodes, over random splits.

    NaN where the rule has nothing to choose among in this run, or more episodes are needed than
    are stored.
    """
    names = rule.names(run)
    if not names or names == [BASE]:
        return math.nan
    table, (used, pick) = run.table(names), rule.plan(names, budget)
    stored = len(table[BASE])
    if used + HELD_OUT > stored:
        return math.nan
    rng = np.random.default_rng([seed, budget, *run.name.encode()])
    gains = []
    for _ in range(splits):
        order = rng.permutation(stored)
        deal = {name: row[order] for name, row in table.items()}
        gains.append(float((deal[pick(deal)] - deal[BASE])[used:].mean()))
    return float(np.mean(gains))


class Held(NamedTuple):
    """How the interval of the fresh episodes does where the truth is known."""

    share: float  # of the intervals that hold it
    width: float
    flattery: float  # what the choosing episodes promised minus what the winner is worth


def held(group: Group, budget: int, draws: int, seed: int = 0) -> Held | None:
    """Choose and value on episodes drawn with replacement; the stored ones are the truth.

    Counted are the choices whose winner is not always as good as the last iterate; None where there
    are none.
    """
    found = []
    for run in group.runs:
        names = affordable(run.all, budget)
        if PRIOR not in names:
            continue
        stored, span = run.table(names), group.span(run)
        rng = np.random.default_rng([seed, budget, *run.name.encode()])
        for _ in range(draws):
            order = rng.integers(len(stored[BASE]), size=2 * budget + 40)
            choice = choose({n: row[order] for n, row in stored.items()}, play, budget=budget)
            gap = stored[choice.winner] - stored[BASE]
            if gap.any():
                _, low, high = choice.gain()
                true, rounding = gap.mean(), 1e-9 * span
                flattery = choice.promised() - stored[choice.winner].mean()
                holds = low - rounding <= true <= high + rounding
                found.append((holds, (high - low) / span, flattery / span))
    return Held(*np.mean(found, axis=0)) if found else None


# --- figure and table -----------------------------------------------------------------------------


Point = tuple[Interval, int]  # the gain of one rule at one budget, over so many runs
Curves = dict[str, list[Point | None]]  # rule -> at each budget


def curves(group: Group, splits: int) -> Curves:
    """The mean gain over runs of each rule at each budget, in the group's unit.

    All rules of one budget are averaged over the same runs: those with episodes enough for each
    rule that has enough of them in a few runs at least.
    """
    spans = np.array([group.span(run) for run in group.runs])
    found: Curves = defaultdict(list)
    few = min(FEWEST, len(spans))
    for budget in BUDGETS:
        gains = {
            rule.label: np.array([replay(run, rule, budget, splits) for run in group.runs]) / spans
            for rule in RULES
        }
        ours = RULES[-1].label  # against what is done without it, paired by run
        gains |= {
            f"{ours} − {other.label}": gains[ours] - gains[other.label] for other in RULES[:2]
        }
        usable = [label for label, gain in gains.items() if np.isfinite(gain).sum() >= few]
        common = np.all([np.isfinite(gains[label]) for label in usable], axis=0)
        for label, gain in gains.items():
            ok = label in usable and common.sum() >= max(2, few)
            point = (stats.mean_interval(gain[common]), int(common.sum())) if ok else None
            found[label].append(point)
    return {label: points for label, points in found.items() if any(points)}


def draw(groups: Sequence[Group], tables: Sequence[Curves]) -> Figure:
    """The gain over the last iterate against the budget, a panel a group."""
    across = min(2, len(groups))
    down = math.ceil(len(groups) / across)
    figure = Figure(figsize=(3.6 * across, 2.9 * down + 0.9), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for unused in axes[len(groups) :]:
        unused.set_axis_off()
    place = np.arange(len(BUDGETS))
    for ax, group, found in zip(axes, groups, tables, strict=False):
        ax.set_title(group.name.replace(" ", "\n", 1), loc="left")
        ax.axhline(0, color=BLACK, linewidth=0.8)
        if math.isfinite(group.margin):
            ax.axhspan(-group.margin, group.margin, color=GREY, alpha=0.2, linewidth=0)
        ax.axhline(group.top, color=BLACK, linewidth=0.8, linestyle=":", label="best in hindsight")
        for rule in RULES:
            points = found.get(rule.label, [None] * len(BUDGETS))
            values = [math.nan if p is None else float(p[0].estimate) for p in points]
            ax.plot(place, values, "o-", color=rule.colour, markersize=4, label=rule.label)
        ax.set_xticks(place, [str(budget) for budget in BUDGETS])
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, -0.002), max(high, 0.002))  # where nothing differs, no rounding
        ax.set_xlabel("episodes to choose with, in all")
        ax.set_ylabel("gain over the last iterate")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def text(groups: Sequence[Group], tables: Sequence[Curves], draws: int) -> str:
    """The figure, a table for each group, and what the interval covers, as Markdown."""
    parts = [
        "# What choosing the weights to ship is worth",
        "Gain over always shipping the last iterate, on episodes that had no part in the choice, "
        "against the episodes to choose with, in all and over all candidates: the mean over runs "
        "with its 95 % t interval. 1 is the way from a random policy to the reference, or where "
        "runs of many strata are pooled, from the worst to the best evaluation of each. A dash "
        f"where it takes more episodes than are stored, {HELD_OUT} being held out.",
        "![Gain against the budget](choice.png)",
        "Dotted: the best candidate in hindsight, from which regret is counted. Grey: what does "
        f"not matter, {MARGIN} standard deviations of the last iterate over runs.",
    ]
    for group, points in zip(groups, tables, strict=True):
        parts.append(f"## {group.name}")
        facts = [f"{len(group.runs)} runs", f"best in hindsight {group.top:+.3f}"]
        if math.isfinite(group.margin):
            facts.append(f"what does not matter ±{group.margin:.3f}")
        parts.append("; ".join(facts) + ".")
        rows = [
            [label, *(cell(point, len(group.runs)) for point in row)]
            for label, row in points.items()
        ]
        parts.append(table(["rule", *map(str, BUDGETS)], rows))
    budgets = [budget for budget in BUDGETS if budget]
    rows, counts, shares = [], [], []
    for group in groups:
        found = [held(group, budget, draws) for budget in budgets]
        if all(found):
            rows.append(
                [
                    group.name,
                    *(f"{x.share:.1%} ({x.width:.3f}, {x.flattery:+.3f})" for x in found if x),
                ]
            )
            counts.append(len(group.runs))
            shares.append([x.share for x in found if x])
    if rows:
        mean = np.average(shares, axis=0, weights=counts)
        rows.append(["all, by runs", *(f"{share:.1%}" for share in mean)])
        parts += [
            "## What the interval covers",
            "Choices among all candidates, each valued on fresh episodes as many as by default. "
            "Both blocks are drawn with replacement from the stored episodes, whose mean is the "
            "truth. How often the interval of the gain over the last iterate holds it; in brackets "
            "its mean width, and by how much the choosing episodes had promised too much. Counted "
            "where winner and last differ in the stored episodes.",
            table(["runs", *(f"{budget} to choose" for budget in budgets)], rows),
        ]
    return "\n\n".join(parts) + "\n"


def cell(point: Point | None, runs: int) -> str:
    """A gain with its interval, and over how many runs where it is not over all of them."""
    if point is None:
        return "–"
    (estimate, low, high), counted = point
    gain = f"{estimate:+.3f} [{low:+.3f}, {high:+.3f}]"
    return gain if counted == runs else f"{gain} ({counted} runs)"
