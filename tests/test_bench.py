"""The benchmark: every section runs and writes its figures; ratios and verdicts are right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from agents.ddpg import DDPGConfig
from agents.dqn import DQNConfig
from agents.sac import SACConfig
from agents.td3 import TD3Config
from scripts import bench
from scripts.bench_cases import gpu, updates
from scripts.bench_cases.counting import flops, held
from scripts.bench_cases.floors import gemms, peaks, products, traffic
from scripts.bench_cases.goals import goals
from scripts.bench_cases.lean import LeanSAC
from scripts.bench_cases.tables import by_contender, by_size, figure, to_markdown
from scripts.bench_cases.timing import (
    Bench,
    Case,
    Contender,
    Goal,
    Needs,
    Peaks,
    Spread,
    call_all,
    pinned,
)
from scripts.bench_cases.trainings import filled, learn

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
GOALS = [*goals()]

ON_CPU = ["updates", "steps", "loops", "averaging", "memory", "scaling"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A run of all sections, as quick as can be."""
    folder = tmp_path_factory.mktemp("bench")
    assert bench.main(["--quick", "--no-compile", "--rounds", "1", "--out", str(folder)]) == 0
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
    assert len(verdicts) == len(GOALS)
    assert set(verdicts.values()) <= {"pass", "miss", "not measured"}
    missing = {goal for goal, verdict in verdicts.items() if verdict == "not measured"}
    larger = (updates.PARAMETERS,)  # than the quick sizes
    needs_more = {goal.text for goal in GOALS if goal.gpu or goal.title in larger}
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
        (Goal("", "t", under="slow", scale=1e3, at_most=3000), "pass"),
        (Goal("", "t", under="slow", scale=1e3, at_most=2999), "miss"),
        (Goal("", "t", under="absent", at_most=3), "not measured"),
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
    on_gpu = {gpu.UPDATE_LAUNCHES, gpu.SAC_LAUNCHES, gpu.HUNDRED_MB, gpu.GRAPH}
    assert {goal.title for goal in GOALS} <= titles | on_gpu


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
    training = filled(algo, env_id, config, CPU)
    sizes = training.interface
    floor = gemms(algo, sizes.obs_dim, sizes.action_dim, config, CPU)
    training.close()
    needed = flops(lambda: call_all(floor))
    steps = 2 if algo == "td3" else 1
    assert flops(lambda: learn(training, steps)) == needed > 0


def test_leanrls_step_multiplies_as_much_and_moves_its_target():
    config = SACConfig(hidden=(16, 12), batch_size=8, tau=0.25)
    lean = LeanSAC(3, 2, config, CPU, rows=32, fast=lambda step: step)
    outer = (
        2 * 2 * (2 * 8 * 12)
    )  # of one output and its weights, which the floor multiplies plainly
    assert flops(lean) == flops(lambda: call_all(gemms("sac", 3, 2, config, CPU))) + outer
    before = {name: weight.clone() for name, weight in lean.q_target.items()}
    actor = [p.detach().clone() for p in lean.actor.parameters()]
    lean()
    for name, weight in lean.q_target.items():
        torch.testing.assert_close(weight, before[name].lerp(lean.q[name].detach(), 0.25))
        assert not torch.equal(weight, before[name])
    assert not any(map(torch.equal, actor, lean.actor.parameters()))


def test_a_pass_multiplies_what_its_gradients_need():
    """By hand: two layers 3 -> 8 -> 5, four rows; a product of [a, b] [b, c] is 2 a b c."""
    there = 2 * 4 * (3 * 8 + 8 * 5)
    for back, expected in {
        "nothing": there,
        "weights": there + there + 2 * 4 * 8 * 5,
        "inputs": there + there,
    }.items():
        calls = [*products((3, 8, 5), batch=4, back=back, device=CPU)]
        assert flops(lambda calls=calls: call_all(calls)) == expected


