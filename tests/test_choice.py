import csv
from pathlib import Path

import numpy as np
import pytest

from scripts import choice
from scripts.experiment import choosing
from scripts.experiment.choosing import (
    BASE,
    PRIOR,
    RULES,
    Group,
    Run,
    affordable,
    best,
    held,
    replay,
)

PUBLISHED = Path(__file__).parent.parent / "scripts" / "results" / "exploratory" / "results.csv.gz"
CHECKPOINTS, AVERAGES, ALL = RULES[2:]


def run_of(table, name="run", past=()):
    """A run whose candidates have these rows of returns, in an environment without a scale."""
    returns = {n: {str(e): float(x) for e, x in enumerate(row)} for n, row in table.items()}
    return Run(("Toy-v0", "dqn", ""), name, returns, list(past), 1.0)


def write(path, rows):
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(("run", "env", "algo", "seed", "scheme", "step", "episode", "return"))
        lines.writerows(rows)


def rows_of(scheme, step, returns, run="a"):
    return [(run, "Toy-v0", "dqn", 1, scheme, step, e, r) for e, r in enumerate(returns)]


# --- reading --------------------------------------------------------------------------------------


def test_candidates_are_the_schemes_of_the_last_step_by_their_present_names(tmp_path):
    rows = rows_of(BASE, 50, [0, 1]) + rows_of("ema1", 50, [9, 9]) + rows_of(BASE, 100, [1, 2])
    for scheme in ("tail25", "all", "placebo", "best", "line0.5", "window90", "window95", "new"):
        rows += rows_of(scheme, 100, [3, 4])
    write(tmp_path / "r.csv", rows)
    (run,) = choosing.read([tmp_path / "r.csv"])
    assert set(run.returns) == {"last", "tail25", "all", "window95", "window90", "new"}
    assert run.past == ["window95", "window90"]
    assert run.averages == ["tail25", "last", "all", "new"]
    assert run.all == ["tail25", "last", "window95", "window90", "all", "new"]
    assert run.checkpoints == ["last", "window95", "window90"]
    write(tmp_path / "r.csv", rows + rows_of("checkpoint95", 100, [3, 4]))
    (run,) = choosing.read([tmp_path / "r.csv"])
    assert run.checkpoints == ["last", "checkpoint95"]
    assert run.all == ["tail25", "last", "window95", "window90", "all", "new"]


def test_without_stretches_of_the_past_the_last_iterate_was_there_in_the_last_fifth(tmp_path):
    rows = [row for step in range(10, 101, 5) for row in rows_of(BASE, step, [step, step + 1])]
    write(tmp_path / "r.csv", rows)
    (run,) = choosing.read([tmp_path / "r.csv"])
    assert run.past == [
        "iterate of step 95",
        "iterate of step 90",
        "iterate of step 85",
        "iterate of step 80",
    ]
    assert run.learned == 90
    np.testing.assert_array_equal(run.table(run.past)["iterate of step 80"], [80, 81])


def test_only_episodes_that_all_candidates_have_are_common():
    run = run_of({"last": range(10), "tail25": range(4), "ema1": range(7)})
    assert {name: len(row) for name, row in run.table(["ema1"]).items()} == {"ema1": 7, "last": 7}
    assert len(run.table(run.averages)["last"]) == 4


def test_few_runs_of_a_stratum_are_pooled_in_units_of_their_own(tmp_path):
    runs = [run_of({"last": [i, i], "tail25": [1, 2]}, f"{i}") for i in range(5)]
    alone = Run(("Other-v0", "sac", ""), "x", runs[0].returns, [], 7.0)
    first, second = choosing.grouped([*runs, alone])
    assert (len(first.runs), first.pooled) == (5, False)
    assert first.margin == pytest.approx(0.2 * np.std(range(5), ddof=1))
    assert (second.runs, second.span(alone), second.pooled) == ([alone], 7.0, True)


# --- rules ----------------------------------------------------------------------------------------


