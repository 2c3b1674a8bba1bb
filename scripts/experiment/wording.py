"""Numbers and names in words."""

# ruff: noqa: RUF001  (the text has minus signs, dashes and Greek letters, and means them)

import math
import re
from collections.abc import Sequence

import numpy as np

from scripts.experiment.analysis import Effect
from scripts.experiment.stats import Interval

INDICATIVE = 10  # runs: with fewer a word is said to be indicative


def plain(text: object) -> str:
    """Somebody else's text as Markdown that shows it and does nothing else."""
    return re.sub(r"([\\`*_{}\[\]<>|&$~!#])", r"\\\1", " ".join(str(text).split()))


def number(x: float, normalised: bool = True, sign: bool = False) -> str:
    """Three decimals of a normalised score, four digits of a raw one; a true minus."""
    if not math.isfinite(x):
        return "–"
    decimals = 3 if normalised or x == 0 else max(0, 3 - math.floor(math.log10(abs(x))))
    text = f"{x:{'+' if sign else ''}.{decimals}f}"
    return text.replace("-", "−")


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


def counts(effect: Effect) -> str:
    """As in "12 / 3 / 5": better, tied, worse."""
    return " / ".join(map(str, effect.counts))


def says(effect: Effect, p: float, up: str = "better", down: str = "worse") -> str:
    """The word for an effect with its adjusted p, for a contrast in words of its own."""
    word = {"better": up, "worse": down}.get(text := effect.word(p), text)
    few = effect.enough and min(x.size for x in effect.samples) < INDICATIVE
    return word + ", indicative" * few


def listing(words: Sequence[str]) -> str:
    """As in "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def span(names: Sequence[str]) -> str:
    """Training seeds, as a range where they are one."""
    if len(names) > 2 and all(name.isascii() and name.isdigit() for name in names):
        numbers = sorted(map(int, names))
        if numbers == list(range(numbers[0], numbers[-1] + 1)):
            return f"{numbers[0]}–{numbers[-1]}"
    return ", ".join(map(plain, names))
