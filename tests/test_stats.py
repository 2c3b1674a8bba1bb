import doctest
import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from scripts.experiment import stats


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def test_the_examples_in_the_docstrings_hold():
    failed, tried = doctest.testmod(stats)
    assert failed == 0
    assert tried >= 8


# --- against scipy and slow oracles ------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 4, 7, 10, 20])
def test_iqm_is_scipys_quarter_trimmed_mean(rng, n):
    x = rng.standard_normal((5, n))
    np.testing.assert_allclose(stats.iqm(x), scipy_stats.trim_mean(x, 0.25, axis=-1))


def test_mean_interval_of_one_stratum_is_the_paired_t_interval(rng):
    a, b = rng.gamma(2, size=(2, 9))
    ours = stats.mean_interval(a - b, level=0.9)
    theirs = scipy_stats.ttest_rel(a, b).confidence_interval(0.9)
    np.testing.assert_allclose(ours, [(a - b).mean(), theirs.low, theirs.high])


def test_mean_interval_of_several_strata_weighs_runs_and_ignores_the_spread_between(rng):
    x, y = rng.standard_normal(12), 3 * rng.standard_normal(6)
    centre, low, high = stats.mean_interval(x, y + 100)
    assert centre == pytest.approx(np.concatenate([x, y + 100]).mean())
    vx, vy = 12 * np.var(x, ddof=1) / 18**2, 6 * np.var(y, ddof=1) / 18**2
    df = (vx + vy) ** 2 / (vx**2 / 11 + vy**2 / 5)
    half = scipy_stats.t.ppf(0.975, df) * np.sqrt(vx + vy)
    assert (low, high) == pytest.approx((centre - half, centre + half))


def test_iqm_interval_inverts_yuens_test(rng):
    """Where the interval ends, scipy's trimmed t-test against a (nearly) exact number has p=.05."""
    x = rng.gamma(3, size=13)
    n, cut = 13, 3
    order = np.sort(x)
    winsorised = np.concatenate([[order[3]] * 3, order[3:10], [order[9]] * 3])
    error = np.sqrt((n - 1) * winsorised.var(ddof=1) / (7 * 6))
    centre, low, high = stats.iqm_interval(x)
    assert centre == pytest.approx(order[cut : n - cut].mean())
    assert high - low == pytest.approx(2 * scipy_stats.t.ppf(0.975, 6) * error)
    exact = low + 1e-9 * rng.standard_normal(4000)
    test = scipy_stats.ttest_ind(x, exact, equal_var=False, trim=0.25)
    assert test.pvalue == pytest.approx(0.05, abs=1e-6)


def test_bootstrap_interval_of_one_stratum_is_scipys_percentile_bootstrap(rng):
    x = rng.gamma(2, size=15)
    ours = stats.bootstrap_interval([x], rng, stats.iqm, resamples=20_000)
    theirs = scipy_stats.bootstrap(
        (x,), stats.iqm, method="percentile", n_resamples=20_000, rng=rng
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)


def test_bootstrap_interval_enumerated_by_hand(rng):
    """Two strata of two runs: 4 x 4 equally likely resamples; a run never leaves its stratum."""
    x, y = [0.0, 1.0], [10.0, 20.0]
    means = [
        np.mean([*a, *b])
        for a in itertools.product(x, repeat=2)
        for b in itertools.product(y, repeat=2)
    ]
    ours = stats.bootstrap_interval([x, y], rng, stats.mean, level=0.8, resamples=40_000)
    assert ours.estimate == pytest.approx(7.75)
    assert ours.low == pytest.approx(np.quantile(means, 0.1))
    assert ours.high == pytest.approx(np.quantile(means, 0.9))
    assert stats.bootstrap_interval([[1.0, 1.0], [5.0] * 2], rng) == (3.0, 3.0, 3.0)


