import math
from dataclasses import fields
from fractions import Fraction

import pytest

from polyak_rl import (
    Between,
    Ema,
    Polynomial,
    Power,
    Tail,
    Uniform,
    Warmup,
    Window,
    parse_rule,
)
from polyak_rl.rules import RULES, describe_rule, rule_from

MOVING = [
    Ema(tau=0.03),
    Ema(half_life=7.0),
    Ema(tau=0.03, debias=True),
    Ema(tau=1.0),
    Uniform(),
    Uniform(start=23),
    Polynomial(gamma=3),
    Polynomial(gamma=1.5),
    Power(gamma=2.0),
    Power(sigma_rel=0.1),
    Warmup(tau=0.2),
    Warmup(tau=0.0, power=1),
    Warmup(tau=0.02, inv_gamma=9, power=1, ahead=1),
    Warmup(tau=0.01, inv_gamma=1, power=1, ahead=5),
]
EVERY_RULE = [
    *MOVING,
    Tail(0.3),
    Tail(1.0),
    Between(0.2, 0.55),
    Between(0, 1),
    Window(3, 5),
    Window(2, 1),
    Window(4, 30),
]


@pytest.mark.parametrize("rule", MOVING, ids=str)
@pytest.mark.parametrize("every", [1, 7])
def test_the_recursion_of_the_gains_gives_the_stated_weights(rule, every):
    weights = []
    for k in range(1, 41):
        gain = rule.gain(k, every)
        weights = [w * (1 - gain) for w in weights] + [gain]
        tolerance = 1e-7 if rule == Polynomial(gamma=1.5) else 1e-13
        assert rule.weights(k, every) == pytest.approx(weights, abs=tolerance)


@pytest.mark.parametrize("rule", EVERY_RULE, ids=str)
@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize("k", [1, 2, 13, 101])
def test_shares_are_the_running_sums_of_weights_that_sum_to_one(rule, every, k):
    weights = rule.weights(k, every)
    assert math.fsum(weights) == pytest.approx(1, abs=1e-7)
    for j in range(k + 1):
        assert rule.share(j, k, every) == pytest.approx(math.fsum(weights[:j]), abs=1e-7)


@pytest.mark.parametrize("rule", EVERY_RULE, ids=str)
def test_weights_never_fall_but_after_the_stated_iterates(rule):
    for k in (1, 2, 30, 97):
        weights = rule.weights(k)
        falls = [j for j in range(1, k) if weights[j] < weights[j - 1] * (1 - 1e-12)]
        assert set(falls) <= set(rule.falls(k))


def test_the_rows_of_the_table_have_their_stated_gains():
    tau, every, k = 0.01, 7, 11
    n = k * every
    assert Ema(tau=tau).gain(k, every) == pytest.approx(1 - (1 - tau) ** every)
    assert Ema(half_life=50).gain(k, every) == pytest.approx(1 - 2 ** (-every / 50))
    assert Ema(tau=tau, debias=True).gain(k) == pytest.approx(tau / (1 - (1 - tau) ** k))
    assert Uniform().gain(k, every) == pytest.approx(1 / k)
    assert Polynomial(3).gain(k, every) == pytest.approx(4 / (k + 3))
    assert Power(gamma=2).gain(k, every) == pytest.approx(1 - (1 - every / n) ** 3)
    assert Warmup(tau, inv_gamma=3, power=0.5).gain(k) == pytest.approx((1 + 10 / 3) ** -0.5)


def test_polynomial_decay_has_the_published_weights():
    published = [0.001399, 0.005594, 0.013986, 0.027972, 0.048951]
    published += [0.078322, 0.117483, 0.167832, 0.230769, 0.307692]
    assert Polynomial(gamma=3).weights(10) == pytest.approx(published, abs=5e-7)


def test_warmup_is_the_schedule_of_two_libraries():
    """torch_ema: decay min(beta, (1 + n) / (10 + n)); ema-pytorch: clamped 1 - (1 + e / g)^-p."""
    theirs = [1 - min(0.9, (1 + n) / (10 + n)) for n in range(1, 200)]
    rule = Warmup(tau=0.1, inv_gamma=9, power=1, ahead=1)
    assert [rule.gain(k) for k in range(2, 201)] == pytest.approx(theirs, rel=1e-12)
    theirs = [1 - min(0.99, 1 - (1 + e / 5) ** -0.75) for e in range(1, 200)]
    rule = Warmup(tau=0.01, inv_gamma=5, power=0.75)
    assert [rule.gain(k) for k in range(2, 201)] == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize(
    ("sigma_rel", "gamma"),
    [(0.05, 16.972199), (0.1, 6.937204), (0.15, 3.557869), (0.2, 1.826214), (0.25, 0.719824)],
)
def test_power_turns_sigma_rel_into_gamma(sigma_rel, gamma):
    assert Power(sigma_rel=sigma_rel).exponent == pytest.approx(gamma, abs=5e-7)


def test_the_largest_sigma_rel_is_the_uniform_average():
    assert Power(sigma_rel=12**-0.5).exponent == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("every", [1, 7, 100])
def test_power_keeps_its_centre_of_mass_at_every_cadence(every):
    k = 50_000 // every
    weights = Power(sigma_rel=0.1).weights(k, every)
    centre = math.fsum(w * j for j, w in enumerate(weights, 1)) / k
    assert centre == pytest.approx(0.888, abs=0.002)


