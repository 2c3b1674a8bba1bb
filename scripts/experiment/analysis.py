"""What is compared with what: a scheme against the last iterate, paired by run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scripts.experiment import stats
from scripts.experiment.stats import Floats, Interval
from scripts.experiment.tidy import (
    BASE,
    FEWEST,
    MANY_TIES,
    MARGIN,
    NO_AVERAGES,
    TIES,
    Stratum,
    present,
)


@dataclass(frozen=True)
class Comparison:
    """A scheme against last over the paired runs of one or more strata."""

    strata: list[Stratum]
    runs: int
    iqm: Interval  # of the paired differences; NaN ends where no interval may be printed
    mean: Interval
    ties: float  # share of differences that are exactly 0
    wins: int
    losses: int
    better: Interval  # probability of improvement
    p: float  # sign flips of the IQM, or of the mean where ties forbid the IQM; NaN under five runs

    @property
    def tied(self) -> bool:
        """Whether ties forbid an IQM interval, so that the mean speaks."""
        return self.ties > TIES

    @property
    def main(self) -> Interval:
        """The interval that the conclusion rests on."""
        return self.mean if self.tied else self.iqm

    @property
    def known(self) -> bool:
        """Whether the differences are normalised."""
        return all(s.known for s in self.strata)

    @property
    def measure(self) -> str:
        """What `main` is an interval of."""
        return "mean" if self.tied else "interquartile mean"

    @property
    def verdict(self) -> str:
        """One word for what the interval allows to say."""
        if self.runs < FEWEST:
            return "too few runs"
        if self.wins == self.losses == 0:
            return "all tied"
        by_flips = self.ties > MANY_TIES and self.p <= 0.05  # no interval to go by
        if self.main.low > 0 or (by_flips and self.mean.estimate > 0):
            return "better"
        if self.main.high < 0 or (by_flips and self.mean.estimate < 0):
            return "worse"
        if self.known and self.main.inside(MARGIN):
            return "no difference"
        return "open"


def point(estimate: Floats) -> Interval:
    """An estimate without an interval."""
    return Interval(estimate, np.full_like(estimate, np.nan), np.full_like(estimate, np.nan))


def iqm_of(x: Floats, value: float | None = None) -> Interval:
    """The IQM of one stratum's runs [n], with its interval where runs and ties allow one."""
    if x.size < FEWEST or stats.tie_share(x, value) > TIES:
        return point(stats.iqm(x))
    return stats.iqm_interval(x)


def mean_of(*strata: Floats) -> Interval:
    """The mean over the runs of strata, with its interval where runs and ties allow one."""
    pooled = np.concatenate(strata)
    if min(x.size for x in strata) < FEWEST or stats.tie_share(pooled, 0.0) > MANY_TIES:
        return point(stats.mean(pooled))
    return stats.mean_interval(*strata)


def compare(
    strata: Sequence[Stratum], scheme: str, rng: np.random.Generator, resamples: int
) -> Comparison | None:
    """The scheme against last, by whole runs; None where no run has both."""
    strata = [s for s in strata if s.difference(scheme).size]
    return weigh(strata, [s.difference(scheme) for s in strata], rng, resamples) if strata else None


def weigh(
    strata: Sequence[Stratum], d: Sequence[Floats], rng: np.random.Generator, resamples: int
) -> Comparison:
    """All that is said of paired differences d, one array [n] for each stratum.

    Over one stratum the IQM's interval is Tukey and McLaughlin's, over several the bootstrap's.
    """
    pooled = np.concatenate(d)
    ties = stats.tie_share(pooled, 0.0)
    if len(d) == 1 or ties > TIES:
        iqm = iqm_of(pooled, 0.0)
    else:
        iqm = stats.bootstrap_interval(d, rng, resamples=resamples)
    statistic = stats.mean if ties > TIES else stats.iqm
    return Comparison(
        strata=list(strata),
        runs=pooled.size,
        iqm=iqm,
        mean=mean_of(*d),
        ties=ties,
        wins=int((pooled > 0).sum()),
        losses=int((pooled < 0).sum()),
        better=stats.share_interval(stats.improvement_probability(pooled), pooled.size),
        p=math.nan if pooled.size < FEWEST else stats.sign_flip_p(d, rng, statistic, resamples),
    )


def choose(
    stratum: Stratum, first: int, rng: np.random.Generator, resamples: int
) -> tuple[str, float, Comparison] | None:
    """The average that does best in the first runs, and what it does in all others.

    Args:
        stratum: Its runs are ordered by training seed.
        first: So many runs choose, 1 or more; at least five others must be left to test.
        rng: For the sign flips.
        resamples: Sign flips.

    Returns:
        The scheme with the largest IQM of the paired differences in the first runs, that IQM, and
        its comparison in the others; None where runs or schemes are too few.
    """
    order = sorted(
        range(len(stratum.runs)), key=lambda i: (len(stratum.seeds[i]), stratum.seeds[i])
    )
    finished = present(stratum.endpoint(BASE)[order[:first]]).size
    found = {}
    for name in stratum.scores:
        if name in NO_AVERAGES or name.startswith("line"):
            continue
        d = stratum.gain(name)[order]
        choosing, testing = present(d[:first]), present(d[first:])
        if choosing.size == finished > 0 and testing.size >= FEWEST:
            found[name] = float(stats.iqm(choosing)), testing
    if not found:
        return None
    best = max(found, key=lambda name: found[name][0])
    there, testing = found[best]
    return best, there, weigh([stratum], [testing], rng, resamples)


def band(x: Floats, rng: np.random.Generator, value: float | None = None) -> Interval:
    """The IQM of curves [n, P] with a simultaneous band; no band under five runs or where tied."""
    out = point(stats.iqm(x.T))
    free = np.array([stats.tie_share(p, value) <= TIES for p in x.T])
    if len(x) >= FEWEST and free.any():
        held = stats.simultaneous_band(x[:, free], rng)
        out.low[free], out.high[free] = held.low, held.high
    return out


def stability(stratum: Stratum, scheme: str) -> dict[str, Floats]:
    """What each run's late evaluations say beyond their mean, normalised, [N] each."""
    scores, tails = stratum.scores[scheme], stratum.endpoint(scheme, stratum.tails)
    whole = np.isfinite(scores).all(axis=1)
    sd, drop = np.full((2, len(scores)), np.nan)
    if whole.any() and scores.shape[1] >= 2:
        sd[whole] = stats.late_sd(scores[whole]) / stratum.span
        drop[whole] = stats.max_drawdown(scores[whole]) / stratum.span
    return {"SD within run": sd, "CVaR 10 %": stratum.normalise(tails), "drawdown": drop}
