import dataclasses
import functools
import json
import math
import statistics

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

from polyak_rl import Choice, choose, one_by_one
from polyak_rl.choose import mean_interval, mean_of_worst, rounds, t_quantile

NOISE = np.random.default_rng(0).standard_normal((2000, 8))


def noisy(weights, episodes):
    """A candidate is its mean and its column of noise."""
    return {
        name: [mean + NOISE[e, column] for e in episodes]
        for name, (mean, column) in weights.items()
    }


CANDIDATES = {"last": (0.0, 0), "tail10": (0.6, 1), "tail25": (0.3, 2), "ema1": (0.1, 3)}


def recorded(play):
    """The player, and the list of its calls."""
    calls = []

    def played(weights, episodes):
        calls.append(([*weights], episodes))
        return play(weights, episodes)

    return played, calls


# --- choosing -----------------------------------------------------------------------------------


def cvar(x, share):
    """The mean of the worst share; where it is no whole number, the last one counts in part."""
    worst = max(share * len(x), 1.0)
    return np.sort(x) @ np.clip(worst - np.arange(len(x)), 0, 1) / worst


def slow_halving(table, plan, prior, worst):
    """Sequential halving on a table [candidates, episodes], by sorting at each round."""
    alive, seen = list(range(len(table))), 0
    for size, episodes in plan:
        assert size == len(alive)
        seen += episodes
        score = [round(float(cvar(table[i, :seen], worst)), 9) for i in alive]
        ranked = sorted(zip(score, alive, strict=True), key=lambda x: (-x[0], x[1] != prior, x[1]))
        alive = sorted(i for _, i in ranked[: math.ceil(size / 2)])
    return alive[0]


@pytest.mark.parametrize("worst", [1.0, 0.25])
@pytest.mark.parametrize(("candidates", "budget"), [(2, 5), (3, 11), (5, 36), (12, 36), (14, 120)])
def test_it_is_sequential_halving_on_common_episodes(candidates, budget, worst):
    plan = rounds(candidates, budget)
    for draw in range(20):
        rng = np.random.default_rng([draw, candidates])
        table = (
            np.round(8 * rng.standard_normal((candidates, 80)) + 4 * rng.random((candidates, 1)))
            / 8
        )
        weights = {str(i): i for i in range(candidates)}
        play = one_by_one(lambda i, episodes, table=table: table[i, list(episodes)])
        found = choose(weights, play, budget=budget, prior="1", last="0", worst=worst, fresh=0)
        assert int(found.winner) == slow_halving(table, plan, 1, worst)


@pytest.mark.parametrize("candidates", [1, 2, 3, 4, 7, 8, 9, 14, 33])
@pytest.mark.parametrize("more", [0, 1, 5, 40, 999])
def test_the_rounds_spend_the_budget_and_never_more(candidates, more):
    with pytest.raises(ValueError, match="at least") as error:
        rounds(candidates, -1)
    least = int(str(error.value).split("at least ")[1].split()[0])
    assert rounds(candidates, 0) == []
    if least > 1:
        with pytest.raises(ValueError, match=f"at least {least} episodes for {candidates}"):
            rounds(candidates, least - 1)
    plan = rounds(candidates, least + more)
    spent = sum(size * episodes for size, episodes in plan)
    assert [size for size, _ in plan[:1]] == ([candidates] if candidates > 1 else [])
    assert all(episodes >= 1 for _, episodes in plan)
    if plan:
        assert plan[-1][0] == 2
        assert least + more - 1 <= spent <= least + more


def test_no_more_is_played_than_the_budget_and_the_fresh_block():
    play, calls = recorded(noisy)
    choice = choose(CANDIDATES, play, budget=36, fresh=10)
    played = [len(names) * len(episodes) for names, episodes in calls]
    assert sum(played[:-1]) <= 36
    assert played[-1] == 10 * len({choice.winner, "tail25", "last"})
    assert choice.episodes == sum(played)


def test_choosing_and_valuing_share_no_episode_and_a_second_choice_can_go_on():
    play, calls = recorded(noisy)
    choice = choose(CANDIDATES, play, budget=24, fresh=7, start=100)
    again = choose(CANDIDATES, play, budget=24, fresh=7, start=choice.next_start)
    blocks = [episodes for _, episodes in calls]
    assert blocks[0][0] == 100
    assert [e for block in blocks for e in block] == [*range(100, again.next_start)]


