"""Numbers and findings in words."""

# ruff: noqa: RUF001  (the text has minus signs, dashes and Greek letters, and means them)

import math
import re
from collections.abc import Sequence

import numpy as np

from scripts.experiment.analysis import Comparison
from scripts.experiment.stats import Interval
from scripts.experiment.tidy import (
    FIRM,
    MARGIN,
    SCHEMES,
    Stratum,
)


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
    # Of several environments this is one number: what each of them shows is said below it.
    over = "on" if len(c.strata) == 1 else "pooled over"
    return f"{averaging(scheme)} {found} {over} {where}: {', '.join(numbers)}."
