"""Statistics for paired runs: what a reviewer asks of "does the average beat the last iterate?".

Averaging never touches training, so the last and the averaged policy of one run form a pair and
everything below takes the **differences** of such pairs, one number a run. Runs are on the last
axis; leading axes, where a docstring shows them as `...`, are independent problems. A "stratum" is
one environment (and algorithm): resampling and sign flips never move a run out of its own.

Two estimates of the middle are used. The mean has a t interval. The interquartile mean (IQM, the
mean of the middle half) ignores a few wild runs and is the field's default for aggregates (Agarwal
et al. 2021, https://arxiv.org/abs/2108.13264); within one environment its interval is that of
Tukey and McLaughlin, over several the percentile bootstrap.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]  # [..., N] -> [...]

TRIM = 0.25  # of the runs, from each end: what is left is the interquartile mean


class Interval(NamedTuple):
    """An estimate and the ends of its interval: three numbers, or three arrays of one shape."""

    estimate: Floats
    low: Floats
    high: Floats

    def inside(self, margin: float) -> bool:
        """Whether the whole interval lies within +-margin: the claim "no difference that matters".

        The interval is the 95 % one, so the claim errs less often than the usual two one-sided
        tests at 5 % (which need the 90 % interval only).
        """
        return bool(np.all(self.low > -margin) and np.all(self.high < margin))


def _runs(x: ArrayLike, least: int) -> Floats:
    """`x` as finite float64 scores with at least `least` runs on its last axis."""
    x = np.asarray(x, dtype=np.float64)
    if x.ndim == 0 or x.shape[-1] < least:
        raise ValueError(f"expected at least {least} runs on the last axis, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"expected finite scores, got {np.count_nonzero(~np.isfinite(x))} others")
    return x


def _pool(strata: Sequence[ArrayLike], least: int) -> list[Floats]:
    """The strata as one-dimensional arrays, each with at least `least` runs."""
    if len(strata) == 0:
        raise ValueError("expected at least one stratum, got none")
    pooled = [_runs(x, least) for x in strata]
    for x in pooled:
        if x.ndim != 1:
            raise ValueError(f"expected one number a run in each stratum, got shape {x.shape}")
    return pooled


def mean(x: ArrayLike) -> Floats:
    """The mean over the last axis, [..., N] -> [...]: the other `Statistic` beside `iqm`."""
    return _runs(x, 1).mean(axis=-1)


def iqm(x: ArrayLike) -> Floats:
    """The interquartile mean: cut floor(N/4) runs from each end and average the others.

    Args:
        x: scores or differences, [..., N] with N >= 1.

    Returns:
        The mean of the middle half, [...].

    Example:
        >>> float(iqm([-100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 900.0]))
        3.5
    """
    x = np.sort(_runs(x, 1), axis=-1)
    cut = int(TRIM * x.shape[-1])
    return x[..., cut : x.shape[-1] - cut].mean(axis=-1)


def tie_share(x: ArrayLike, value: float | None = None) -> float:
    """The share of runs that are exactly `value` (by default: the commonest value).

    A ceiling makes ties: both policies of a run score 500, and the difference is exactly 0. Where
    ties pass a quarter, the IQM sits on the tied value and its intervals no longer cover.

    Args:
        x: one number a run, [N].
        value: the tied value to count, 0 for differences.

    Example:
        >>> tie_share([0.0, 0.0, 0.3, -0.1], value=0.0)
        0.5
    """
    x = _runs(x, 1)
    if value is not None:
        return float(np.mean(x == value))
    return float(np.unique(x, return_counts=True)[1].max() / x.size)


def mean_interval(*strata: ArrayLike, level: float = 0.95) -> Interval:
    """The t interval of the mean over all runs; with one stratum of differences, the paired t.

        sum_e w_e m_e  +-  t_df sqrt(sum_e w_e^2 s_e^2 / n_e),   w_e = n_e / N

    m, s, n are a stratum's mean, standard deviation (n - 1) and runs. Every run counts the same;
    spread between strata is not noise. df is Welch and Satterthwaite's.

    Args:
        strata: differences, one array [..., n_e] with n_e >= 2 for each environment.
        level: the coverage asked for, in (0, 1).

    Returns:
        An `Interval` of arrays [...].

    References:
        Welch (1947), The generalization of Student's problem, Biometrika 34, 28-35.

    Example:
        >>> [round(float(v), 3) for v in mean_interval([1.0, 2.0, 3.0])]
        [2.0, -0.484, 4.484]
    """
    if not strata:
        raise ValueError("expected at least one stratum, got none")
    arrays = [_runs(x, 2) for x in strata]
    total = sum(x.shape[-1] for x in arrays)
    centre = sum(x.sum(axis=-1) for x in arrays) / total
    # w^2 s^2 / n = n s^2 / N^2
    parts = [x.shape[-1] * x.var(axis=-1, ddof=1) / total**2 for x in arrays]
    variance = sum(parts)
    squares = sum(v**2 / (x.shape[-1] - 1) for v, x in zip(parts, arrays, strict=True))
    # With no spread at all the interval is the point, whatever df.
    df = np.where(variance > 0, variance**2 / np.where(squares > 0, squares, 1), 1)
    half = stats.t.ppf((1 + level) / 2, df) * np.sqrt(variance)
    return Interval(centre, centre - half, centre + half)


def _winsorised(x: Floats) -> tuple[Floats, Floats, int]:
    """Deviations of the winsorised runs [..., N], the trimmed mean's error [...], and its df."""
    n = x.shape[-1]
    cut = int(TRIM * n)
    kept = n - 2 * cut
    order = np.sort(x, axis=-1)
    w = np.clip(x, order[..., cut, None], order[..., n - cut - 1, None])
    w = w - w.mean(axis=-1, keepdims=True)
    # SSW / (h (h - 1)): h runs are kept, the cut ones still say how wide the middle is.
    return w, np.sqrt((w**2).sum(axis=-1) / (kept * (kept - 1))), kept - 1