@pytest.mark.parametrize("statistic", [stats.mean, stats.iqm])
def test_sign_flip_p_is_scipys_exact_permutation_test(rng, statistic):
    d = rng.standard_normal(9) + 0.5
    theirs = scipy_stats.permutation_test(
        (d,),
        lambda x, axis: statistic(x),
        permutation_type="samples",
        n_resamples=np.inf,
        vectorized=True,
    )
    assert stats.sign_flip_p([d[:4], d[4:]], rng, statistic) == pytest.approx(theirs.pvalue)


def test_sign_flip_p_by_random_flips_agrees_with_all_flips_and_is_never_zero(rng):
    d = rng.standard_normal(12) + 0.4
    every = stats.sign_flip_p([d], rng, flips=5000)
    some = stats.sign_flip_p([d], rng, flips=4000)
    assert some == pytest.approx(every, abs=0.03)
    assert stats.sign_flip_p([np.ones(40)], rng, flips=999) == 1 / 1000
    assert stats.sign_flip_p([np.zeros(40)], rng) == 1.0


def test_sign_flip_p_of_no_effect_is_below_a_twentieth_a_twentieth_of_the_time(rng):
    p = [stats.sign_flip_p([d], rng, flips=1024) for d in rng.standard_normal((2000, 10))]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.015)


def slow_holm(p):
    adjusted = []
    for this in p:
        smaller = [q for q in p if q <= this]
        steps = [(len(p) - sum(r < q for r in p)) * q for q in smaller]
        adjusted.append(min(1.0, max(steps)))
    return adjusted


def test_holm_is_its_definition_written_slowly(rng):
    for _ in range(20):
        p = rng.random(6) ** 3
        np.testing.assert_allclose(stats.holm(p), slow_holm(list(p)))


def test_share_interval_is_scipys_wilson_interval():
    for wins, runs in [(0, 10), (7, 10), (20, 20), (31, 60)]:
        theirs = scipy_stats.binomtest(wins, runs).proportion_ci(0.95, method="wilson")
        np.testing.assert_allclose(
            stats.share_interval(wins / runs, runs)[1:], (theirs.low, theirs.high), atol=1e-12
        )


def test_performance_profile_counts_runs_one_by_one(rng):
    x, thresholds = rng.random(11), np.linspace(-0.1, 1.1, 7)
    slow = [sum(score > t for score in x) / 11 for t in thresholds]
    np.testing.assert_allclose(stats.performance_profile(x, thresholds), slow)


def test_cvar_takes_the_worst_part_and_both_ends_are_mean_and_minimum(rng):
    x = rng.permutation(np.arange(20.0))
    assert stats.cvar(x, 0.1) == pytest.approx(0.5)
    assert stats.cvar(x, 0.125) == pytest.approx((0 + 1 + 0.5 * 2) / 2.5)
    assert stats.cvar(x, 1.0) == pytest.approx(x.mean())
    assert stats.cvar(x, 0.01) == 0.0
    np.testing.assert_allclose(stats.cvar(np.stack([x, x + 3])), [0.5, 3.5])


def test_max_drawdown_is_the_worst_pair_in_order(rng):
    x = rng.standard_normal((3, 12))
    slow = [max(row[i] - row[j] for i in range(12) for j in range(i, 12)) for row in x]
    np.testing.assert_allclose(stats.max_drawdown(x), slow)
    assert stats.max_drawdown(np.arange(5.0)) == 0


def test_late_sd_reads_the_last_fifth_of_the_points(rng):
    x = rng.standard_normal((3, 20))
    np.testing.assert_allclose(stats.late_sd(x), x[:, 16:].std(axis=1, ddof=1))
    np.testing.assert_allclose(stats.late_sd(x[:, :3]), x[:, 1:3].std(axis=1, ddof=1))