def test_a_small_budget_takes_the_first_candidates():
    names = list("abcdefgh")
    assert affordable(names, 0) == names
    assert affordable(names, 1) == ["a"]
    assert affordable(names, 5) == ["a", "b", "c"]  # 3 + 2
    assert affordable(names, 12) == ["a", "b", "c", "d", "e", "f"]  # 6 + 3 + 2
    assert affordable(names, 14) == names  # 8 + 4 + 2


def test_the_best_checkpoint_is_the_first_of_the_best_in_time():
    deal = {"new": [5.0, 9.0], "mid": [5.0, 1.0], "old": [4.0, 9.0]}
    deal = {name: np.array(row) for name, row in deal.items()}
    picks = {n: best(["new", "mid", "old"], n) for n in (0, 2, 3, 6)}
    assert {n: (used, pick(deal)) for n, (used, pick) in picks.items()} == {
        0: (0, "new"),
        2: (1, "mid"),  # of the two newest
        3: (1, "mid"),
        6: (2, "new"),
    }


@pytest.mark.parametrize("rule", RULES[1:], ids=lambda rule: rule.label)
@pytest.mark.parametrize("budget", [5, 12, 36])
def test_choosing_among_equals_gains_nothing_on_held_out_episodes(rule, budget):
    """All candidates are alike, so whatever a rule seems to gain is a leak from its choice."""
    names = ["last", "tail25", "tail10", "ema1", "w4", "w3", "w2", "w1"]
    rng = np.random.default_rng(1)
    gains = []
    for i in range(150):
        table = dict(zip(names, rng.standard_normal((8, 30)), strict=True))
        gains.append(replay(run_of(table, f"{i}", names[4:][::-1]), rule, budget, splits=4))
    error = np.std(gains, ddof=1) / np.sqrt(len(gains))
    assert abs(np.mean(gains)) < 3 * error < 0.15


@pytest.mark.parametrize("rule", RULES[1:], ids=lambda rule: rule.label)
def test_each_rule_finds_what_is_far_better(rule):
    rng = np.random.default_rng(2)
    table = {name: rng.standard_normal(30) for name in ("last", "tail25", "tail10", "w2", "w1")}
    better = "w1" if rule.label in ("best checkpoint", CHECKPOINTS.label) else "tail10"
    table[better] = table[better] + 50
    gain = replay(run_of(table, past=["w2", "w1"]), rule, 36, splits=5)
    assert gain == pytest.approx(50, abs=1)


def test_what_needs_more_episodes_than_are_stored_is_not_replayed():
    table = {name: np.arange(20.0) for name in ("last", "tail25", "tail10")}
    run = run_of(table)
    # Three candidates: 36 episodes are 6 + 9 of the finalists, 60 are 10 + 15.
    assert AVERAGES.plan(run.averages, 36)[0] == 15
    assert np.isfinite(replay(run, AVERAGES, 36, splits=1))
    assert np.isnan(replay(run, AVERAGES, 60, splits=1))
    found = choosing.curves(Group("toy", [run_of(table, f"{i}") for i in range(5)]), splits=1)
    points = dict(zip(choosing.BUDGETS, found[AVERAGES.label], strict=True))
    assert choosing.cell(points[60], 5) == "\N{EN DASH}"
    assert choosing.cell(points[36], 5) == "+0.000 [+0.000, +0.000]"


def test_rules_are_compared_over_the_same_runs():
    """Where only some runs have episodes enough for one rule, the others are scored on those."""
    names = ("last", "tail25", "tail10")
    runs = [run_of({n: np.arange(40 if i < 6 else 18) for n in names}, f"{i}") for i in range(9)]
    found = choosing.curves(Group("toy", runs, pooled=True), splits=1)
    at_60 = [points[choosing.BUDGETS.index(60)] for points in found.values()]
    assert {point[1] for point in at_60 if point} == {6}
    assert choosing.cell(at_60[0], 9).endswith("(6 runs)")


# --- the interval ---------------------------------------------------------------------------------


