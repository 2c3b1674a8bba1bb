"""Rules of choice replayed on stored episodes, against the registration written out slowly."""

import numpy as np
import pytest

from scripts.experiment.replay import CANDIDATES, SPLITS, replay


def episodes(names, runs=2, stored=100, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(runs, stored)) for name in {**dict.fromkeys(names), "tail25": 0}}


def test_candidates_are_those_of_the_registration():
    windows = [f"window{end}" for end in range(95, 50, -5)]
    assert CANDIDATES["windows"] == ["tail5", *windows]
    assert CANDIDATES["checkpoints"] == ["last", *(f"checkpoint{x}" for x in range(95, 70, -5))]
    others = ["tail5", "tail10", "tail25", "tail50", "all", "ema1", "target", *windows]
    assert sorted(CANDIDATES["choose"]) == sorted(["last", *others])


@pytest.mark.parametrize(("rule", "budget"), [("windows", 60), ("checkpoints", 36)])
def test_the_best_of_equal_numbers_is_its_definition_written_slowly(rule, budget):
    names = CANDIDATES[rule]
    x = episodes(names)
    rng, expected = np.random.default_rng(0), []
    for run in range(2):
        worth = []
        for _ in range(SPLITS):
            order = rng.permutation(100)
            chosen, held = order[: budget // len(names)], order[budget // len(names) :]
            winner = max(names, key=lambda name: x[name][run][chosen].mean())
            worth.append(x[winner][run][held].mean() - x["tail25"][run][held].mean())
        expected.append(np.mean(worth))
    np.testing.assert_allclose(replay(x, rule, budget), expected)


def test_ties_go_to_the_newest():
    x = {name: np.full((1, 100), 500.0) for name in (*CANDIDATES["windows"], "tail25")}
    x["tail5"] = np.concatenate([np.full(99, 500.0), [100.0]])[None]
    worth = replay(x, "windows", 10)  # tail5 wins its ties, unless its bad episode was dealt first
    assert -400 / 99 * 1.05 < worth[0] < -400 / 99 * 0.9


def test_choose_finds_what_is_better_and_ships_the_prior_for_nothing():
    x = episodes(CANDIDATES["choose"], runs=1)
    x["window70"] = x["window70"] + 10
    assert replay(x, "choose", 0) == pytest.approx([0.0])
    expected = (x["window70"] - x["tail25"]).mean()
    assert replay(x, "choose", 60) == pytest.approx([expected], abs=0.03)


def test_what_was_chosen_on_luck_is_worth_nothing_on_other_episodes():
    """All candidates are the same policy on their own episodes: no value but chance."""
    x = episodes(CANDIDATES["choose"], runs=20, seed=5)
    x |= episodes(CANDIDATES["checkpoints"], runs=20, seed=6)
    for rule in ("choose", "checkpoints"):
        worth = replay(x, rule, 60)
        error = worth.std(ddof=1) / np.sqrt(20)
        assert abs(worth.mean()) < 3 * error + 0.01


def test_a_budget_too_small_for_the_candidates_or_too_large_for_the_episodes_has_no_number():
    x = episodes(CANDIDATES["choose"], stored=10)
    assert np.isnan(replay(x, "windows", 5)).all()
    assert np.isnan(replay(x, "choose", 5)).all()
    assert np.isnan(replay(x, "windows", 100)).all()
    assert np.isnan(replay({"tail25": x["tail25"]}, "checkpoints", 60)).all()