@pytest.mark.parametrize(
    ("tau", "half_life", "mean_age"), [(0.001, 692.8, 999), (0.005, 138.3, 199)]
)
def test_ema_forgets_half_in_its_half_life(tau, half_life, mean_age):
    k = 20_000
    ours, same = Ema(tau=tau).weights(k), Ema(half_life=math.log(2) / -math.log1p(-tau)).weights(k)
    assert ours == pytest.approx(same, rel=1e-9)
    assert Ema(tau=tau).share(k - round(half_life), k) == pytest.approx(0.5, abs=0.001)
    age = math.fsum(w * (k - j) for j, w in enumerate(ours, 1))
    assert age == pytest.approx(mean_age, rel=1e-4)


def test_tail_means_the_decimal_fraction_and_not_the_double_beside_it():
    for k in range(1, 2001):
        for tenths in range(1, 11):
            assert Tail(tenths / 10).first(k) == min(-(-(10 - tenths) * k // 10), k - 1)


def test_between_ends_where_a_tail_begins_and_two_tails_give_it():
    for k in range(1, 400):
        for a, b in ((0, 0.3), (0.55, 0.6), (0.7, 1)):
            rule = Between(a, b)
            assert rule.first(k) == min(math.ceil(Fraction(str(a)) * k), k - 1)
            assert rule.last(k) == max(rule.first(k) + 1, math.ceil(Fraction(str(b)) * k))
        assert Between(0.75, 1).weights(k) == Tail(0.25).weights(k)
    longer, shorter, between = (
        rule.weights(200) for rule in (Tail(0.3), Tail(0.25), Between(0.7, 0.75))
    )
    windows = [(60 * x - 50 * y) / 10 for x, y in zip(longer, shorter, strict=True)]
    assert between == pytest.approx(windows)


def test_window_takes_the_last_snapshots_only():
    assert Window(size=5, every=10).snapshots(100) == [60, 70, 80, 90, 100]
    assert Window(size=5, every=10).snapshots(17, every=7) == [10, 12, 13, 15, 16]  # 16 * 7 >= 110
    assert Window(size=3, every=10).snapshots(9) == [9]  # none yet: the last iterate


@pytest.mark.parametrize("every", [1, 3, 7, 10, 25])
def test_window_lists_the_updates_that_fire(every):
    rule = Window(size=4, every=10)
    for k in range(1, 60):
        fired = [j for j in range(1, k + 1) if rule.fires(j, every)]
        assert rule.snapshots(k, every) == (fired[-4:] or [k])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Ema(), "either tau or half_life"),
        (lambda: Ema(tau=0.1, half_life=3), "either tau or half_life"),
        (lambda: Ema(tau=0.0), r"must be in \(0, 1\], got 0.0"),
        (lambda: Ema(tau=math.nan), r"must be in \(0, 1\], got nan"),
        (lambda: Ema(half_life=-1), "above 0, got -1"),
        (lambda: Uniform(start=-1), "at least 0, got -1"),
        (lambda: Uniform(start=2.5), "whole number"),
        (lambda: Tail(0.0), r"\(0, 1\], got 0.0"),
        (lambda: Tail(1.5), r"\(0, 1\], got 1.5"),
        (lambda: Between(0.5, 0.5), r"must hold, got \(0.5, 0.5\)"),
        (lambda: Between(-0.1, 0.5), "must hold"),
        (lambda: Between(0.5, math.nan), "must hold"),
        (lambda: Between(0, 0.5).gain(3), "Between needs the whole run"),
        (lambda: Polynomial(-0.1), "at least 0, got -0.1"),
        (lambda: Power(sigma_rel=0.3), "got 0.3"),
        (lambda: Power(), "either gamma or sigma_rel"),
        (lambda: Window(0, 5), "size must be a whole number"),
        (lambda: Window(5, 0), "every must be a whole number"),
        (lambda: Warmup(1.0), r"\[0, 1\), got 1.0"),
        (lambda: Warmup(0.1, power=2), r"\(0, 1\], got 2"),
        (lambda: Warmup(0.1, inv_gamma=0.5), "at least 1, got 0.5"),
        (lambda: Warmup(0.1, ahead=-1), "at least 0, got -1"),
        (lambda: Tail(0.5).gain(3), "record a Timeline"),
    ],
)
def test_arguments_out_of_range_are_refused_with_a_sentence(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("uniform", Uniform()),
        ("uniform:start=500", Uniform(start=500)),
        ("tail:0.3", Tail(0.3)),
        ("between:0.7,0.75", Between(0.7, 0.75)),
        ("ema:half_life=2000", Ema(half_life=2000)),
        ("ema:0.01,debias=true", Ema(tau=0.01, debias=True)),
        ("window:5,100", Window(5, 100)),
        ("power:sigma_rel=0.1", Power(sigma_rel=0.1)),
    ],
)
def test_a_command_line_names_a_rule(text, rule):
    assert parse_rule(text) == rule


@pytest.mark.parametrize(
    "text", ["median", "tail", "tail:x", "ema:tau=0.1,tau=0.2", "hard:every=3"]
)
def test_a_wrong_rule_on_the_command_line_is_one_sentence(text):
    with pytest.raises(ValueError, match=r"rule|takes|needs|number"):
        parse_rule(text)


@pytest.mark.parametrize("rule", EVERY_RULE, ids=str)
def test_a_rule_survives_being_written_as_plain_values(rule):
    assert rule_from(describe_rule(rule)) == rule
    assert {field.name for field in fields(rule)} < {*describe_rule(rule)}
    assert RULES[type(rule).__name__.lower()] is type(rule)
