"""Numbers, names and the rows of tables in words."""

# ruff: noqa: RUF001  (the text has minus signs, dashes and Greek letters, and means them)

import math
import re
from collections.abc import Sequence

import numpy as np

from scripts.experiment.analysis import Effect, gain, present
from scripts.experiment.schemes import LAST, PLACEBO
from scripts.experiment.stats import Interval
from scripts.experiment.tidy import Stratum

INDICATIVE = 10  # runs: with fewer a word is said to be indicative

OVERVIEW = (
    "",
    "runs",
    "difference",
    "last",
    "averaged",
    "stopped late",
    "worst tenth",
    "interquartile mean",
    "placebo − last",
    "SD within a run",
    "better / tied / worse",
)
OVERVIEW_NOTE = (
    "Means over runs, normalised where a scale is known, of the shipped weights; in the columns"
    " from “stopped late” on, differences as well: of the runs stopped late, of the worst tenth"
    " of the last point's episodes. Last and averaged: on episodes that both played. SD within a"
    " run: of last after 50 and up to 75 % of it, before any endpoint."
)
JUDGED = ("difference", "stopped late", "worst tenth")


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
    return word + ", indicative" * is_indicative(effect)


def is_indicative(effect: Effect) -> bool:
    """Whether it rests on enough runs for a word, and on too few for more than a hint."""
    return effect.enough and min(x.size for x in effect.samples) < INDICATIVE


def includes_zero(effect: Effect) -> bool:
    """Whether the 95 % interval does."""
    return bool(effect.interval.low <= 0 <= effect.interval.high)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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


def judged(s: Stratum, scheme: str) -> list[str]:
    """Differences from last: shipped, stopped late, and on the worst tenth of the episodes."""
    endpoints = (Stratum.shipped, Stratum.late, Stratum.worst)
    effects = [gain(s, scheme=scheme, endpoint=endpoint) for endpoint in endpoints]
    return [interval(effect.interval, bool(s.scale)) if effect.runs else "–" for effect in effects]


def overview(s: Stratum, scheme: str) -> list[str]:
    """The cells of a stratum's row under `OVERVIEW`."""
    known = bool(s.scale)
    last, average = s.shipped(LAST.name, scheme), s.shipped(scheme, LAST.name)
    both = np.isfinite(last + average)
    effect = gain(s, scheme=scheme)
    placebo = gain(s, scheme=PLACEBO.name)
    alone = last[both] if both.any() else present(s.shipped(LAST.name))
    difference, *more = judged(s, scheme)
    moved = present(s.wobble(LAST.name))
    return [
        str(len(alone)),
        difference,
        number(float(alone.mean()), known) if alone.size else "–",
        number(float(average[both].mean()), known) if both.any() else "–",
        *more,
        number(effect.iqm, known, sign=True) if effect.runs else "–",
        interval(placebo.interval, known) if placebo.runs else "–",
        number(float(moved.mean()), known) if moved.size else "–",
        counts(effect) if effect.runs else "–",
    ]
