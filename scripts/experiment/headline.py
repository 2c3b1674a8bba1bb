"""What the registered study found, in five sentences that follow its tests.

Each verb is that of the word which the registration allows for an effect and its adjusted p.
"""

from scripts.experiment.analysis import Effect, gain
from scripts.experiment.registered import BUDGET, HEADROOM, NULL, Study, Test
from scripts.experiment.wording import (
    includes_zero,
    interval,
    is_indicative,
    listing,
    number,
    p_value,
    plain,
    says,
)

VERBS = {  # of what is compared with something
    "better": "was better than",
    "worse": "was worse than",
    "no difference that matters": "made no difference that matters to",
    "cannot tell: ceiling": "cannot be told, at the ceiling, from",
    "not settled": "is not settled against",
    "too few runs": "has too few runs to be told from",
}


PLACE = (
    "Averaged or past weights have acted as policies before (Nikishin et al. 2018, Schwarzer et al."
    " 2023, Fujimoto et al. 2023 and Ramé et al. 2024); none of the abstracts listed below names"
    " paired runs, past policies chosen at equal evaluation cost, and a decaying learning rate"
    " together."
)
"""What was known before, as far as the report's list of works goes."""


def headline(study: Study) -> list[str]:
    """The five sentences; or one, where it cannot be said what came out."""
    if not study.closed:
        return [
            "The registered study is under way: nothing of it is compared before all of its cells"
            " that will be run have ended."
        ]
    if not study.primary():
        return ["The registered primary test cannot be made: a cell of it was left out."]
    tests = {test.number: test for test in study.secondary()}
    return [
        averaging(study),
        where(study, tests),
        evaluating(tests),
        instead(tests),
        predicted(study),
    ]


def averaging(study: Study) -> str:
    """The primary test."""
    effect, *without = [*study.primary().values()][: 1 + len(HEADROOM)]
    names = listing([plain(study.cells[cell].name) for cell in HEADROOM])
    least, most = (f(float(e.interval.estimate) for e in without) for f in (min, max))
    return (
        f"Over {names}, shipping the average of the last quarter of the run (tail25)"
        f" {verb(effect)} shipping the last iterate: {interval(effect.interval)} in"
        f" normalised score ({effect.runs} runs, 95 % interval, sign-flip p"
        f" {p_value(effect.p)}, the one registered primary test; without one of the three,"
        f" {number(least, sign=True)} to {number(most, sign=True)})."
    )


def where(study: Study, tests: dict[int, Test]) -> str:
    """Each cell with headroom, and those without."""
    cells = [f"{says_of(tests[cell[0]])} in {study.title(cell)}" for cell in HEADROOM]
    null = study.effect(gain, *NULL)
    rest = f" (there {interval(null.interval)})" if null else ""
    return (
        f"By Holm's p (intervals are not adjusted), tail25 against last came out as"
        f" {listing(cells)}; headroom minus the cells where none was expected{rest} as"
        f" {says_of(tests[4])}."
    )


def evaluating(tests: dict[int, Test]) -> str:
    """Choosing at equal numbers of evaluation episodes."""
    return (
        f"With {BUDGET} episodes to choose by, the best of ten windows of 5 % against always tail25"
        f" came out as {says_of(tests[5])}, polyak\\_rl.choose among all against always tail25 as"
        f" {says_of(tests[6])}, and against the best of last and five checkpoints, which spends"
        f" them too, as {says_of(tests[7])}."
    )


def instead(tests: dict[int, Test]) -> str:
    """What people do in its place, and what the gain goes with."""
    return (
        "In place of averaging, the last iterate of a decaying learning rate came out as"
        f" {says_of(tests[8])} and the target actor as {says_of(tests[9])}, both against tail25;"
        f" the gain of averaging by doubling of the learning rate as {says_of(tests[10])}, without"
        f" decay minus with it as {says_of(tests[11])}, and at targets that were predicted to leave"
        f" more room minus others as {says_of(tests[12])}."
    )


def predicted(study: Study) -> str:
    """How many predictions failed, what was not run, and what crashed."""
    made = [*study.predictions()]
    judged = [p for p in made if p.effect is not None]
    failed = [plain(p.about) for p in judged if p.outcome == "failed"]
    held = sum(p.outcome == "held" for p in judged)
    which = f" ({listing(failed)})" if failed else ""
    absent = listing([f"cell {key[0]}" + f" ({key[1]})" * bool(key[1]) for key in study.absent])
    return (
        f"Of {len(judged)} predictions that can be judged {len(failed)} failed{which} and {held}"
        f" held, by a rule that was not registered; cells that are missing:"
        f" {plain(absent) or 'none'}; runs that crashed: {sum(study.crashed.values())}."
    )


def verb(effect: Effect) -> str:
    """How the primary test came out: not shown where the interval includes 0, whatever its p."""
    word = effect.word(effect.p)
    if word in ("better", "worse") and includes_zero(effect):
        word = "not settled"
    return f"**{VERBS[word]}**" + " (indicative)" * is_indicative(effect)


def says_of(test: Test) -> str:
    """A test's word with its interval."""
    if test.effect is None:
        return "not run" if test.computed else "not computed"
    return f"**{says(test.effect, test.p, *test.words)}** ({interval(test.effect.interval)})"