def test_a_round_plays_the_same_episodes_with_all_of_its_candidates():
    play, calls = recorded(noisy)
    choose(CANDIDATES, play, budget=20, fresh=0)
    assert [len(names) for names, _ in calls] == [4, 2]
    assert set(calls[0][0]) == CANDIDATES.keys()


def test_a_tie_goes_to_the_prior_then_to_the_first_named():
    play = one_by_one(lambda w, episodes: [w] * len(episodes))
    ties = {"last": 1, "tail10": 1, "tail25": 1, "ema1": 1, "tail50": 1}
    assert choose(ties, play, budget=10).winner == "tail25"
    assert choose(ties, play, budget=10, prior="ema1").winner == "ema1"
    beaten = {**ties, "tail25": 0.5}
    for seed in range(5):
        assert choose(beaten, play, budget=10, seed=seed).winner == "last"


def test_a_budget_of_nothing_ships_the_prior_and_plays_nothing():
    def play(weights, episodes):
        raise AssertionError("played")

    choice = choose(CANDIDATES, play, budget=0)
    assert (choice.winner, choice.episodes, choice.next_start) == ("tail25", 0, 0)
    assert math.isnan(choice.gain().estimate)
    assert math.isnan(choice.promised())
    assert math.isnan(choice.value())
    assert str(choice) == "ship tail25"
    valued = choose(CANDIDATES, noisy, budget=0, fresh=5)
    assert valued.winner == "tail25"
    assert valued.valuing.keys() == {"tail25", "last"}


def test_a_single_candidate_is_shipped_and_valued():
    play = one_by_one(lambda w, episodes: [w + e for e in episodes])
    choice = choose({"last": 1.0}, play, prior="last", budget=30)
    assert (choice.winner, choice.choosing, choice.value()) == ("last", {}, 20.5)
    assert choice.gain() == (0, 0, 0)


def test_the_mean_and_the_worst_episodes_can_choose_otherwise():
    candidates = {"last": [10.0, 10, 10, -10], "tail25": [4.0, 4, 4, 4]}
    play = one_by_one(lambda row, episodes: [row[e % 4] for e in episodes])
    assert choose(candidates, play, budget=16).winner == "last"
    careful = choose(candidates, play, budget=16, worst=0.25)
    assert careful.winner == "tail25"
    assert careful.promised() == careful.value() == 4
    assert careful.value("last") == -10


def test_it_is_deterministic_and_the_seed_decides_the_order_alone():
    runs, orders = [], []
    for seed in (0, 0, 1, 2, 3):
        play, calls = recorded(noisy)
        choice = choose(CANDIDATES, play, seed=seed)
        runs.append((choice.winner, choice.choosing, choice.valuing))
        orders.append([names for names, _ in calls])
    assert runs[0] == runs[1] == runs[2] == runs[3] == runs[4]
    assert orders[0] == orders[1]
    assert len({str(order) for order in orders}) > 2


def test_each_candidate_goes_first_as_often_as_another():
    first = []
    for seed in range(400):
        play, calls = recorded(noisy)
        choose(CANDIDATES, play, budget=6, fresh=0, seed=seed)
        first.append(calls[0][0][0])
    assert all(70 < first.count(name) < 130 for name in CANDIDATES)


def test_functions_are_called_once_and_modules_are_weights():
    net, made = torch.nn.Linear(1, 1), []

    def average():
        made.append(1)
        return torch.nn.Linear(1, 1)

    seen = {}

    def play(weights, episodes):
        seen.update(weights)
        return {name: [0.0] * len(episodes) for name in weights}

    partial = functools.partial(dict, a=1)
    choose({"last": net, "tail25": average, "ema1": partial}, play, budget=8)
    assert seen["last"] is net
    assert isinstance(seen["tail25"], torch.nn.Linear)
    assert made == [1]
    assert seen["ema1"] == {"a": 1}


def test_returns_may_come_as_arrays_or_tensors():
    def play(kind):
        return lambda weights, episodes: {n: kind(w * np.arange(9.0)) for n, w in weights.items()}

    candidates = {"last": 1.0, "tail25": 2.0}
    a, b = (
        choose(candidates, play(kind), budget=18, fresh=9) for kind in (np.asarray, torch.tensor)
    )
    assert a == b
    assert type(a.choosing["last"][0]) is float


# --- refusals -----------------------------------------------------------------------------------