def iqm_interval(x: ArrayLike, level: float = 0.95) -> Interval:
    """Tukey and McLaughlin's interval of the IQM: a t interval for a trimmed mean.

        iqm(x)  +-  t_{h-1} sqrt(SSW / (h (h - 1))),   h = N - 2 floor(N/4)

    SSW is the sum of squares of the runs after the cut ones are moved to the nearest kept one. It
    covers about .7, not .95, where over a quarter of the runs are tied: ask `tie_share` first.

    Args:
        x: scores or differences, [..., N] with N >= 4.
        level: the coverage asked for, in (0, 1).

    Returns:
        An `Interval` of arrays [...].

    References:
        Tukey and McLaughlin (1963), Less vulnerable confidence and significance procedures for
        location based on a single sample, Sankhya A 25, 331-352.
    """
    x = _runs(x, 4)
    _, error, df = _winsorised(x)
    half = stats.t.ppf((1 + level) / 2, df) * error
    centre = iqm(x)
    return Interval(centre, centre - half, centre + half)


def simultaneous_band(
    curves: ArrayLike, rng: np.random.Generator, level: float = 0.95, draws: int = 2_000
) -> Interval:
    """A band for the IQM of curves that holds at all points at once.

        iqm_t  +-  q error_t,   q: the quantile of max_t |T_t|

    T_t is the statistic of `iqm_interval`, of N Gaussian curves that are correlated between points
    as the runs are. The error is estimated at each point anew, and at ten runs that matters: one
    error for all points would cover .8 instead of .95.

    Args:
        curves: one curve a run, [N, P] with N >= 4.
        rng: draws the Gaussian curves.
        level: the probability that the band holds everywhere, in (0, 1).
        draws: how many sets of N curves.

    Returns:
        An `Interval` of arrays [P]; no width where all kept runs agree.

    References:
        Montiel Olea and Plagborg-Moller (2019), Simultaneous confidence bands, Journal of Applied
        Econometrics 34, 1-17 (the sup-t band).
    """
    x = np.asarray(curves, dtype=np.float64)
    if x.ndim != 2:
        raise ValueError(f"expected curves of shape [runs, points], got shape {x.shape}")
    x = _runs(x.T, 4)  # [P, N]
    centre = iqm(x)
    w, error, _ = _winsorised(x)
    w = w[error > 0]
    if len(w) == 0:
        return Interval(centre, centre, centre)
    w = w / np.linalg.norm(w, axis=-1, keepdims=True)
    null = rng.standard_normal((draws, x.shape[-1], x.shape[-1])) @ w.T  # [draws, N, P]
    null = np.swapaxes(null, -1, -2)
    t = np.abs(iqm(null)) / _winsorised(null)[1]
    half = np.quantile(t.max(axis=-1), level) * error
    return Interval(centre, centre - half, centre + half)


