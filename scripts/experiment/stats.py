"""Statistics for paired runs: what a reviewer asks of "does the average beat the last iterate?".

Averaging never touches training, so the last and the averaged policy of one run form a pair and
everything below takes the **differences** of such pairs, one number a run. A stratum is one
environment under one setting: sign flips never move a run out of its own, and strata weigh what
they are given, not what they have in runs. Leading axes, where a docstring shows them as `...`, are
independent problems.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats  # type: ignore[import-untyped]

Floats = NDArray[np.float64]

LEVEL = 0.95  # of every interval


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


def _weighed(strata: Sequence[ArrayLike], weights: Sequence[float] | None) -> Sequence[float]:
    """One weight a stratum: those given, or equal ones."""
    if not strata:
        raise ValueError("expected at least one stratum, got none")
    if weights is None:
        return [1 / len(strata)] * len(strata)
    if len(weights) != len(strata):
        raise ValueError(f"expected {len(strata)} weights, one a stratum, got {len(weights)}")
    return weights


def _welch(
    strata: Sequence[ArrayLike], weights: Sequence[float] | None
) -> tuple[Floats, Floats, Floats]:
    """The weighted sum of means, its standard error, and Satterthwaite's degrees of freedom."""
    arrays = [_runs(x, 2) for x in strata]
    w = np.array(_weighed(strata, weights))
    n = np.array([x.shape[-1] for x in arrays])
    centre = np.tensordot(w, [x.mean(axis=-1) for x in arrays], 1)
    spread = np.array([x.var(axis=-1, ddof=1) for x in arrays])  # [strata, ...]
    variance = np.tensordot(w**2 / n, spread, 1)
    squares = np.tensordot(w**4 / (n**2 * (n - 1)), spread**2, 1)
    # With no spread at all the interval is the point, whatever df.
    df = np.where(variance > 0, variance**2 / np.where(squares > 0, squares, 1), 1)
    return centre, np.sqrt(variance), df


def mean_interval(*strata: ArrayLike, weights: Sequence[float] | None = None) -> Interval:
    """The 95 % t interval of a weighted sum of the strata's means; of one stratum, the paired t.

        sum_e w_e m_e  +-  t_df sqrt(sum_e w_e^2 s_e^2 / n_e)

    m, s, n are a stratum's mean, standard deviation (n - 1) and runs; spread between strata is not
    noise. df is Satterthwaite's.

    Args:
        strata: differences, one array [..., n_e] with n_e >= 2 for each.
        weights: w_e; equal ones that sum to 1 by default, others for a contrast.

    Returns:
        An `Interval` of arrays [...].

    References:
        Satterthwaite (1946), An approximate distribution of estimates of variance components,
        Biometrics Bulletin 2, 110-114.

    Example:
        >>> [round(float(v), 3) for v in mean_interval([1.0, 2.0, 3.0])]
        [2.0, -0.484, 4.484]
    """
    centre, error, df = _welch(strata, weights)
    half = stats.t.ppf((1 + LEVEL) / 2, df) * error
    return Interval(centre, centre - half, centre + half)


def t_p(*strata: ArrayLike, weights: Sequence[float] | None = None) -> float:
    """The two-sided p-value whose interval is `mean_interval`'s; arguments as there, n_e alone.

    Example:
        >>> round(t_p([1.0, 2.0, 3.0]), 4)
        0.0742
    """
    centre, error, df = _welch(strata, weights)
    if error == 0:
        return float(centre == 0)
    return float(2 * stats.t.sf(abs(centre) / error, df))


