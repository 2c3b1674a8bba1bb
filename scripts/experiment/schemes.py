"""The policies that a run is evaluated with: which weights, under which name, and when."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from polyak_rl import Between, Ema, Rule, Tail, Uniform

LATE = 0.8
"""Evaluations from this share of the run on are stopping times of the second endpoint."""


def is_late(step: Any, end: Any) -> Any:
    """Whether an evaluation at a step, or at each of an array, is from `LATE` of the run on."""
    return step > LATE * end - 1  # a point of the run is rounded down to a whole step


When = Literal["always", "late", "end", "never"]


@dataclass(frozen=True)
class Scheme:
    """One way to take the policy's weights from a run."""

    name: str  # as rows, figures and TensorBoard have it
    label: str
    when: When  # it is evaluated at every point, from `LATE` on, at the end of the run; or no more
    rule: Callable[[int], Rule] | None = None  # of so many updates; None: it is no average of them
    until: int | None = None  # per cent of the run at which a policy of its past ends
    candidate: bool = True  # whether one may ship it; the others say what shipping is worth
    # Its axis in the figure of the averages, and where it stands there, in per cent of the run.
    place: tuple[Literal["tail", "ema"], float] | None = None

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is an iterate of the past."""
        return self.until is not None and self.rule is None


def tail(percent: int, when: When) -> Scheme:
    """The uniform average of the last part of the run."""
    label = f"uniform over the last {percent} %"
    rule = lambda updates: Tail(percent / 100)  # noqa: E731
    return Scheme(f"tail{percent}", label, when, rule, place=("tail", percent))


def ema(percent: float, when: When) -> Scheme:
    """The exponential average with a half-life of a part of the run."""
    label = f"EMA, half-life {percent:g} %"
    rule = lambda updates: Ema(half_life=max(1.0, percent * updates / 100))  # noqa: E731
    return Scheme(f"ema{percent:g}", label, when, rule, place=("ema", percent))


def window(percent: int) -> Scheme:
    """The uniform average of the 5 % of the run before a point, which stands for a checkpoint."""
    label = f"uniform from {percent - 5} to {percent} % of the run"
    ends = (percent - 5) / 100, percent / 100
    rule = lambda updates: Between(*ends)  # noqa: E731
    return Scheme(f"window{percent}", label, "end", rule, until=percent)


def checkpoint(percent: int) -> Scheme:
    """The iterate at a point of the run."""
    return Scheme(
        f"checkpoint{percent}", f"iterate at {percent} % of the run", "end", until=percent
    )


def rules_of(schemes: Iterable[Scheme], updates: int) -> dict[str, Rule]:
    """The averages among the schemes by name, in a run of so many updates."""
    return {scheme.name: scheme.rule(updates) for scheme in schemes if scheme.rule}


def table(*schemes: Scheme) -> dict[str, Scheme]:
    """The schemes by name."""
    return {scheme.name: scheme for scheme in schemes}


LAST = Scheme("last", "last iterate", "always")
PRIMARY = tail(25, "always")
TARGET = Scheme("target", "the target actor", "late")
PLACEBO = Scheme("placebo", "placebo: last iterate, other episodes", "end", candidate=False)
ALL = Scheme(
    "all", "uniform over all of training", "end", lambda updates: Uniform(), place=("tail", 100)
)
TAIL50, EMA1 = tail(50, "always"), ema(1, "late")
SHOWN = (TAIL50, EMA1)
"""What every run is evaluated with beside the last iterate."""

SCHEMES = table(
    LAST,
    tail(5, "end"),
    tail(10, "end"),
    PRIMARY,
    TAIL50,
    ALL,
    EMA1,
    TARGET,
    *(window(percent) for percent in range(95, 50, -5)),
    *(checkpoint(percent) for percent in range(95, 70, -5)),
    PLACEBO,
)
"""All schemes of the study by name, in the order of the tables."""

SHIPPABLE = [
    scheme
    for scheme in SCHEMES.values()
    if scheme.candidate and not scheme.is_checkpoint and scheme is not ALL
]
"""What `scripts.ship` chooses among; windows stand for checkpoints, of which no files are kept."""

KNOWN = SCHEMES | table(
    tail(75, "never"),
    tail(90, "never"),
    *(ema(percent, "never") for percent in (0.1, 0.3, 3, 10)),
    *(
        Scheme(f"power{gamma}", f"power function, gamma = {gamma}", "never")
        for gamma in (6.94, 16.97)
    ),
    Scheme("lawa", "LAWA, 5 snapshots of the last 5 %", "never"),
    Scheme(
        "best",
        "best of 20 checkpoints, a baseline that spends 480 episodes",
        "never",
        candidate=False,
    ),
    *(
        Scheme(
            f"line{x:g}",
            f"on the line through last (0) and tail50 (1), at {x:g}",
            "never",
            candidate=False,
        )
        for x in (-0.5, 0, 0.25, 0.5, 0.75, 1, 1.5)
    ),
)
"""The same and those of the first study, which are measured no more."""