def bootstrap_interval(
    strata: Sequence[ArrayLike],
    rng: np.random.Generator,
    statistic: Statistic = iqm,
    level: float = 0.95,
    resamples: int = 10_000,
) -> Interval:
    """The stratified percentile bootstrap of a statistic over all runs of all environments.

    Whole runs are drawn with replacement inside their own stratum. Given differences, a pair stays
    a pair: this is the paired bootstrap. It suits the IQM from about ten runs; for a mean it is too
    narrow (near .88 at ten runs), so use `mean_interval` there.

    Args:
        strata: differences, one array [n_e] for each environment.
        rng: draws the resamples.
        statistic: [..., N] -> [...], `iqm` or `mean`.
        level: the coverage asked for, in (0, 1).
        resamples: how many.

    Returns:
        An `Interval` of numbers.
    """
    arrays = _pool(strata, 1)
    drawn = [x[rng.integers(x.size, size=(resamples, x.size))] for x in arrays]
    values = statistic(np.concatenate(drawn, axis=-1))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(statistic(np.concatenate(arrays)), low, high)


def sign_flip_p(
    strata: Sequence[ArrayLike],
    rng: np.random.Generator,
    statistic: Statistic = mean,
    flips: int = 10_000,
) -> float:
    """The two-sided p-value of "no difference": flip the signs of whole runs, each on its own.

    If averaging does nothing, a run's difference was as likely to come out with the other sign. All
    2^N flips are taken where there are no more than `flips`; otherwise that many random ones and
    the observed signs, so that p is never 0.

    Args:
        strata: differences, one array [n_e] for each environment.
        rng: draws the flips.
        statistic: [..., N] -> [...]; the mean, because the IQM of mostly tied runs is 0 always.
        flips: how many.

    References:
        Phipson and Smyth (2010), Permutation p-values should never be zero, Statistical
        Applications in Genetics and Molecular Biology 9(1), 39.

    Example:
        >>> sign_flip_p([[1.0, 2.0, 3.0]], np.random.default_rng(0))  # 2 of the 8 flips
        0.25
    """
    d = np.concatenate(_pool(strata, 1))
    observed = abs(float(statistic(d)))
    exact = 2**d.size <= flips
    if exact:
        bits = np.arange(2**d.size)[:, None] >> np.arange(d.size) & 1
    else:
        bits = rng.integers(2, size=(flips, d.size))
    flipped = np.abs(statistic(d * (2 * bits - 1)))
    as_far = np.count_nonzero(flipped >= observed * (1 - 1e-9))  # sums round differently by order
    return float(as_far / flipped.size if exact else (as_far + 1) / (flips + 1))


