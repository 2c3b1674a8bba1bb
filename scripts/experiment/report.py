"""The report: its sections in order, each of which writes what the results allow."""

# ruff: noqa: RUF001  (the text has minus signs, dashes and Greek letters, and means them)

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from scripts.experiment.analysis import CEILING, FEWEST, MARGIN, SIGNIFICANT, adjust, contrast, gain
from scripts.experiment.figures import (
    CURVES,
    DOSE,
    FOREST,
    SHARES,
    STYLE,
    dose_rows,
    draw_curves,
    draw_dose,
    draw_forest,
    draw_shares,
)
from scripts.experiment.literature import LITERATURE
from scripts.experiment.page import Page
from scripts.experiment.registered import Replay, Study, divide
from scripts.experiment.registered_report import RegisteredReport
from scripts.experiment.schemes import LAST, LATE, PRIMARY
from scripts.experiment.tidy import (
    SCALES,
    Key,
    Run,
    Scale,
    Stratum,
    label,
    place_of,
    rank,
    read_results,
    read_runs,
    result_files,
)
from scripts.experiment.wording import (
    INDICATIVE,
    JUDGED,
    OVERVIEW,
    OVERVIEW_NOTE,
    counts,
    interval,
    judged,
    listing,
    number,
    overview,
    p_value,
    plain,
    says,
    span,
)


def write_report(
    results: Sequence[Path],
    out: Path | None = None,
    primary: str = PRIMARY.name,
    random_score: float | None = None,
    reference_score: float | None = None,
    replay: Replay | None = None,
    left_out: Sequence[int] = (),
) -> Path:
    """Read the results, write the report, and return its page; arguments as in `scripts.report`.

    Raises:
        ValueError: The results cannot be reported.
    """
    files = result_files(results)
    planned, about = read_runs(files)
    scales = {**SCALES, **recorded(about.pop("scores", {}))}
    strata = read_results(files, scales)
    if random_score is not None or reference_score is not None:
        environments = {s.env for s in strata}
        if random_score is None or reference_score is None or len(environments) != 1:
            raise ValueError(
                "give both --random-score and --reference-score, for results of one environment,"
                f" got {random_score} and {reference_score} for {sorted(environments)}"
            )
        if random_score == reference_score:
            raise ValueError(f"random and reference score must differ, got {random_score} twice")
        scale = (random_score, reference_score)
        strata = read_results(files, dict.fromkeys(environments, scale))
    schemes = sorted({scheme for s in strata for scheme in s.scores}, key=rank)
    if not any(np.isfinite(s.shipped(LAST.name)).any() for s in strata):
        raise ValueError(f"expected finished runs with the scheme {LAST.name}, got {schemes}")
    if primary not in schemes and len(schemes) > 1:
        raise ValueError(f"primary must be one of the schemes {schemes}, got {primary!r}")
    first = results[0]
    page = Page(
        "Does averaging the policy's weights help?",
        out or (first if first.is_dir() else first.parent),
    )
    with matplotlib.rc_context(STYLE):
        Report(page, strata, planned, primary, replay, left_out).write(about)
    return page.save()


def recorded(scores: Any) -> dict[str, Scale]:
    """The scales that runs.json gives, {environment: [random, reference]}."""
    try:
        scales = {str(env): (float(low), float(high)) for env, (low, high) in scores.items()}
    except (AttributeError, TypeError, ValueError):
        scales = {"": (0.0, 0.0)}
    if any(not np.isfinite([*scale]).all() or scale[0] == scale[1] for scale in scales.values()):
        raise ValueError(
            f"scores in runs.json must be [random, reference] by environment, got {scores}"
        )
    return scales


