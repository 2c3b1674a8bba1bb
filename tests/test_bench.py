"""The benchmark: every section runs and writes its figures; ratios and verdicts are right."""

import json
import os

import pytest
import torch

from agents.ddpg import DDPGConfig
from agents.dqn import DQNConfig
from agents.sac import SACConfig
from agents.td3 import TD3Config
from scripts import bench
from scripts.bench_cases.counting import flops, held
from scripts.bench_cases.floors import gemms, products
from scripts.bench_cases.tables import figure
from scripts.bench_cases.timing import Bench, Case, Goal, Spread, pinned

CPU = torch.device("cpu")

TINY = "--rounds 1 --seconds 0 --step-seconds 0 --loop-seconds 0 --max-parameters 10000"
TINY += " --max-tensors 6 --max-averages 2 --max-seeds 2 --no-compile"
ON_CPU = ["updates", "steps", "loops", "averaging", "memory", "scaling"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A run of all sections with tiny settings."""
    folder = tmp_path_factory.mktemp("bench")
    assert bench.main([*TINY.split(), "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def results(out):
    return json.loads((out / "bench.json").read_text())


def test_every_section_has_figures(results):
    sections = {entry["section"] for entry in results["cases"] + results["values"]}
    assert sections == set(ON_CPU)


def test_every_contender_has_a_positive_time_for_every_round(results):
    for case in results["cases"]:
        for name, rounds in case["rounds"].items():
            assert len(rounds) == 1, (case["title"], name)
            assert all(seconds > 0 for seconds in rounds)
            summary = case["summary"][name]
            assert summary["low"] <= summary["median"] <= summary["high"]


def test_the_figures_say_what_they_were_measured_on(results):
    machine = results["machine"]
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == 1
    assert machine["commit"]
    assert 0 < machine["share of the core"] < 1.1
    assert results["options"]["rounds"] == 1


def test_every_goal_has_a_verdict_and_only_what_needs_more_is_not_measured(results):
    verdicts = {goal["goal"]: goal["verdict"] for goal in results["goals"]}
    assert len(verdicts) == len(bench.GOALS)
    assert set(verdicts.values()) <= {"pass", "miss", "not measured"}
    missing = {goal for goal, verdict in verdicts.items() if verdict == "not measured"}
    needs_more = {goal.text for goal in bench.GOALS if goal.gpu or goal.size}
    assert missing - {goal for goal in missing if "compiled" in goal} == needs_more


def test_the_tables_are_whole(out):
    text = (out / "bench.md").read_text(encoding="utf-8")
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) > 15
    for lines in tables:
        assert len(lines) > 2
        assert len({line.count("|") for line in lines}) == 1, lines
    for section in ON_CPU:
        assert f"## {section.capitalize()}" in text


def test_threads_and_cores_are_given_back():
    threads = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    with pinned(1):
        assert torch.get_num_threads() == 1
        assert not cores or len(os.sched_getaffinity(0)) == 1
    assert torch.get_num_threads() == threads
    assert not cores or os.sched_getaffinity(0) == cores


def test_a_ratio_is_the_median_of_the_rounds_ratios():
    rounds = {"slow": [2.0, 30.0, 4.0], "fast": [1.0, 10.0, 1.0]}  # ratios 2, 3, 4
    case = Case("updates", "title", "", "seconds", "", "slow", rounds)
    assert case.ratio("slow", "fast") == Spread(3.0, 2.5, 3.5)


@pytest.mark.parametrize(
    ("goal", "expected"),
    [
        (Goal("", "t", over="slow", under="fast", at_least=3), "pass"),
        (Goal("", "t", over="slow", under="fast", at_least=3.1), "miss"),
        (Goal("", "t", over="slow", under="fast", at_most=3), "pass"),
        (Goal("", "t", over="slow", under="fast", scale=2, at_most=5.9), "miss"),
        (Goal("", "t", over="slow", under="absent", at_most=3), "not measured"),
        (Goal("", "t", size="20", over="slow", under="fast", at_most=3), "not measured"),
        (Goal("", "t", over="slow", under="fast", at_most=3, gpu=True), "not measured"),
        (Goal("", "counted", at_most=1), "miss"),
    ],
)
def test_a_verdict_is_computed_from_what_was_measured(goal, expected):
    measured = Bench(CPU, rounds=2)
    rounds = {"slow": [3.0, 3.0], "fast": [1.0, 1.0]}
    measured.cases.append(Case("updates", "t", "", "seconds", "", "", rounds))
    measured.value("counted", 2, "launches")
    assert goal.verdict(measured.reached(goal)) == expected


def test_every_goal_is_of_something_that_is_measured(results):
    titles = {case["title"] for case in results["cases"]}
    on_gpu = {bench.UPDATE_LAUNCHES, bench.SAC_LAUNCHES, bench.HUNDRED_MB}
    assert {goal.title for goal in bench.GOALS} <= titles | on_gpu


@pytest.mark.parametrize(
    ("algo", "env_id", "config"),
    [
        ("dqn", "CartPole-v1", DQNConfig(hidden=(16, 12), batch_size=8)),
        ("ddpg", "Pendulum-v1", DDPGConfig(hidden=(16, 12), batch_size=8)),
        ("sac", "Pendulum-v1", SACConfig(hidden=(16, 12), batch_size=8)),
        ("td3", "Pendulum-v1", TD3Config(hidden=(16, 12), batch_size=8)),
    ],
)
def test_a_gradient_step_multiplies_as_much_as_its_floor(algo, env_id, config):
    training = bench.filled_training(algo, env_id, config, CPU)
    sizes = training.interface
    floor = gemms(algo, sizes.obs_dim, sizes.action_dim, config, CPU)
    training.close()
    needed = flops(lambda: bench.call_all(floor))
    steps = 2 if algo == "td3" else 1
    assert flops(lambda: training.learn(steps)) == needed > 0


def test_a_pass_multiplies_what_its_gradients_need():
    """By hand: two layers 3 -> 8 -> 5, four rows; a product of [a, b] [b, c] is 2 a b c."""
    there = 2 * 4 * (3 * 8 + 8 * 5)
    for back, expected in {
        "nothing": there,
        "weights": there + there + 2 * 4 * 8 * 5,
        "inputs": there + there,
    }.items():
        calls = [*products((3, 8, 5), batch=4, back=back, device=CPU)]
        assert flops(lambda calls=calls: bench.call_all(calls)) == expected


def test_storage_is_counted_once_and_the_network_left_out():
    network = torch.nn.Linear(4, 4, bias=False)
    assert held([network.weight, network.weight.view(-1)]) == 64
    assert held({"a": network.weight, "b": torch.zeros(2)}, without=network) == 8


@pytest.mark.parametrize("arguments", ["--rounds 0", "gpu", "--device cuda"])
def test_what_cannot_be_measured_is_refused(arguments, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(arguments.split()) == 2
    assert "error: " in capsys.readouterr().err


def test_a_figure_is_shown_in_a_unit_that_suits_it():
    rounds = {"a": [2.5e-6], "b": [0.0125], "c": [3.0]}
    case = Case("updates", "", "", "seconds", "", "", rounds)
    assert [figure(case, name) for name in rounds] == [
        "2.5 [2.5, 2.5] µs",
        "12.5 [12.5, 12.5] ms",
        "3 [3, 3] s",
    ]
    rate = Case("loops", "", "", "steps/s", "", "", {"a": [0.01]})
    assert figure(rate, "a") == "100 [100, 100]"