def holm(p: ArrayLike) -> Floats:
    """Holm's adjustment of a family of p-values: the smallest times m, the next times m - 1, ...

    Args:
        p: p-values in [0, 1], [m].

    Returns:
        Adjusted p-values in the same order, [m].

    References:
        Holm (1979), A simple sequentially rejective multiple test procedure, Scandinavian Journal
        of Statistics 6, 65-70.

    Example:
        >>> holm([0.01, 0.04, 0.03]).tolist()
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"expected a list of p-values in [0, 1], got {p}")
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)), 1)
    return adjusted


def improvement_probability(d: ArrayLike) -> Floats:
    """P(d > 0) + P(d = 0) / 2 over pairs, [..., N] -> [...]; no change is 1/2.

    Example:
        >>> float(improvement_probability([0.2, 0.1, 0.0, -0.3]))
        0.625
    """
    d = _runs(d, 1)
    return (d > 0).mean(axis=-1) + (d == 0).mean(axis=-1) / 2


def share_interval(share: ArrayLike, runs: int, level: float = 0.95) -> Interval:
    """Wilson's interval of a share of runs, for `improvement_probability` and profiles.

    A share moves in steps of 1 / runs, so its coverage moves in steps as well. Over strata that
    differ, and with half counts for ties, it is wider than it must be.

    Args:
        share: shares in [0, 1], any shape.
        runs: how many runs the share is of, >= 1.
        level: the coverage asked for, in (0, 1).

    References:
        Wilson (1927), Probable inference, the law of succession, and statistical inference,
        Journal of the American Statistical Association 22, 209-212.
    """
    share = np.asarray(share, dtype=np.float64)
    if runs < 1 or not ((share >= 0) & (share <= 1)).all():
        raise ValueError(f"expected shares in [0, 1] of at least 1 run, got {share} of {runs}")
    z2 = stats.norm.ppf((1 + level) / 2) ** 2
    centre = (share + z2 / (2 * runs)) / (1 + z2 / runs)
    half = np.sqrt(z2 / runs * (share * (1 - share) + z2 / (4 * runs))) / (1 + z2 / runs)
    return Interval(share, centre - half, centre + half)


def performance_profile(scores: ArrayLike, thresholds: ArrayLike) -> Floats:
    """The share of runs that score above each threshold.

    Args:
        scores: one number a run, [N].
        thresholds: [T].

    Returns:
        Shares, [T], falling from 1 to 0.

    Example:
        >>> performance_profile([0.1, 0.5, 0.9, 0.9], [0.0, 0.5, 0.8]).tolist()
        [1.0, 0.5, 0.5]
    """
    (x,) = _pool([scores], 1)
    return (x > np.asarray(thresholds, dtype=np.float64)[:, None]).mean(axis=-1)


def cvar(x: ArrayLike, alpha: float = 0.1) -> Floats:
    """The mean of the worst share alpha (conditional value at risk), [..., N] -> [...].

    Where alpha N is not whole, the last one counts in part; alpha = 1 is the mean, and an alpha
    under 1/N the minimum.

    References:
        Chan et al. (2020), Measuring the reliability of reinforcement learning algorithms, ICLR,
        https://arxiv.org/abs/1912.05663

    Example:
        >>> float(cvar([5.0, 1.0, 2.0, 9.0], alpha=0.5))
        1.5
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], got {alpha}")
    x = np.sort(_runs(x, 1), axis=-1)
    worst = max(alpha * x.shape[-1], 1.0)
    weight = np.clip(worst - np.arange(x.shape[-1]), 0, 1) / worst
    return x @ weight


def max_drawdown(curves: ArrayLike) -> Floats:
    """The largest fall of a learning curve from its best so far, [..., P] -> [...], >= 0.

    Example:
        >>> float(max_drawdown([1.0, 5.0, 2.0, 4.0, 6.0, 5.0]))
        3.0
    """
    x = _runs(curves, 1)
    return (np.maximum.accumulate(x, axis=-1) - x).max(axis=-1)


def late_sd(curves: ArrayLike, fraction: float = 0.2) -> Floats:
    """The standard deviation (n - 1) inside each run over its late points, [..., P] -> [...].

    Args:
        curves: evaluations in order, [..., P].
        fraction: how much of the curve is late, in (0, 1]; at least two points are taken.
    """
    x = _runs(curves, 2)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    late = max(2, math.ceil(round(fraction * x.shape[-1], 9)))
    return x[..., -late:].std(axis=-1, ddof=1)
