import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from scripts.experiment import stats
from scripts.experiment.analysis import Effect, adjust


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# --- against scipy and slow oracles ------------------------------------------------------------


def test_mean_interval_of_one_stratum_is_the_paired_t_interval(rng):
    a, b = rng.gamma(2, size=(2, 9))
    theirs = scipy_stats.ttest_rel(a, b)
    ends = theirs.confidence_interval(0.95)
    np.testing.assert_allclose(stats.mean_interval(a - b), [(a - b).mean(), ends.low, ends.high])
    assert stats.t_p(a - b) == pytest.approx(theirs.pvalue)


def test_the_difference_of_two_strata_is_welchs_test(rng):
    x, y = rng.standard_normal(12) + 0.5, 3 * rng.standard_normal(6)
    theirs = scipy_stats.ttest_ind(x, y, equal_var=False)
    ends = theirs.confidence_interval(0.95)
    ours = stats.mean_interval(x, y, weights=(1, -1))
    np.testing.assert_allclose(ours, [x.mean() - y.mean(), ends.low, ends.high])
    assert stats.t_p(x, y, weights=(1, -1)) == pytest.approx(theirs.pvalue)


def test_strata_weigh_the_same_whatever_their_runs_and_the_spread_between_is_no_noise(rng):
    x, y = rng.standard_normal(20), rng.standard_normal(5)
    near, far = stats.mean_interval(x, y), stats.mean_interval(x, y + 100)
    assert near.estimate == pytest.approx((x.mean() + y.mean()) / 2)
    assert far.high - far.low == pytest.approx(near.high - near.low)


def test_sign_flip_p_is_scipys_exact_permutation_test(rng):
    d = rng.standard_normal(9) + 0.5
    theirs = scipy_stats.permutation_test(
        (d,),
        lambda x, axis: x.mean(axis),
        permutation_type="samples",
        n_resamples=np.inf,
        vectorized=True,
    )
    assert stats.sign_flip_p(d) == pytest.approx(theirs.pvalue)
    assert stats.sign_flip_p([*d, 0.0, 0.0, 0.0]) == stats.sign_flip_p(d)


def test_sign_flip_p_of_strata_flips_runs_of_means_that_weigh_as_given():
    x, y = np.array([1.0, 2.0]), np.array([3.0, -1.0, 2.0])
    statistic = [
        abs((np.array(s) * x).mean() / 2 - (np.array(t) * y).mean() * 2)
        for s in itertools.product((-1, 1), repeat=2)
        for t in itertools.product((-1, 1), repeat=3)
    ]
    observed = abs(x.mean() / 2 - y.mean() * 2)
    expected = np.mean(np.array(statistic) >= observed - 1e-12)
    assert stats.sign_flip_p(x, y, weights=(0.5, -2)) == pytest.approx(expected)


def test_sign_flip_p_by_random_flips_agrees_with_all_flips_and_is_never_zero(rng):
    d = rng.standard_normal(12) + 0.4
    some = stats.sign_flip_p(d, flips=4000)
    assert some == pytest.approx(stats.sign_flip_p(d), abs=0.03)
    assert some == stats.sign_flip_p(d, flips=4000)
    assert stats.sign_flip_p(np.ones(40), flips=999) == 1 / 1000
    assert stats.sign_flip_p(np.zeros(40)) == 1.0


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


def test_simultaneous_band_of_one_point_is_the_t_interval(rng):
    x = rng.standard_normal((12, 1))
    band = stats.simultaneous_band(x, draws=20_000)
    pointwise = stats.mean_interval(x[:, 0])
    assert band.estimate[0] == pytest.approx(pointwise.estimate)
    width = pointwise.high - pointwise.low
    assert band.high[0] - band.low[0] == pytest.approx(width, rel=0.03)


def test_simultaneous_band_widens_with_independent_points_and_not_with_copies(rng):
    x = rng.standard_normal((20, 20))
    independent = stats.simultaneous_band(x)
    copies = stats.simultaneous_band(np.repeat(x[:, :1], 20, axis=1))
    pointwise = stats.mean_interval(x[:, 0])
    widths = [(b.high - b.low)[0] / (pointwise.high - pointwise.low) for b in (independent, copies)]
    assert widths[1] == pytest.approx(1, rel=0.05)
    assert widths[0] > 1.5


def test_simultaneous_band_has_no_width_where_the_runs_agree(rng):
    x = np.hstack([np.full((8, 2), 500.0), rng.standard_normal((8, 1))])
    band = stats.simultaneous_band(x)
    assert (band.low[:2] == 500).all()
    assert (band.high[:2] == 500).all()
    assert band.low[2] < band.high[2]
    assert (stats.simultaneous_band(x[:, :2]).high == 500).all()


# --- worked numbers ----------------------------------------------------------------------------


