"""The policies that a run is evaluated with: which weights, under which name, and when."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from polyak_rl import Between, Ema, Rule, Tail, Uniform

LATE = 0.8
"""Evaluations from this share of the run on are stopping times of the second endpoint."""


@dataclass(frozen=True)
class Scheme:
    """One way to take the policy's weights from a run.

    Attributes:
        name: As rows, figures and TensorBoard have it.
        label: In words.
        when: It is evaluated at every point, from `LATE` on, or at the end of the run.
        rule: The average, for a run of so many updates; None: it is no average of the run.
        at: The share of the run at which a checkpoint is taken, in per cent.
    """

    name: str
    label: str
    when: Literal["always", "late", "end"]
    rule: Callable[[int], Rule] | None = None
    at: int | None = None


def tail(percent: int, when: Literal["always", "late", "end"]) -> Scheme:
    """The uniform average of the last part of the run."""
    label = f"uniform over the last {percent} %"
    return Scheme(f"tail{percent}", label, when, lambda updates: Tail(percent / 100))


def window(percent: int) -> Scheme:
    """The uniform average of the 5 % of the run before a point, which stands for a checkpoint."""
    label = f"uniform from {percent - 5} to {percent} % of the run"
    ends = (percent - 5) / 100, percent / 100
    return Scheme(f"window{percent}", label, "end", lambda updates: Between(*ends))


def checkpoint(percent: int) -> Scheme:
    """The iterate at a point of the run."""
    return Scheme(f"checkpoint{percent}", f"iterate at {percent} % of the run", "end", at=percent)


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("last", "last iterate", "always"),
        tail(5, "end"),
        tail(10, "end"),
        tail(25, "always"),
        tail(50, "always"),
        Scheme("all", "uniform over all of training", "end", lambda updates: Uniform()),
        Scheme(
            "ema1",
            "EMA, half-life 1 %",
            "late",
            lambda updates: Ema(half_life=max(1.0, updates / 100)),
        ),
        Scheme("target", "the target actor", "late"),
        *(window(percent) for percent in range(95, 50, -5)),
        *(checkpoint(percent) for percent in range(95, 70, -5)),
        Scheme("placebo", "last iterate, other episodes", "end"),
    )
}
"""All schemes by name, in the order of the tables."""