def sign_flip_p(
    *strata: ArrayLike, weights: Sequence[float] | None = None, flips: int = 100_000, seed: int = 0
) -> float:
    """The two-sided p-value of "no difference": flip the signs of whole runs, each on its own.

    If averaging does nothing, a run's difference was as likely to come out with the other sign. The
    statistic is the weighted sum of the strata's means. All flips of the untied runs are taken
    where there are no more than `flips`; otherwise that many random ones, and p is
    (1 + hits) / (1 + flips), never 0.

    Args:
        strata: differences, one array [n_e] for each.
        weights: of the strata; equal ones by default.
        flips: how many.
        seed: of numpy's generator.

    References:
        Phipson and Smyth (2010), Permutation p-values should never be zero, Statistical
        Applications in Genetics and Molecular Biology 9(1), 39.

    Example:
        >>> sign_flip_p([1.0, 2.0, 3.0])  # 2 of the 8 flips
        0.25
    """
    parts = [
        w * _runs(x, 1) / np.size(x) for w, x in zip(_weighed(strata, weights), strata, strict=True)
    ]
    if any(part.ndim != 1 for part in parts):
        raise ValueError(f"expected one number a run, got shapes {[p.shape for p in parts]}")
    d = np.concatenate(parts)
    d = d[d != 0]
    least = abs(d.sum()) * (1 - 1e-9)  # sums round differently by order
    if 2**d.size <= flips:
        bits = np.arange(2**d.size)[:, None] >> np.arange(d.size) & 1
        return float(np.mean(np.abs((2 * bits - 1) @ d) >= least))
    rng = np.random.default_rng(seed)
    hits = 0
    for drawn in batches(flips, d.size):
        bits = rng.integers(2, size=(drawn, d.size))
        hits += int(np.count_nonzero(np.abs((2 * bits - 1) @ d) >= least))
    return (1 + hits) / (1 + flips)


def batches(draws: int, size: int) -> list[int]:
    """Draws of `size` numbers each, in as many parts as memory asks for: some 80 MB at a time.

    Example:
        >>> batches(7, 4_000_000)
        [2, 2, 2, 1]
    """
    most = max(1, 10_000_000 // size)
    return [min(most, draws - done) for done in range(0, draws, most)]


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


def simultaneous_band(curves: ArrayLike, draws: int = 2_000, seed: int = 0) -> Interval:
    """A 95 % band for the mean of curves that holds at all points at once.

        mean_t  +-  q error_t,   q: the quantile of max_t |T_t|

    T_t is the t statistic of N Gaussian curves that are correlated between points as the runs are.
    The error is estimated at each point anew, and at ten runs that matters.

    Args:
        curves: one curve a run, [N, P] with N >= 2.
        draws: how many sets of N Gaussian curves.
        seed: of numpy's generator.

    Returns:
        An `Interval` of arrays [P]; no width where all runs agree.

    References:
        Montiel Olea and Plagborg-Moller (2019), Simultaneous confidence bands, Journal of Applied
        Econometrics 34, 1-17 (the sup-t band).
    """
    x = np.asarray(curves, dtype=np.float64)
    if x.ndim != 2:
        raise ValueError(f"expected curves of shape [runs, points], got shape {x.shape}")
    x = _runs(x.T, 2)  # [P, N]
    n = x.shape[-1]
    centre, error = x.mean(axis=-1), x.std(axis=-1, ddof=1) / np.sqrt(n)
    w = (x - centre[:, None])[error > 0]
    if len(w) == 0:
        return Interval(centre, centre, centre)
    w /= np.linalg.norm(w, axis=-1, keepdims=True)
    # As many Gaussians as points have the law of N of them, and cost N in place of N^2.
    root = np.linalg.qr(w.T, mode="r") if n > 5 * len(w) else w.T
    rng, largest = np.random.default_rng(seed), []
    for drawn in batches(draws, n * len(root)):
        null = rng.standard_normal((drawn, n, len(root))) @ root  # [drawn, N, P]
        t = np.abs(null.mean(axis=1)) / (null.std(axis=1, ddof=1) / np.sqrt(n))
        largest.append(t.max(axis=-1))
    half = np.quantile(np.concatenate(largest), LEVEL) * error
    return Interval(centre, centre - half, centre + half)
