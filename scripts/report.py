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

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tyro

from scripts.experiment import stats
from scripts.experiment.analysis import (
    Comparison,
    choose,
    compare,
    iqm_of,
    mean_of,
    stability,
    weigh,
)
from scripts.experiment.figures import (
    STYLE,
    draw_curves,
    draw_decay,
    draw_forest,
    draw_line,
    draw_profile,
    draw_sensitivity,
    draw_stability,
    draw_targets,
    line_points,
    paired,
)
from scripts.experiment.page import Page
from scripts.experiment.tidy import (
    BASE,
    FEWEST,
    FIRM,
    LAST_POINTS,
    MANY_TIES,
    SCHEMES,
    Run,
    Stratum,
    present,
    rank,
    read_results,
    read_runs,
    result_files,
)
from scripts.experiment.wording import (
    averaging,
    counted,
    finding,
    interval,
    listing,
    number,
    p_value,
    percent,
)

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
    choose_on: int | None = None
    """The first runs of each environment choose an average, which the others test."""
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
    if options.choose_on is not None and options.choose_on < 1:
        raise ValueError(f"choose_on must be at least 1, got {options.choose_on}")
    first = options.results[0]
    out = options.out or (first if first.is_dir() else first.parent)
    page = Page("Does averaging the policy's weights help?", out)
    report = Report(page, options, strata, planned, np.random.default_rng(0))
    report.findings()
    report.curves()
    report.schemes()
    report.sensitivity()
    if options.choose_on is not None:
        report.chosen(options.choose_on)
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
                *EFFECTS,
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
                    *EFFECTS,
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
                    *EFFECTS,
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

    def chosen(self, first: int) -> None:
        """The average that the first runs would have chosen, tested on the others."""
        picks = [
            (s, *pick) for s in self.main if (pick := choose(s, first, self.rng, self.resamples))
        ]
        if not picks:
            return
        page = self.page
        page.heading("Chosen on some seeds, tested on others")
        adjusted = stats.holm([c.p for *_, c in picks])
        page.table(
            [
                "",
                "chosen",
                "difference, those that choose",
                "runs that test",
                *EFFECTS,
                "p",
                "",
            ],
            [
                [
                    s.name,
                    label(name),
                    number(there, s.known, sign=True),
                    str(c.runs),
                    *effects(c),
                    p_value(p),
                    says(c),
                ]
                for (s, name, there, c), p in zip(picks, adjusted, strict=True)
            ],
        )
        page.text(
            f"The first {first} runs of each environment, by seed, choose the average with the"
            " largest interquartile mean of its differences from last; what the others say of it"
            " owes nothing to that choice. p-values by sign flips, adjusted by Holm's method."
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
                    *EFFECTS,
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


EFFECTS = ("difference, IQM", "difference, mean", "better / tied / worse")


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