def test_simultaneous_band_of_one_point_is_close_to_the_iqm_interval(rng):
    """Not equal: its quantile is the exact one for Gaussian runs, 8 % above t's at twelve runs."""
    x = rng.standard_normal((12, 1))
    band = stats.simultaneous_band(x, rng, draws=20_000)
    pointwise = stats.iqm_interval(x[:, 0])
    assert band.estimate[0] == pointwise.estimate
    assert band.high[0] - band.low[0] == pytest.approx(
        1.08 * (pointwise.high - pointwise.low), rel=0.03
    )


def test_simultaneous_band_widens_with_independent_points_and_not_with_copies(rng):
    x = rng.standard_normal((20, 20))
    independent = stats.simultaneous_band(x, rng)
    copies = stats.simultaneous_band(np.repeat(x[:, :1], 20, axis=1), rng)
    widths = [(b.high - b.low)[0] for b in (independent, copies)]
    pointwise = stats.iqm_interval(x[:, 0])
    assert widths[1] == pytest.approx(pointwise.high - pointwise.low, rel=0.07)
    assert widths[0] > 1.6 * widths[1]


def test_simultaneous_band_has_no_width_where_the_runs_agree(rng):
    x = np.hstack([np.full((8, 2), 500.0), rng.standard_normal((8, 1))])
    band = stats.simultaneous_band(x, rng)
    assert (band.low[:2] == 500).all()
    assert (band.high[:2] == 500).all()
    assert band.low[2] < band.high[2]
    assert (stats.simultaneous_band(x[:, :2], rng).high == 500).all()


# --- worked numbers ----------------------------------------------------------------------------


def test_ties_are_counted_exactly():
    assert stats.tie_share([0.0, 1e-300, -0.0, 0.2], value=0.0) == 0.5
    assert stats.tie_share([500.0, 500.0, 500.0, 310.0]) == 0.75


def test_an_interval_is_inside_the_margin_only_as_a_whole():
    assert stats.Interval(0.0, -0.019, 0.019).inside(0.02)
    assert not stats.Interval(0.0, -0.019, 0.021).inside(0.02)
    assert not stats.Interval(0.0, np.nan, np.nan).inside(0.02)


def test_the_same_generator_gives_the_same_numbers(rng):
    d = [rng.standard_normal(12), rng.standard_normal(20)]
    for function in (stats.bootstrap_interval, stats.sign_flip_p):
        first, second = (function(d, np.random.default_rng(3)) for _ in range(2))
        assert first == second


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda g: stats.iqm([]), r"at least 1 runs .* got shape \(0,\)"),
        (lambda g: stats.iqm(1.0), r"at least 1 runs .* got shape \(\)"),
        (lambda g: stats.iqm([1.0, np.nan]), "expected finite scores, got 1 others"),
        (lambda g: stats.mean_interval([1.0]), r"at least 2 runs .* got shape \(1,\)"),
        (lambda g: stats.mean_interval(), "at least one stratum, got none"),
        (lambda g: stats.iqm_interval([1.0, 2, 3]), "at least 4 runs"),
        (lambda g: stats.simultaneous_band([1.0] * 5, g), r"\[runs, points\], got shape \(5,\)"),
        (lambda g: stats.bootstrap_interval([], g), "at least one stratum, got none"),
        (lambda g: stats.sign_flip_p([[[1.0]]], g), r"one number a run .* got shape \(1, 1\)"),
        (lambda g: stats.holm([0.5, 1.2]), r"p-values in \[0, 1\], got"),
        (lambda g: stats.share_interval(1.5, 10), r"shares in \[0, 1\]"),
        (lambda g: stats.cvar([1.0], 0.0), r"alpha must be in \(0, 1\], got 0.0"),
        (lambda g: stats.late_sd([1.0, 2.0], 1.5), r"fraction must be in \(0, 1\], got 1.5"),
    ],
)
def test_a_wrong_argument_is_named(rng, call, text):
    with pytest.raises(ValueError, match=text):
        call(rng)


# --- coverage: how often the printed intervals hold the truth ------------------------------------