def test_the_interval_of_a_replay_covers_and_shrinks_with_the_budget():
    rng = np.random.default_rng(5)
    runs = []
    for i in range(20):
        common = rng.standard_normal(100)
        table = {n: common + rng.standard_normal(100) for n in ("last", "tail25", "tail10", "ema1")}
        runs.append(run_of(table, f"{i}"))
    small, large = (held(Group("toy", runs), budget, draws=20) for budget in (12, 120))
    assert all(0.92 <= x.share <= 0.98 for x in (small, large)), (small, large)
    assert large.width < 0.8 * small.width
    assert 0 < large.flattery < small.flattery


# --- published runs -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    return {group.name: group for group in choosing.grouped(choosing.read([PUBLISHED]))}


def test_twelve_episodes_gain_a_lot_on_cartpole_and_thirty_six_more(published):
    group = published["DQN CartPole-v1"]
    assert len(group.runs) == 60

    def gain(rule, budget):
        return np.mean([replay(run, rule, budget, splits=8) / 478 for run in group.runs])

    assert gain(AVERAGES, 12) >= 0.22
    assert gain(AVERAGES, 36) >= 0.24
    assert gain(ALL, 36) >= 0.25
    assert 0.24 < group.top < 0.27


def test_where_there_is_no_headroom_choosing_costs_less_than_what_matters(published):
    for name in ("DQN Acrobot-v1", "DDPG InvertedPendulum-v5", "DDPG Pendulum-v1"):
        group = published[name]
        for budget in (0, 5, 12, 36, 60):
            gains = [replay(run, ALL, budget, splits=8) / group.span(run) for run in group.runs]
            assert np.mean(gains) >= -group.margin, (name, budget)


def test_the_interval_holds_the_truth_about_as_often_as_it_says(published):
    found = held(published["DQN CartPole-v1"], 60, draws=10)
    assert 0.91 <= found.share <= 0.97
    assert found.width < 0.06


# --- command line ---------------------------------------------------------------------------------


def test_it_writes_a_figure_and_a_table(tmp_path):
    rng = np.random.default_rng(3)
    rows = []
    for run in "abcdef":
        for scheme in (BASE, PRIOR, "tail10", "window95"):
            rows += rows_of(scheme, 100, rng.standard_normal(30), run)
        rows += rows_of(BASE, 50, rng.standard_normal(30) - 3, run)
    write(tmp_path / "r.csv", rows)
    assert (
        choice.main([str(tmp_path / "r.csv"), "--out", str(tmp_path / "o"), "--splits", "2"]) == 0
    )
    text = (tmp_path / "o" / "choice.md").read_text()
    assert "## DQN Toy-v0\n\n6 runs;" in text
    for rule in RULES:
        assert f"| {rule.label} | " in text
    assert "| all, by choose \N{MINUS SIGN} best checkpoint | +0.000 [" not in text
    assert "| all, by choose \N{MINUS SIGN} always tail25 | +0.000 [+0.000, +0.000] |" in text
    assert "all, by runs" in text
    assert (tmp_path / "o" / "choice.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("rows", [rows_of(BASE, 100, [1, 2]), []])
def test_results_without_a_choice_are_refused_in_a_sentence(tmp_path, rows, capsys):
    write(tmp_path / "r.csv", rows)
    assert choice.main([str(tmp_path / "r.csv"), "--out", str(tmp_path / "o")]) == 2
    assert "expected runs with candidates besides the last iterate" in capsys.readouterr().err


def test_a_return_that_is_no_number_is_refused_with_its_line(tmp_path, capsys):
    write(tmp_path / "r.csv", rows_of(BASE, 100, [1, "nan"]))
    assert choice.main([str(tmp_path / "r.csv"), "--out", str(tmp_path / "o")]) == 2
    assert "r.csv, line 3: return must be finite, got nan" in capsys.readouterr().err


def test_no_splits_and_a_folder_that_is_a_file_are_refused_before_anything_is_replayed(
    tmp_path, capsys
):
    results = str(Path(__file__).parent.parent / "scripts" / "results" / "exploratory")
    assert choice.main([results, "--splits", "0"]) == 2
    assert capsys.readouterr().err == "error: splits must be at least 1, got 0\n"
    (tmp_path / "file").touch()
    assert choice.main([results, "--out", str(tmp_path / "file")]) == 2
    assert "error: cannot make the folder " in capsys.readouterr().err