@dataclass(eq=False)
class Report:
    """Writes the sections of a report to a page.

    `primary` is compared with last outside the registered study; `planned` are the runs that were,
    as far as they are known.
    """

    page: Page
    read: Sequence[Stratum]
    planned: Sequence[Run]
    primary: str
    replay: Replay | None
    left_out: Sequence[int]

    def __post_init__(self) -> None:
        registered, self.others = divide(self.read)
        fixed = {key: replace(s, scale=SCALES[s.env]) for key, s in registered.items()}
        self.study = Study(fixed, self.planned, self.replay, self.left_out)
        ended = self.study.cells.values()
        self.strata = [*ended, *self.others]  # of a study that has not ended nothing is shown

    def write(self, about: Mapping[str, Any]) -> None:
        """All sections."""
        if self.study.absent or self.study.cells:
            RegisteredReport(self.page, self.study).write(about)
        if self.others:
            self.findings()
        if self.study.cells:
            self.page.heading("Exploratory: not registered")
        self.curves()
        self.settings()
        self.schemes()
        self.runs(about)
        self.method()
        if self.study.cells:
            self.literature()

    # --- all else --------------------------------------------------------------------------------

    def findings(self) -> None:
        """Each environment by itself: what was found, and how surely."""
        page, scheme = self.page, self.primary
        effects = [gain(s, scheme=scheme) for s in self.others]
        if self.study.cells:
            page.heading("Exploratory: runs that were not registered")
        if not any(effect.runs for effect in effects):
            page.finding(
                f"Nothing is compared: no run of {some(self.others)} was evaluated with"
                f" {plain(scheme)} beside last."
            )
        p = adjust(effects)
        lines = [
            f"{counted(s, effect.runs)}: **{says(effect, q)}**,"
            f" {interval(effect.interval, bool(s.scale))}"
            for s, effect, q in zip(self.others, effects, p, strict=True)
            if effect.runs
        ]
        if lines:
            page.finding(
                f"{plain(scheme)} ({plain(label(scheme))}) against the last iterate, each"
                " environment by itself (95 % intervals, not adjusted; the words are):"
            )
            page.bullets(lines)
        page.text("Exploratory: no test of these runs was registered before them.")
        page.bullets(self.caveats())
        page.table(
            ["", "finding", "p, not adjusted", "Holm's p", *OVERVIEW[1:]],
            [
                [
                    plain(s.name),
                    says(effect, q),
                    p_value(effect.p),
                    p_value(q),
                    *overview(s, scheme),
                ]
                for s, effect, q in zip(self.others, effects, p, strict=True)
            ],
        )
        page.text(
            "p by sign flips of whole runs; Holm's is over the tests of this table that can reject,"
            f" and the finding follows it. No interval is adjusted. {OVERVIEW_NOTE}"
        )
        known = {s.name: e for s, e in zip(self.others, effects, strict=True) if s.scale and e.runs}
        if self.study.cells:
            return
        if known:
            page.figure("forest", draw_forest(known, None), FOREST)
        moved = dose_rows({s.name: s for s in self.others}, scheme)
        if len(moved) > 2:
            page.figure("dose", draw_dose(moved), DOSE)

    def caveats(self) -> list[str]:
        """What a reader must know before the numbers."""
        notes = []
        if unknown := [s for s in self.others if not s.scale]:
            notes.append(
                "Raw scores, as no random and reference score is known (--random-score,"
                f" --reference-score): {some(unknown)}."
            )
        lost = Counter(key for key, _, status, _ in self.unfinished() if status != "not run")
        for s in self.others:
            second = gain(s, scheme=self.primary, crashed=[lost[s.key]])
            if lost[s.key] and second.runs > lost[s.key]:
                notes.append(
                    f"Runs of {plain(s.name)} that did not reach their end: {lost[s.key]}. Counted"
                    f" as no difference: {interval(second.interval, bool(s.scale))}."
                )
        return notes

    def curves(self) -> None:
        """Learning curves, and how much to average, where that was evaluated."""
        strata = [s for s in self.strata if not s.variant] or self.strata
        for scheme in (self.primary, *(name for s in strata for name in s.scores)):
            followed = [s for s in strata if scheme != LAST.name and s.follows(scheme, LAST.name)]
            if followed:
                self.heading("Learning curves")
                self.page.figure("curves", draw_curves(followed, scheme), CURVES)
                break
        placed = [s for s in strata if sum(place_of(name) is not None for name in s.scores) > 2]
        if placed:
            self.heading("How much to average")
            self.page.figure("shares", draw_shares(placed), SHARES)

    def settings(self) -> None:
        """Each variant beside the plain protocol, on the seeds that both have."""
        plains = {(s.env, s.algo): s for s in self.strata if not s.variant}
        rows = []
        for s in self.strata:
            base = plains.get((s.env, s.algo))
            if not s.variant or base is None:
                continue
            for name, of_strata in ((base.name, (1, 0)), (s.name, (0, 1)), ("difference", (-1, 1))):
                row = []
                for of_schemes in ((1, 0), (0, 1), (-1, 1)):
                    effect = contrast([
                        (a * b, one, scheme)
                        for a, one in zip(of_strata, (base, s), strict=True)
                        for b, scheme in zip(of_schemes, (LAST.name, self.primary), strict=True)
                    ])  # fmt: skip
                    sign = -1 in of_strata + of_schemes
                    row.append(interval(effect.interval, bool(s.scale), sign))
                rows.append([plain(name), str(effect.runs), *row])
        if rows:
            self.heading("Variants beside the plain protocol")
            scheme = plain(self.primary)
            self.page.table(["", "seeds", "last", scheme, f"{scheme} − last"], rows)
            self.page.text(
                "Shipped weights, means over the training seeds that both have: the rows subtract,"
                " and so do the columns. 95 % intervals, not adjusted."
            )

    def schemes(self) -> None:
        """Every scheme of every stratum at the end of the run."""
        strata = [s for s in self.strata if len(s.scores) > 1]
        if strata:
            self.heading("Every scheme")
            self.page.text(
                "Shipped weights; means over the runs that have both the scheme and last, and"
                " differences over the episodes that both played: where these are as many for all,"
                " scores subtract. 95 % t intervals, not adjusted, and no words: these comparisons"
                " were not planned."
            )
        for s in strata:
            rows = []
            for scheme in s.scores:
                effect = gain(s, scheme=scheme)
                if not effect.runs:
                    continue
                both = np.isfinite(s.shipped(scheme) + s.shipped(LAST.name))
                played = np.isfinite(s.final[scheme]).sum(axis=1)[both]
                row = [plain(label(scheme)), span([*map(str, np.unique(played))])]
                raw = s.scores[scheme][both, -1].mean()
                row += [number(float(raw), False)]
                if s.scale:
                    row += [number(float(s.shipped(scheme)[both].mean()))]
                if scheme != LAST.name:
                    row += [*judged(s, scheme), counts(effect)]
                rows.append(row)
            self.page.text(f"**{counted(s, len(s.runs))}**")
            names = ["scheme", "episodes", "score", *["normalised"] * bool(s.scale)]
            self.page.table([*names, *JUDGED, "better / tied / worse"], rows)

    # --- runs and method -------------------------------------------------------------------------

    def unfinished(self) -> Iterable[tuple[Key, str, str, float]]:
        """(stratum, run, status, last step) of each run without an endpoint, planned or seen."""
        planned = {(run.key, run.run): run for run in self.planned}
        for s in self.read:
            ended = np.isfinite(s.shipped(LAST.name))
            for i, name in enumerate(s.runs):
                run = planned.pop((s.key, name), None)
                status = run.status if run else "finished"
                if not ended[i] or status != "finished":
                    seen = s.steps[np.isfinite(s.curve(LAST.name)[i])]
                    status = "incomplete" if status == "finished" else status
                    yield s.key, name, status, float(seen.max(initial=0))
        for key, name in planned:
            status = planned[key, name].status
            yield key, name, "without results" if status == "finished" else status, 0.0

    def runs(self, about: Mapping[str, Any]) -> None:
        """What was planned, what became of it, with which settings and at what cost."""
        page = self.page
        page.heading("Runs")
        page.bullets([f"{plain(key)}: {plain(value)}" for key, value in about.items()])
        lost = list(self.unfinished())
        known = {s.key: s for s in self.read}
        missing = [key for key in dict.fromkeys(key for key, *_ in lost) if key not in known]
        nothing = np.zeros(0)
        known |= {key: Stratum(*key, [], [], nothing, {}, {}, None) for key in missing}
        rows, configs = [], {}
        for key, s in known.items():
            plan = [run for run in self.planned if run.key == key]
            statuses = Counter(status for other, _, status, _ in lost if other == key)
            seconds = [run.seconds for run in plan if run.seconds is not None]
            evaluating = [run.evaluating for run in plan if run.seconds and run.evaluating]
            ended = np.isfinite(s.shipped(LAST.name)).sum() if len(s.steps) else 0
            rows.append([
                plain(s.name),
                str(len(plan)) if plan else "–",
                str(ended),
                ", ".join(f"{count} {plain(what)}" for what, count in statuses.items()) or "none",
                f"{s.steps.max(initial=0):,.0f}".replace(",", " "),
                str(len(s.steps)),
                span(s.seeds),
                " to ".join(f"{x:g}" for x in s.scale) if s.scale else "–",
                f"{np.mean(seconds) / 60:.1f}" if seconds else "–",
                f"{sum(seconds) / 3600:.2f}" if seconds else "–",
                f"{100 * sum(evaluating) / sum(seconds):.0f} %" if evaluating else "–",
            ])  # fmt: skip
            if config := common(plan):
                configs[plain(s.name)] = config
        page.table(RUNS, rows)
        if lost:
            page.text("Runs without an endpoint, or not reported as finished:")
            page.table(
                ["", "run", "status", "last evaluated step"],
                [
                    [plain(known[key].name), plain(run), plain(status), f"{step:.0f}"]
                    for key, run, status, step in lost
                ],
            )
        names = sorted({name for config in configs.values() for name in config})
        page.text("Hyper-parameters:" if names else "Hyper-parameters are not recorded.")
        page.table(
            ["", *configs],
            [
                [plain(name), *(plain(config.get(name, "–")) for config in configs.values())]
                for name in names
            ],
        )

    def method(self) -> None:
        """What the numbers mean."""
        self.page.heading("How it was computed")
        self.page.bullets([
            "All policies of a run come from one training run, which averaging never touches; they"
            " are evaluated on the same episodes, so every comparison is paired by run. The unit of"
            " every interval and test is the run.",
            "Shipped weights: the mean return of the last point's episodes. Stopped late: the mean"
            f" over the points from {100 * LATE:g} % of the run on. Normalised: (score − random) /"
            " (reference − random), so that 0 is a random policy and 1 the reference.",
            "“better”, “worse”: the p of sign flips (of one registered test that of t, which says"
            " so), adjusted by Holm over the tests that can reject (a single one is not), is at"
            f" most {SIGNIFICANT:g}. “cannot tell: ceiling”: over {100 * CEILING:g} % of the pairs"
            " are both at the environment's largest return. “no difference that"
            f" matters”: the 95 % t interval lies inside ±{MARGIN:g} standard deviations of last"
            " over runs (the ceiling is asked first). “not settled”: all else."
            f" “too few runs”: under {FEWEST}; “indicative”: under {INDICATIVE}.",
            "Placebo: last on other episodes; its difference from last is noise by construction."
            " The best checkpoint is a baseline that spends evaluation episodes.",
            "In simulation (`tests/test_stats.py`), at 10 and 20 runs, t intervals cover 92–97 %"
            " where the skewness is at most 1, about 90 % with exponential scores; bands 95 %,"
            " 89–91 % at a skewness of 1.",
        ])  # fmt: skip

    def literature(self) -> None:
        """What others have found."""
        self.heading("What others have found")
        self.page.text("What a work leaves open is said as far as its abstract or its code shows.")
        self.page.text(LITERATURE)

    def heading(self, text: str) -> None:
        """A section, or a part of the exploratory one."""
        self.page.heading(text, 3 if self.study.cells else 2)


RUNS = (
    "",
    "planned",
    "with an endpoint",
    "not finished",
    "steps",
    "points",
    "seeds",
    "random to reference",
    "minutes a run",
    "hours in all",
    "of them evaluating",
)


def some(strata: Sequence[Stratum], most: int = 6) -> str:
    """The names of the first strata, and how many others there are."""
    names = [plain(s.name) for s in strata]
    more = [f"{len(names) - most} others"] * (len(names) > most)
    return listing(names[:most] + more)


def counted(s: Stratum, runs: int) -> str:
    """As in "DQN CartPole-v1 (7 runs)"."""
    return f"{plain(s.name)} ({runs} run{'s' * (runs != 1)})"


def common(runs: Sequence[Run]) -> dict[str, str]:
    """The hyper-parameters of runs; those that differ between them are said to."""
    values: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        for name, value in run.config.items():
            values[name].add(value)
    values.pop("seed", None)
    return {name: v.pop() if len(v) == 1 else "varies" for name, v in values.items()}