POPULATIONS = {  # skewness 0, 1 and -1
    "normal": scipy_stats.norm.ppf,
    "right": scipy_stats.gamma(4).ppf,
    "left": lambda u: -scipy_stats.gamma(4).ppf(1 - u),
}
GRID = (np.arange(100_000) + 0.5) / 100_000
MIDDLE = (GRID > 0.25) & (GRID < 0.75)
MEAN = {name: ppf(GRID).mean() for name, ppf in POPULATIONS.items()}
IQM = {name: ppf(GRID[MIDDLE]).mean() for name, ppf in POPULATIONS.items()}


def covers(interval, truth):
    return np.mean((np.asarray(interval.low) <= truth) & (truth <= np.asarray(interval.high)))


@pytest.mark.parametrize("n", [10, 20])
@pytest.mark.parametrize("population", ["normal", "right", "left"])
def test_one_environments_intervals_cover_92_to_97_percent(population, n):
    x = POPULATIONS[population](np.random.default_rng(n).random((20_000, n)))
    assert 0.92 <= covers(stats.mean_interval(x), MEAN[population]) <= 0.97
    assert 0.92 <= covers(stats.iqm_interval(x), IQM[population]) <= 0.97


@pytest.mark.parametrize("n", [10, 20])
@pytest.mark.parametrize("population", ["normal", "right", "left"])
def test_the_aggregates_intervals_over_three_environments_cover_92_to_97_percent(population, n):
    rng = np.random.default_rng(n)
    x = POPULATIONS[population](rng.random((1500, 3, n)))
    boot = [stats.bootstrap_interval(list(runs), rng, resamples=500) for runs in x]
    assert 0.92 <= np.mean([covers(interval, IQM[population]) for interval in boot]) <= 0.97
    assert 0.92 <= covers(stats.mean_interval(*np.moveaxis(x, 1, 0)), MEAN[population]) <= 0.97


@pytest.mark.parametrize("n", [10, 20])
def test_the_improvement_probability_over_three_environments_covers_92_to_97_percent(n):
    p = np.array([0.5, 0.6, 0.75])
    wins = np.random.default_rng(n).binomial(n, p, size=(20_000, 3)).sum(axis=1)
    assert 0.92 <= covers(stats.share_interval(wins / (3 * n), 3 * n), p.mean()) <= 0.97


@pytest.mark.parametrize("n", [10, 20])
@pytest.mark.parametrize("population", ["normal", "right"])
def test_a_learning_curves_band_covers_all_twenty_points_92_to_97_percent_of_the_time(
    population, n
):
    rng = np.random.default_rng(n)
    lag = np.abs(np.subtract.outer(np.arange(20), np.arange(20)))
    root = np.linalg.cholesky(0.95**lag)
    uniform = scipy_stats.norm.cdf(rng.standard_normal((500, n, 20)) @ root.T)
    curves, truth = POPULATIONS[population](uniform), IQM[population]
    held = []
    for x in curves:
        band = stats.simultaneous_band(x, rng, draws=200)
        held.append(((band.low <= truth) & (truth <= band.high)).all())
    assert 0.92 <= np.mean(held) <= 0.97


def test_beyond_a_skewness_of_one_the_paired_t_falls_to_about_ninety_percent():
    x = np.random.default_rng(0).exponential(size=(20_000, 10))
    assert covers(stats.mean_interval(x), 1.0) == pytest.approx(0.90, abs=0.01)


def test_where_ties_pass_a_quarter_the_iqm_interval_does_not_cover():
    """A ceiling: 60 % of the differences are exactly 0, the others are gains of about 1."""
    rng = np.random.default_rng(0)
    x = np.where(rng.random((20_000, 10)) < 0.6, 0.0, rng.gamma(4, 0.25, (20_000, 10)))
    tied = np.sort(x, axis=None)[50_000:150_000].mean()
    assert covers(stats.iqm_interval(x), tied) < 0.85