def never(weights, episodes):
    raise AssertionError("played")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"budget": 5}, "budget must be 0 or at least 6 episodes for 4 candidates, got 5"),
        ({"budget": -1}, "budget must be 0 or at least 6 .* got -1"),
        ({"prior": "tail30"}, r"prior must be one of \['last', .*\], got 'tail30'"),
        ({"last": "now"}, "last must be one of .* got 'now'"),
        ({"worst": 0.0}, r"worst must be .* in \(0, 1\], got 0.0"),
        ({"worst": math.nan}, r"worst must be .* in \(0, 1\], got nan"),
        ({"fresh": 1}, "fresh must be 0 or at least 2 episodes, got 1"),
        ({"start": -1}, "start must be at least 0, got -1"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_played(change, text):
    with pytest.raises(ValueError, match=text):
        choose(CANDIDATES, never, **change)


def test_two_candidates_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"names of their own, got \['last', 'tail25', 'last'\]"):
        choose([("last", 1), ("tail25", 2), ("last", 3)], never)


@pytest.mark.parametrize("argument", ["budget", "start", "seed", "fresh"])
def test_numbers_that_count_are_whole_and_may_be_numpys(argument):
    choice = choose(CANDIDATES, noisy, **{argument: np.int64(12)})
    assert Choice(**json.loads(json.dumps(dataclasses.asdict(choice)))) == choice
    with pytest.raises(TypeError, match="integer"):
        choose(CANDIDATES, never, **{argument: 12.0})


def test_names_are_text():
    with pytest.raises(ValueError, match=r"names of their own, got \['last', 'tail25', 3\]"):
        choose({"last": 1, "tail25": 2, 3: 3}, never)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda n: {"last": [0.0] * n}, r"for \['last', 'tail25'\] by name, got \['last'\]"),
        (lambda n: [[0.0] * n] * 2, "by name, got list"),
        (lambda n: {"last": [0.0] * n, "tail25": None}, "numbers, got None of 'tail25'"),
        (lambda n: {"last": [0.0] * n, "tail25": [0.0]}, "got 1 of 'tail25' for 3 episodes"),
        (lambda n: {"last": [0.0] * n, "tail25": [math.nan] * n}, "finite, got nan of 'tail25'"),
        (lambda n: {"last": [math.inf] * n, "tail25": [0.0] * n}, "finite, got inf of 'last'"),
        (lambda n: {"last": [0.0] * n, "tail25": ["x"] * n}, "must be numbers, got .*'tail25'"),
    ],
)
def test_a_wrong_answer_is_refused_before_anything_else_is_played(answer, text):
    play, calls = recorded(lambda weights, episodes: answer(len(episodes)))
    with pytest.raises(ValueError, match=text):
        choose({"last": 1, "tail25": 2}, play, budget=6)
    assert len(calls) == 1


# --- the record ---------------------------------------------------------------------------------


def test_the_record_goes_through_json():
    choice = choose(CANDIDATES, noisy, worst=0.5)
    text = json.dumps(dataclasses.asdict(choice))
    assert Choice(**json.loads(text)) == choice


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"winner": "tail50"}, "choosing must hold .*tail50"),
        ({"valuing": {"last": [1.0, 2.0]}}, "valuing must hold"),
        ({"choosing": {"last": [math.nan], "tail25": [1.0]}}, "finite"),
        ({"worst": 2.0}, "share"),
        ({"worst": "1"}, r"worst must be a share of the episodes in \(0, 1\], got 1"),
        ({"winner": ["last"]}, "winner must be of type str"),
        ({"start": 0.5}, "start must be of type int, got 0.5"),
        ({"choosing": [1.0]}, "choosing must be of type dict"),
        ({"valuing": {"last": [1.0, 2.0], "tail25": [1.0]}}, "same 2 or more episodes of each"),
        ({"valuing": {"last": [1.0], "tail25": [1.0]}}, "same 2 or more episodes of each"),
    ],
)
def test_what_is_no_record_is_refused(change, text):
    choice = choose({"last": (0.0, 0), "tail25": (1.0, 1)}, noisy, budget=8)
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(choice, **change)


def test_only_what_was_valued_has_a_value():
    choice = choose(CANDIDATES, noisy)
    left_out = next(name for name in CANDIDATES if name not in choice.valuing)
    for ask in (choice.value, choice.gain):
        with pytest.raises(ValueError, match=f"were valued, got '{left_out}'"):
            ask(left_out)