def test_storage_is_counted_once_and_the_network_left_out():
    network = torch.nn.Linear(4, 4, bias=False)
    assert held([network.weight, network.weight.view(-1)]) == 64
    assert held({"a": network.weight, "b": torch.zeros(2)}, without=network) == 8


def test_it_asks_for_no_more_than_a_bare_machine_has():
    """`make gpu` names what it needs; a missing module is None to the import system."""
    absent = "rich matplotlib scipy pandas ray moviepy pygame Box2D ale_py cv2 jax sbx optax timm"
    code = f"import sys; sys.modules.update(dict.fromkeys({absent.split()})); import scripts.bench"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rounds 0", "rounds must be at least 1, got 0"),
        ("--threads -1", "threads must be at least 1, got -1"),
        ("--minutes 0", "minutes must be positive, got 0.0"),
        ("--minutes nan", "minutes must be positive, got nan"),
        ("--device tpu", "device must be cpu or cuda, got 'tpu'"),
        ("--device cuda:99", "device 'cuda:99' cannot be used here: "),
        ("gpu", "the section 'gpu' needs --device cuda"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence_before_anything_is_built(
    arguments, message, tmp_path, capsys
):
    assert bench.main([*arguments.split(), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert bench.main(["--out", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_what_time_does_not_allow_is_named_and_not_measured():
    late = Bench(CPU, rounds=1, minutes=0)
    late.section = "updates"
    late.compare("t", {"a": lambda: None, "b": lambda: None}, size="20")
    assert not late.cases
    text = to_markdown(late, [Goal("g", "t", "20", over="a", under="b", at_least=1)], {}, [])
    assert "Left out: updates: t 20." in text
    assert "| g | at least 1 |  | not measured |" in text


def test_a_rival_that_cannot_run_is_named_and_left_out_and_ours_is_an_error():
    def broken():
        raise RuntimeError("no such kernel\nand a trace")

    one = Bench(CPU, rounds=1, quick=True)
    one.section = "steps"
    one.compare("t", {"ours": lambda: None, "theirs": Contender(broken, rival=True)})
    assert [*one.cases[0].rounds] == ["ours"]
    assert one.left_out == ["steps: t, theirs (no such kernel)"]
    with pytest.raises(RuntimeError, match="no such kernel"):
        one.compare("t", {"ours": broken})


def test_a_roofline_is_the_longer_of_bytes_and_operations():
    """10 bytes at 2 a second are 5 seconds, 9 operations at 3 a second 3."""
    device = Bench(CPU, rounds=1, quick=True, peaks=Peaks(bandwidth=2, flops=3))
    device.compare("t", {"a": lambda: None}, needs=Needs(10, 9))
    device.compare("t", {"a": lambda: None}, needs=Needs(2, 9))
    assert [case.roofline for case in device.cases] == [5, 3]
    assert "| roofline | 5 s | " in by_contender(device.cases[0])
    assert [line.split("|")[-2].strip() for line in by_size(device.cases).splitlines()[2:]] == [
        "5 s",
        "3 s",
    ]


def test_peaks_are_of_a_copy_and_a_product():
    found = peaks(CPU, elements=1 << 16, side=64)
    assert found.bandwidth > 1e7
    assert found.flops > 1e7


def test_a_step_moves_what_adam_and_a_soft_target_move():
    """By hand, DDPG of 2 observations, 1 action and 4 units: Q has 21 weights, the policy 17."""
    config = DDPGConfig(hidden=(4,))
    assert traffic("ddpg", 2, 1, config) == 4 * (7 + 3) * (21 + 17)
    assert traffic("dqn", 2, 3, DQNConfig(hidden=(4,))) == 4 * 7 * (12 + 15)
    # SAC has no target of the policy, which has two outputs an action; TD3's of two steps.
    assert traffic("sac", 2, 1, SACConfig(hidden=(4,))) == 4 * (10 * 2 * 21 + 7 * 22)
    assert traffic("td3", 2, 1, TD3Config(hidden=(4,))) == 4 * (10 * 2 * 2 * 21 + 10 * 17)


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