def test_an_interval_is_inside_the_margin_only_as_a_whole():
    assert stats.Interval(0.0, -0.019, 0.019).inside(0.02)
    assert not stats.Interval(0.0, -0.019, 0.021).inside(0.02)
    assert not stats.Interval(0.0, np.nan, np.nan).inside(0.02)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: stats.sign_flip_p([]), r"at least 1 runs .* got shape \(0,\)"),
        (lambda: stats.sign_flip_p(1.0), r"at least 1 runs .* got shape \(\)"),
        (lambda: stats.sign_flip_p([1.0, np.nan]), "expected finite scores, got 1 others"),
        (lambda: stats.mean_interval([1.0]), r"at least 2 runs .* got shape \(1,\)"),
        (lambda: stats.mean_interval(), "at least one stratum, got none"),
        (lambda: stats.mean_interval([1.0, 2.0], weights=(1, 2)), "expected 1 weights, .* got 2"),
        (lambda: stats.simultaneous_band([1.0] * 5), r"\[runs, points\], got shape \(5,\)"),
        (lambda: stats.sign_flip_p(), "at least one stratum, got none"),
        (lambda: stats.sign_flip_p([[1.0]]), r"one number a run, got shapes \[\(1, 1\)\]"),
        (lambda: stats.holm([0.5, 1.2]), r"p-values in \[0, 1\], got"),
    ],
)
def test_a_wrong_argument_is_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()


# --- coverage: how often the printed intervals hold the truth ------------------------------------

POPULATIONS = {  # skewness 0, 1 and -1
    "normal": scipy_stats.norm.ppf,
    "right": scipy_stats.gamma(4).ppf,
    "left": lambda u: -scipy_stats.gamma(4).ppf(1 - u),
}
GRID = (np.arange(100_000) + 0.5) / 100_000
MEAN = {name: ppf(GRID).mean() for name, ppf in POPULATIONS.items()}


def covers(interval, truth):
    return np.mean((np.asarray(interval.low) <= truth) & (truth <= np.asarray(interval.high)))


@pytest.mark.parametrize("n", [10, 20])
@pytest.mark.parametrize("population", POPULATIONS)
def test_the_intervals_of_one_cell_and_of_three_cover_92_to_97_percent(population, n):
    x = POPULATIONS[population](np.random.default_rng(n).random((3, 8_000, n)))
    assert 0.92 <= covers(stats.mean_interval(x[0]), MEAN[population]) <= 0.97
    unequal = x * np.array([1, 3, 0.3])[:, None, None]
    truth = MEAN[population] * 4.3 / 3
    assert 0.92 <= covers(stats.mean_interval(*unequal), truth) <= 0.97


@pytest.mark.parametrize(
    ("population", "n", "share"),
    [("normal", 10, 0.95), ("normal", 20, 0.95), ("right", 10, 0.89), ("right", 20, 0.91)],
)
def test_a_learning_curves_band_covers_all_twenty_points_where_runs_are_not_skewed(
    population, n, share
):
    rng = np.random.default_rng(n)
    lag = np.abs(np.subtract.outer(np.arange(20), np.arange(20)))
    root = np.linalg.cholesky(0.95**lag)
    uniform = scipy_stats.norm.cdf(rng.standard_normal((300, n, 20)) @ root.T)
    curves, truth = POPULATIONS[population](uniform), MEAN[population]
    held = []
    for i, x in enumerate(curves):
        band = stats.simultaneous_band(x, draws=200, seed=i)
        held.append(((band.low <= truth) & (truth <= band.high)).all())
    assert np.mean(held) == pytest.approx(share, abs=0.035)


def test_beyond_a_skewness_of_one_the_paired_t_falls_to_about_ninety_percent():
    x = np.random.default_rng(0).exponential(size=(20_000, 10))
    assert covers(stats.mean_interval(x), 1.0) == pytest.approx(0.90, abs=0.01)


# --- under the null --------------------------------------------------------------------------


def test_the_primary_test_rejects_about_a_twentieth_of_the_time_where_signs_are_chance(rng):
    """Cells of unlike size, spread, skewness and ties; each run's sign is a coin's."""
    size = np.concatenate([
        rng.exponential(0.3, (1000, 20)) * (rng.random((1000, 20)) < 0.6),
        rng.gamma(2, 0.05, (1000, 19)),
        np.abs(rng.standard_t(3, (1000, 20))),
    ], axis=1)  # fmt: skip
    d = size * rng.choice((-1, 1), size.shape)
    p = [stats.sign_flip_p(x[:20], x[20:39], x[39:], flips=400) for x in d]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.02)


def test_the_family_rejects_anything_at_most_a_twentieth_of_the_time_where_nothing_is_true(rng):
    wrong = 0
    for _ in range(250):
        family = [Effect((rng.standard_normal(10),)) for _ in range(6)]
        family += [Effect((rng.standard_normal(12) * (rng.random(12) < 0.4),)) for _ in range(2)]
        wrong += any(p <= 0.05 for p in adjust(family))
    assert 0.01 <= wrong / 250 <= 0.08


def test_a_test_that_ties_keep_from_rejecting_is_left_out_and_costs_the_others_nothing(rng):
    clear = Effect((np.arange(1.0, 13),))  # p = 2 / 2^12
    tied = Effect((np.array([0.1] * 5 + [0.0] * 15),))  # p at least 2 / 2^5 > .05 / 2
    p = adjust([clear, tied])
    assert p[0] == clear.p == 2 / 2**12
    assert np.isnan(p[1])
    assert adjust([clear, clear])[0] == 2 * clear.p
    few = Effect((np.ones(4),))
    assert adjust([clear, few])[0] == clear.p  # with too few runs there is no test


def test_a_test_that_is_planned_and_not_computed_counts(rng):
    clear = Effect((np.arange(1.0, 13),))
    p = adjust([clear, None, None])
    assert p[0] == pytest.approx(3 * clear.p)
    assert np.isnan(p[1])