def test_what_the_choosing_episodes_promise_flatters_and_the_fresh_ones_do_not():
    """Twelve candidates that are all alike: the best on five episodes looks better than it is."""
    rng = np.random.default_rng(4)
    promised, valued = [], []
    for _ in range(200):
        table = rng.standard_normal((12, 60))
        weights = {"last": 0, "tail25": 1, **{f"w{i}": i for i in range(2, 12)}}
        play = one_by_one(lambda i, episodes, table=table: table[i, list(episodes)])
        choice = choose(weights, play, budget=36, fresh=20)
        promised.append(choice.promised())
        valued.append(choice.value())
    assert statistics.fmean(promised) > 0.4
    assert abs(statistics.fmean(valued)) < 4 / math.sqrt(200 * 20)


def test_the_text_tells_the_gain_over_last_and_prior_and_the_worst_tenth():
    values = {
        "last": [1.0, 3.0] * 5,
        "tail25": [3.0, 3.0] * 5,
        "tail10": [5.0, 4.0] * 5,
    }
    record = Choice("tail10", "tail25", "last", 1.0, 0, 0, {n: [6.0] for n in values}, values)
    assert str(record).splitlines() == [
        "ship tail10",
        "  chosen among 3 on 1 episodes, which promised 6",
        "  on 10 fresh episodes 4.5",
        "  +2.5 [+1.369, +3.631] over last",
        "  +1.5 [+1.123, +1.877] over tail25",
        "  4 on the worst tenth of them",
    ]


# --- statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 6, 9, 19, 39, 60, 999, 20000])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_the_t_quantile_is_scipys(df, level):
    expected = scipy_stats.t.ppf((1 + level) / 2, df)
    assert t_quantile(df, level) == pytest.approx(expected, rel=1e-9)


def test_the_gain_is_the_paired_t_interval():
    choice = choose(CANDIDATES, noisy, budget=60)
    for other in ("last", "tail25"):
        a, b = choice.valuing[choice.winner], choice.valuing[other]
        theirs = scipy_stats.ttest_rel(a, b).confidence_interval(0.95)
        expected = (np.mean(a) - np.mean(b), theirs.low, theirs.high)
        assert choice.gain(other) == pytest.approx(expected)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.25, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("n", [1, 4, 10, 37])
def test_the_mean_of_the_worst_is_its_definition_written_slowly(share, n):
    x = np.random.default_rng(n).standard_normal(n)
    assert mean_of_worst(list(x), share) == pytest.approx(cvar(x, share))


def test_a_tenth_of_ten_returns_is_one_of_them():
    assert mean_of_worst([float(i) for i in range(10)], 0.1) == 0
    assert mean_of_worst([float(i) for i in range(30)], 0.1) == 1


@pytest.mark.parametrize("worst", [1.0, 0.5])
def test_the_interval_covers_and_shrinks(worst):
    """Two paired normals whose criteria differ by 1, whatever the share."""
    rng, covered, widths = np.random.default_rng(8), [], []
    for fresh in (20, 80):
        x = rng.standard_normal((1500, fresh))
        pairs = x + 1 + rng.standard_normal(x.shape) / 2, x
        gains = [
            Choice("a", "b", "b", worst, 0, 0, {}, {"a": a, "b": b}).gain()
            for a, b in zip(*pairs, strict=True)
        ]
        true = 1 - (math.sqrt(1.25) - 1) * mean_of_normal(worst)
        covered.append(np.mean([low <= true <= high for _, low, high in gains]))
        widths.append(np.mean([high - low for _, low, high in gains]))
    assert all(0.92 < share < 0.97 for share in covered), covered
    assert widths[1] < 0.55 * widths[0]


def mean_of_normal(worst):
    """How far the mean of the worst share of a standard normal lies below zero."""
    return 0 if worst == 1 else scipy_stats.norm.pdf(scipy_stats.norm.ppf(worst)) / worst


def test_the_interval_of_a_mean_takes_two_numbers():
    with pytest.raises(ValueError, match="at least 2 numbers, got 1"):
        mean_interval([1.0])
    with pytest.raises(ValueError, match="df must be at least 1, got 0"):
        t_quantile(0)
    assert mean_interval([0.0, 2.0]) == pytest.approx((1, 1 - 12.7062047, 1 + 12.7062047))
