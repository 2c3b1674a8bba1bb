"""Which difference is looked at, how it is tested, and which word it may be called by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.stats import trim_mean  # type: ignore[import-untyped]

from scripts.experiment import stats
from scripts.experiment.schemes import LAST, PRIMARY
from scripts.experiment.stats import Floats, Interval
from scripts.experiment.tidy import LARGEST, Key, Stratum

FEWEST = 5  # runs: with fewer there is neither an interval nor a word
SIGNIFICANT = 0.05
MARGIN = 0.2  # standard deviations of the last iterate over runs: less does not matter
CEILING = 0.5  # share of the pairs at the largest return

Endpoint = Callable[..., Floats]  # Stratum.shipped or such: (stratum, scheme, *beside) -> [N]


@dataclass(frozen=True, eq=False)
class Effect:
    """A weighted sum over strata of mean paired differences, one number a run."""

    samples: tuple[Floats, ...]  # the differences, one array [n_e] for each stratum
    weights: tuple[float, ...] | None = None  # of the strata; None: equal ones
    margin: float = np.nan  # what does not matter is smaller
    ceiling: bool = False  # over half of the pairs are at the environment's largest return
    by_t: bool = False  # p is that of the t interval, in place of sign flips

    @property
    def runs(self) -> int:
        """In all strata."""
        return sum(x.size for x in self.samples)

    @property
    def enough(self) -> bool:
        """Whether each stratum has the runs for an interval and a test."""
        return min(x.size for x in self.samples) >= FEWEST

    @cached_property
    def interval(self) -> Interval:
        """The estimate with its 95 % t interval; NaN ends where runs are too few."""
        if self.enough:
            return stats.mean_interval(*self.samples, weights=self.weights)
        nothing = np.array(np.nan)
        return Interval(np.asarray(self._sum(np.mean)), nothing, nothing)

    @cached_property
    def p(self) -> float:
        """Two-sided and not adjusted; NaN where runs are too few."""
        if not self.enough:
            return np.nan
        test = stats.t_p if self.by_t else stats.sign_flip_p
        return test(*self.samples, weights=self.weights)

    @property
    def iqm(self) -> float:
        """The same sum of interquartile means."""
        return self._sum(lambda x: trim_mean(x, 0.25))

    def _sum(self, statistic: Callable[[Floats], Floats]) -> float:
        weights = self.weights or [1 / len(self.samples)] * len(self.samples)
        values = [float(statistic(x)) if x.size else np.nan for x in self.samples]
        return float(np.dot(weights, values))

    @property
    def counts(self) -> tuple[int, int, int]:
        """Runs that came out better, tied, and worse."""
        d = np.concatenate(self.samples)
        return int((d > 0).sum()), int((d == 0).sum()), int((d < 0).sum())

    def can_reject(self, tests: int) -> bool:
        """Whether any outcome of the untied runs could be significant among so many tests."""
        better, _, worse = self.counts
        least = 0.0 if self.by_t else 2.0 ** (1 - better - worse)
        return self.enough and least <= SIGNIFICANT / tests

    def word(self, p: float) -> str:
        """What may be said, given the adjusted p; NaN where it was left out of the family."""
        if not self.enough:
            return "too few runs"
        if p <= SIGNIFICANT:
            return "better" if self.interval.estimate > 0 else "worse"
        if self.ceiling:
            return "cannot tell: ceiling"
        if self.interval.inside(self.margin):
            return "no difference that matters"
        return "not settled"


def gain(
    *strata: Stratum,
    scheme: str = PRIMARY.name,
    base: str = LAST.name,
    endpoint: Endpoint = Stratum.shipped,
    weights: tuple[float, ...] | None = None,
    crashed: Sequence[int] = (),
    by_t: bool = False,
) -> Effect:
    """The scheme minus the base, paired by run; each stratum weighs the same without `weights`.

    So many `crashed` runs of each stratum count as no difference.
    """
    pairs = [(endpoint(s, scheme, base), endpoint(s, base, scheme)) for s in strata]
    samples = [present(a - b) for a, b in pairs]
    for i, lost in enumerate(crashed):
        samples[i] = np.append(samples[i], np.zeros(lost))
    at = np.concatenate([at_ceiling(s, a, b) for s, (a, b) in zip(strata, pairs, strict=True)])
    ceiling = bool(at.size) and at.mean() > CEILING
    return Effect(tuple(samples), weights, margin(*strata, endpoint=endpoint), ceiling, by_t)


def contrast(
    terms: Sequence[tuple[float, Stratum, str]], *, endpoint: Endpoint = Stratum.shipped
) -> Effect:
    """A weighted sum of scores, of (weight, stratum, scheme) each, paired by training seed.

    It is at the ceiling where over half of the seeds have all the scores there that count.
    """
    scores = []
    for _, s, scheme in terms:
        beside = {other for _, one, other in terms if one is s}
        scores.append(dict(zip(s.seeds, endpoint(s, scheme, *beside), strict=True)))
    common = [seed for seed in scores[0] if all(np.isfinite(x.get(seed, np.nan)) for x in scores)]
    parts: dict[Key, Floats] = {}  # stratum by stratum, so that equal scores come to exactly 0
    at = np.ones(len(common), dtype=bool)
    for (weight, s, _), score in zip(terms, scores, strict=True):
        row = np.array([score[seed] for seed in common])
        parts[s.key] = parts.get(s.key, np.zeros(len(common))) + weight * row
        if weight:
            at &= at_ceiling(s, row, row)
    limit = margin(*{s.key: s for _, s, _ in terms}.values(), endpoint=endpoint)
    total = np.sum([*parts.values()], axis=0)
    return Effect((total,), None, limit, bool(at.size) and bool(at.mean() > CEILING))


def margin(*strata: Stratum, endpoint: Endpoint = Stratum.shipped) -> float:
    """What does not matter: a share of last's standard deviation over runs, the strata's mean."""
    ends = [present(endpoint(s, LAST.name)) for s in strata]
    if min(map(len, ends)) < 2:
        return np.nan
    return float(MARGIN * np.mean([x.std(ddof=1) for x in ends]))


def at_ceiling(s: Stratum, a: Floats, b: Floats) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which of the pairs that are there have both at the environment's largest return."""
    there = np.isfinite(a) & np.isfinite(b)
    top = s.normalise(np.array(LARGEST.get(s.env, np.inf)))
    return (a[there] >= top) & (b[there] >= top)


def present(x: Floats) -> Floats:
    """The entries that are not NaN."""
    return x[np.isfinite(x)]


def adjust(family: Sequence[Effect | None]) -> list[float]:
    """Holm's p of each test over those that can reject; NaN of the others.

    A test that is planned and not computed, None, counts as one that found nothing.
    """
    tests = [e for e in family if e is None or e.enough]
    able = [i for i, e in enumerate(family) if e is None or e.can_reject(len(tests))]
    adjusted = np.full(len(family), np.nan)
    raw = [1.0 if (e := family[i]) is None else e.p for i in able]
    adjusted[able] = stats.holm(raw) if able else []
    return [float("nan") if e is None else float(p) for e, p in zip(family, adjusted, strict=True)]
