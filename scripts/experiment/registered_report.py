"""The sections of the report on the registered study; each writes what has ended."""

# ruff: noqa: RUF001  (the text has minus signs, dashes and Greek letters, and means them)

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scripts.experiment.analysis import Effect, gain, present
from scripts.experiment.figures import DOSE, FOREST, dose_rows, draw_dose, draw_forest
from scripts.experiment.headline import PLACE, headline
from scripts.experiment.page import Page
from scripts.experiment.registered import (
    BUDGET,
    CHOOSE,
    NULL,
    Rule,
    Study,
    commit_of,
    provenance,
)
from scripts.experiment.replay import BUDGETS
from scripts.experiment.schemes import PRIMARY
from scripts.experiment.wording import (
    OVERVIEW,
    OVERVIEW_NOTE,
    counts,
    includes_zero,
    interval,
    number,
    overview,
    p_value,
    plain,
    says,
)


class RegisteredReport:
    """Writes to a page what was registered, in the order of the registration."""

    def __init__(self, page: Page, study: Study) -> None:
        self.page, self.study = page, study

    def write(self, about: Mapping[str, Any]) -> None:
        """What the registration asked, in its order."""
        page, study = self.page, self.study
        primary = study.primary()
        page.finding(" ".join(headline(study)))
        if primary:
            page.text(PLACE)
        page.text(
            f"Registered in `scripts/results/registration.md`, {provenance()}. The runs are of"
            f" commit {plain(about.get('commit', 'unknown'))}, the analysis of commit"
            f" {commit_of(Path(__file__).parent)}. What stands under “Registered” was"
            " fixed there; all else is exploratory."
        )
        absent = [f"{study.title(key)}: {why}" for key, why in study.absent.items()]
        page.text("Registered and not in this report:" if absent else "All registered cells ended.")
        page.bullets([plain(text) for text in absent])
        if not study.closed:
            return

        page.heading("Registered: the primary test")
        page.table(
            ["tail25 − last", "runs", "mean", "interquartile mean", "better / tied / worse", "p"],
            [
                [
                    plain(name),
                    str(effect.runs),
                    interval(effect.interval),
                    number(effect.iqm, sign=True),
                    counts(effect),
                    p_value(effect.p) if i == 0 else "",
                ]
                for i, (name, effect) in enumerate(primary.items())
            ],
        )
        page.text(
            "Equal weights over the cells; t intervals by Satterthwaite; p by 100 000 sign flips of"
            " whole runs within cells (all where there are fewer). What has no p was registered"
            " to be shown without a test. No number of this table is adjusted."
        )
        self.conclusions()
        self.predictions()
        self.family()
        self.cells()
        self.budgets()

    def conclusions(self) -> None:
        """What was said beforehand to change the conclusion, and whether it came about."""
        self.page.heading("Registered: what would change the conclusion")
        tests = {test.number: test for test in self.study.secondary()}
        primary = next(iter(self.study.primary().values()), None)
        null = self.study.effect(gain, *NULL)

        def found(number: int, word: str) -> bool | None:
            effect = tests[number].effect
            return None if effect is None else effect.word(tests[number].p) == word

        past = found(5, "better"), found(7, "worse")
        decay = found(8, "better"), found(11, "better")
        answers = {
            "The primary interval includes 0: it is then not shown that shipping tail25 is better"
            " in expectation where there is headroom.": (
                None if primary is None else includes_zero(primary)
            ),
            "Past policies beat tail25 (test 5 better) or choosing among all (test 7 worse):"
            " whoever can evaluate should choose among past policies, and averages are a"
            " convenience.": (True if True in past else None if None in past else False),
            "Decay beats averaging (test 8 better), which gains less beside it (test 11 above 0):"
            " averaging is a substitute for a decay that was not made.": (
                None if None in decay else all(decay)
            ),
            "A gain in the null cells (the mean of 7, 8 and 10 better by its p, not adjusted): the"
            " sets were chosen wrongly, and the headroom account is refuted.": (
                None if null is None else null.word(null.p) == "better"
            ),
        }
        said = {True: "**yes**", False: "no", None: "cannot be said"}
        self.page.table(
            ["", "came about"], [[text, said[is_so]] for text, is_so in answers.items()]
        )

    def predictions(self) -> None:
        """What was predicted beside what came out, failures first."""
        self.page.heading("Registered predictions beside outcomes, failures first")
        self.page.table(
            ["", "predicted", "found", "outcome"],
            [
                [
                    plain(p.about),
                    predicted(p.low, p.high),
                    interval(p.effect.interval) if p.effect else "–",
                    f"**{p.outcome}**" if p.outcome == "failed" else p.outcome,
                ]
                for p in self.study.predictions()
            ],
        )
        self.page.text(
            "Failed: the 95 % interval (not adjusted) excludes all that was predicted. Held: the"
            " estimate lies in the range that was predicted; where 0 was predicted, no difference"
            " that matters; where a direction was, the interval excludes 0. What was predicted is"
            " registered, the rule for these words is not."
        )

    def family(self) -> None:
        """The secondary tests with Holm's p."""
        self.page.heading("Registered: the secondary family")
        rows = []
        for test in self.study.secondary():
            row = [f"{test.number}: {plain(test.about)}"]
            if (effect := test.effect) is None:
                row += ["cells not run" if test.computed else "not computed", *[""] * 5]
            else:
                row += [says(effect, test.p, *test.words), p_value(effect.p), p_value(test.p)]
                row += [str(effect.runs), interval(effect.interval), counts(effect)]
            rows.append(row)
        names = ["", "finding", "p, not adjusted", "Holm's p", "runs", "mean"]
        self.page.table([*names, "better / tied / worse"], rows)
        self.page.text(
            "Intervals are 95 %, not adjusted; the finding follows Holm's p. Where there is none,"
            " no outcome of the untied runs could have been significant: the test was left out by"
            " the number of ties alone. Test 4 is by t, the others by sign flips of whole runs,"
            " within cells where there are several."
        )

    def cells(self) -> None:
        """The gain in every cell, the placebo, and the gain against the wobble before."""
        self.page.heading("Registered: every cell")
        names = {key: self.study.title(key) for key in self.study.cells}
        effects = {names[key]: gain(s) for key, s in self.study.cells.items()}
        primary = next(iter(self.study.primary().values()), None)
        if not effects:
            return
        self.page.table(
            OVERVIEW,
            [
                [plain(names[key]), *overview(s, PRIMARY.name)]
                for key, s in self.study.cells.items()
            ],
        )
        self.page.text(
            "Registered: difference, stopped late, placebo and SD within a run; the other columns"
            f" are exploratory. No interval here is adjusted. {OVERVIEW_NOTE}"
        )
        self.page.figure("forest", draw_forest(effects, primary), FOREST)
        moved = dose_rows({names[key]: s for key, s in self.study.cells.items()}, PRIMARY.name)
        if len(moved) > 2:
            self.page.figure("dose", draw_dose(moved), DOSE)

    def budgets(self) -> None:
        """What rules of choice are worth over always shipping tail25, by budget."""
        if not self.study.chosen("choose", BUDGET):
            return
        self.page.heading("Registered: choosing on a budget of episodes")
        rules: dict[Rule, str] = {
            "windows": "best of ten windows, equal numbers",
            "checkpoints": "best of last and five checkpoints, equal numbers",
            "choose": "polyak_rl.choose among all, prior tail25",
        }
        worth = {
            about: [self.study.chosen(rule, budget) for budget in BUDGETS]
            for rule, about in rules.items()
        }
        pairs = zip(worth[rules["choose"]], worth[rules["checkpoints"]], strict=True)
        worth["choose minus best of last and five checkpoints"] = [
            [a - b for a, b in zip(*both, strict=True)] for both in pairs
        ]
        rows = [
            [plain(about), *(interval(Effect(tuple(map(present, x))).interval) for x in each)]
            for about, each in worth.items()
        ]
        self.page.table(["minus always tail25", *(f"{b} episodes" for b in BUDGETS)], rows)
        self.page.text(
            "The best of windows or of checkpoints is a baseline, which spends these episodes too."
            " Mean over cells 1 to 3 in normalised score, 95 % t intervals, not adjusted. Chosen on"
            " some of the final episodes, scored on the others, 200 random splits a run. Without a"
            " number: too few episodes for so many candidates. Only 60 was registered to be"
            f" tested. `polyak_rl.choose` is that of commit {commit_of(CHOOSE)}."
        )


def predicted(low: float, high: float) -> str:
    """As in "+0.10 to +0.20"."""
    if np.isinf(high):
        return f"above {low:g}"
    return "about 0" if low == high == 0 else f"{low:+.2f} to {high:+.2f}".replace("-", "−")
