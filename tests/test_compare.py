import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from math import nan
from pathlib import Path

import pytest
import torch

from scripts import compare, report
from scripts.experiment import driver, results
from scripts.experiment.baseline import random_score
from scripts.experiment.jobs import Job, Options, from_plain, plain, plan
from scripts.experiment.measurement import run
from scripts.experiment.schemes import SCHEMES
from scripts.experiment.study import CELLS
from tests.test_terminal import Dead

TINY = {
    "total_steps": 600,
    "agent": {
        "hidden": (8, 8),
        "batch_size": 8,
        "learning_starts": 100,
        "train_every": 4,
        "gradient_steps": 1,
    },
    "points": 6,
    "episodes": 2,
    "final_episodes": 3,
}


def rows(out):
    with gzip.open(out / "results" / "results.csv.gz", "rt", newline="") as file:
        return list(csv.DictReader(file))


def test_the_tiers_are_those_of_the_protocol():
    small = plan(Options(tier="s"))
    assert [(job.algo, job.env_id, job.seeds) for job in small] == [
        ("dqn", "CartPole-v1", (1,)),
        ("dqn", "CartPole-v1", (2,)),
        ("ddpg", "Pendulum-v1", (1,)),
    ]
    medium = plan(Options(tier="m"))
    assert len([job for job in medium if job.env_id == "CartPole-v1"]) == 20
    assert {job.total_steps for job in plan(Options(tier="l"))} == {1_000_000}


def test_seeds_are_grouped_and_counted_from_the_first():
    options = Options(algo="sac", env_id="Pendulum-v1", seeds=5, first_seed=11, together=2)
    assert [job.seeds for job in plan(options)] == [(11, 12), (13, 14), (15,)]


def test_a_learning_rate_that_falls_is_a_variant():
    (job,) = plan(Options(algo="sac", env_id="Pendulum-v1", seeds=1, lr_decay="linear"))
    assert (job.variant, job.lr_decay) == ("lr=linear", "linear")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(), "either --tier or both"),
        (Options(tier="s", algo="dqn", env_id="CartPole-v1"), "either --tier or both"),
        (Options(algo="dqn"), "either --tier or both"),
        (Options(algo="ppo", env_id="CartPole-v1"), "algo must be one of"),
        (Options(tier="s", workers=0), "workers must be at least 1, got 0"),
        (Options(tier="m", reference_score=1.0), "are for --algo and --env-id, not for --tier"),
        (Options(tier="study", wrap=("a:B",)), "are for --algo and --env-id, not for --tier"),
        (Options(algo="sac", env_id="Pendulum-v1", random_score=1), "needs reference-score beside"),
        (
            Options(algo="sac", env_id="Pendulum-v1", random_score=1, reference_score=1),
            "must differ, got 1 twice",
        ),
        (Options(algo="sac", env_id="Pendulum-v1", reference_score=nan), "must be finite"),
    ],
)
def test_contradictory_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan(options)


def test_the_study_is_its_cells_in_order_and_takes_no_other_settings():
    jobs = plan(Options(tier="study", workers=1))
    assert sum(len(job.seeds) for job in jobs) == sum(cell.runs for cell in CELLS) == 298
    assert [(job.env_id, job.variant, job.seeds) for job in jobs[:3]] == [
        ("CartPole-v1", "", tuple(range(201, 221))),
        ("LunarLander-v3", "", (201, 202, 203, 204)),
        ("LunarLander-v3", "", (205, 206, 207, 208)),
    ]
    assert {min(job.seeds) for job in jobs if job.variant} == {201}
    rates = {job.variant: job.agent_config().learning_rate for job in jobs if job.variant}
    assert rates["lr=x0.25"] * 8 == rates["lr=x2"] == 2 * jobs[0].agent_config().learning_rate
    soft = next(job.agent_config() for job in jobs if job.variant == "target=soft:0.0155")
    assert (1 - soft.tau) / soft.tau == pytest.approx((128 - 1) / 2)
    names = [name for job in jobs for name in job.run_names()]
    assert len(set(names)) == 298
    last = jobs[-10:]
    assert {(job.algo, job.env_id, job.steps()) for job in last} == {
        ("ppo", "LunarLander-v3", 300_000)
    }
    assert [job.seeds for job in last] == [(seed,) for seed in range(201, 211)]
    with pytest.raises(ValueError, match="the registered study fixes seeds"):
        plan(Options(tier="study", seeds=5))


def test_a_run_evaluates_every_scheme_on_common_episodes(tmp_path):
    agent = {**TINY["agent"], "train_every": 1}
    job = Job("ddpg", "Pendulum-v1", (3,), **{**TINY, "agent": agent, "points": 20})
    torch.set_num_threads(1)
    run(job, tmp_path)
    with (tmp_path / "Pendulum-v1__ddpg__3" / "evaluations.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    steps = sorted({int(row["step"]) for row in found})
    assert steps == list(range(30, 601, 30))
    counts = {
        (scheme, step): sum(r["scheme"] == scheme and int(r["step"]) == step for r in found)
        for scheme in SCHEMES
        for step in steps
    }
    episodes = {"always": [2] * 19, "late": [0] * 15 + [2] * 4, "end": [0] * 19}
    for name, scheme in SCHEMES.items():
        assert [counts[name, step] for step in steps] == [*episodes[scheme.when], 3]

    def returns(scheme, step):
        return [
            float(r["return"]) for r in found if (r["scheme"], r["step"]) == (scheme, str(step))
        ]

    # before any gradient step all schemes are one policy, on the same episodes
    assert returns("last", 90) == returns("tail25", 90) == returns("tail50", 90)
    # a checkpoint is the iterate of then; the episodes of the end begin with those of then
    for percent in (75, 80, 85, 90, 95):
        assert returns(f"checkpoint{percent}", 600)[:2] == returns("last", 6 * percent)
    # the placebo plays other episodes
    assert returns("placebo", 600) != returns("last", 600)


def execute(out, jobs):
    out.mkdir(exist_ok=True)
    failed = driver.execute(jobs, out, workers=2)
    results.collect(out)
    return failed


def tiny_jobs():
    return [Job("dqn", "CartPole-v1", (seed,), **TINY) for seed in (1, 2)]


def test_a_killed_worker_changes_no_number(tmp_path, monkeypatch):
    assert execute(tmp_path / "whole", tiny_jobs()) == []
    started, start = [], driver.start

    def start_and_remember(job, out):
        process = start(job, out)
        started.append(process)
        if len(started) == 1:
            threading.Thread(target=kill_midway, args=(process, job, out)).start()
        return process

    def kill_midway(process, job, out):
        while driver.reached(job, out) < 250 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)

    monkeypatch.setattr(driver, "start", start_and_remember)
    assert execute(tmp_path / "killed", tiny_jobs()) == []
    assert len(started) == 3
    assert started[0].returncode == -signal.SIGKILL
    whole, killed = (tmp_path / name / "results" for name in ("whole", "killed"))
    assert (whole / "results.csv.gz").read_bytes() == (killed / "results.csv.gz").read_bytes()


def test_a_run_that_crashes_is_reported_and_not_dropped(tmp_path):
    wrong = Job("dqn", "CartPole-v1", (1,), **{**TINY, "agent": {"gamma": 2.0}})
    out = tmp_path / "out"
    assert execute(out, [wrong]) == [wrong]
    (record,) = json.loads((out / "results" / "runs.json").read_text())["runs"]
    assert record["status"] == "crashed"
    errors = (out / "jobs" / "CartPole-v1__dqn__1.stderr.txt").read_text()
    assert "gamma must be in [0.0, 1.0], got 2.0" in errors


def test_finished_runs_are_not_done_again_and_other_settings_are_refused(tmp_path):
    out = tmp_path / "out"
    job = tiny_jobs()[0]
    assert not driver.finished(job, out)
    execute(out, [job])
    assert driver.finished(job, out)
    other = Job("dqn", "CartPole-v1", (1,), **{**TINY, "episodes": 5})
    with pytest.raises(ValueError, match="other settings"):
        driver.finished(other, out)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--algo dqn --env-id CartPol-v1", "cannot make the environment 'CartPol-v1'"),
        ("--algo sac --env-id CartPole-v1", "sac needs actions in a one-dimensional Box"),
        ("--algo sac --env-id Pendulum-v1 --total-steps 60", "learning starts after 100 steps"),
        ("--algo dqn --env-id CartPole-v1 --seeds 0", "seeds must be at least 1, got 0"),
        ("--algo dqn --env-id CartPole-v1 --first-seed -4", "first-seed must be at least 0"),
        ("--agent.gamma 0.9 --env-id CartPole-v1", "--agent.* needs --algo, which is one of dqn"),
    ],
)
def test_what_can_be_known_is_said_before_anything_is_begun(command, message, tmp_path, capsys):
    assert compare.main([*command.split(), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("algo", "shown"), [([], False), (["--algo", "dqn"], True)])
def test_the_help_shows_the_settings_of_an_algorithm_that_is_named(algo, shown, capsys):
    with pytest.raises(SystemExit, match="0"):
        compare.main([*algo, "--help"])
    options = capsys.readouterr().out.partition("options")[2]
    assert ("--agent.learning-rate" in options) == shown
    assert "--agent {" not in options


def test_output_that_cannot_be_shown_ends_no_comparison(tmp_path, monkeypatch):
    begun = []

    class Done:
        def poll(self):
            return 0

    monkeypatch.setattr(driver, "start", lambda job, out: begun.append(job) or Done())
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, Dead(OSError(5, "gone")))
    command = ["--algo", "dqn", "--env-id", "CartPole-v1", "--seeds", "2.0"]
    assert compare.main([*command, "--total-steps", "2e3", "--out", str(tmp_path)]) == 0
    assert [job.total_steps for job in begun] == [2000, 2000]
    assert (tmp_path / "results" / "runs.json").exists()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"algo": 1}'])
def test_a_damaged_file_of_a_job_is_named_and_written_again(damage, tmp_path, capsys):
    execute(tmp_path, tiny_jobs()[:1])
    whole = (tmp_path / "results" / "results.csv.gz").read_bytes()
    record = driver.job_file(tiny_jobs()[0], tmp_path)
    written = record.read_bytes()
    record.write_bytes(damage)
    results.collect(tmp_path)
    assert f"warning: {record} is damaged: " in capsys.readouterr().err
    assert driver.finished(tiny_jobs()[0], tmp_path)
    assert record.read_bytes() == written
    results.collect(tmp_path)
    assert (tmp_path / "results" / "results.csv.gz").read_bytes() == whole


def test_results_are_collected_of_whole_runs_only(tmp_path):
    execute(tmp_path, tiny_jobs())
    first, second = tiny_jobs()
    table = tmp_path / "runs" / first.run_names()[0] / "evaluations.csv"
    table.write_bytes(table.read_bytes()[: table.stat().st_size // 2])
    results.collect(tmp_path)
    assert {row["run"] for row in rows(tmp_path)} == {*second.run_names()}
    runs = json.loads((tmp_path / "results" / "runs.json").read_text())["runs"]
    assert [run["status"] for run in runs] == ["damaged", "finished"]


def test_the_smallest_tier_runs_to_its_report(tmp_path):
    assert compare.main(["--tier", "s", "--out", str(tmp_path)]) == 0
    table = rows(tmp_path)
    assert {row["env"] for row in table} == {"CartPole-v1", "Pendulum-v1"}
    assert set(table[0]) == set(results.COLUMNS)
    assert report.main([str(tmp_path / "results"), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "DQN CartPole-v1 (2 runs): **too few runs**" in text
    assert "DDPG Pendulum-v1 (1 run): **too few runs**" in text
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000


MY_MODULE = """
import gymnasium as gym, numpy as np

class Mine(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-2, 4, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(2, np.float32), float(action[0]), False, self.t == 10, {}

class Half(gym.RewardWrapper):
    def reward(self, reward):
        return reward / 2

gym.register("My-v0", Mine)
"""


@pytest.fixture
def my_module(tmp_path):
    """An environment of a user's own, in the folder that the command is given from."""
    (tmp_path / "my_module.py").write_text(MY_MODULE)
    return tmp_path


def compared(folder, command):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    words = [sys.executable, "-m", "scripts.compare", *command.split(), "--out", "out"]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


def test_an_environment_of_ones_own_is_compared_from_any_folder_with_settings_and_scores(my_module):
    command = (
        "--env-id my_module:My-v0 --algo sac --wrap my_module:Half --total-steps 200 --seeds 1"
    )
    command += " --agent.learning-rate 1e-3 --agent.hidden 8 --agent.batch-size 8"
    done = compared(my_module, command + " --random-score -1200 --reference-score -150")
    assert done.returncode == 0, done.stderr
    about = json.loads((my_module / "out" / "results" / "runs.json").read_text())
    assert about["scores"] == {"my_module:My-v0": [-1200, -150]}
    (job,) = (json.loads(path.read_text()) for path in (my_module / "out/jobs").glob("*.json"))
    assert job["agent"] == {"learning_rate": 1e-3, "batch_size": 8, "hidden": [8]}
    assert job["wrap"] == ["my_module:Half"]
    results.collect(my_module / "out")  # without scores, which stay
    about = json.loads((my_module / "out" / "results" / "runs.json").read_text())
    assert about["scores"] == {"my_module:My-v0": [-1200, -150]}


def test_a_class_that_is_not_registered_gets_a_hint(my_module):
    done = compared(my_module, "--env-id my_module:Mine --algo sac")
    assert done.returncode == 2
    assert 'write gymnasium.register("Mine-v0", Mine) into my_module.py' in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_random_score_is_that_of_uniform_actions_and_always_the_same(my_module, monkeypatch):
    monkeypatch.syspath_prepend(str(my_module))
    whole = random_score("sac", "my_module:My-v0")
    assert whole == random_score("sac", "my_module:My-v0")
    assert whole == pytest.approx(10 * 1, abs=4 * (6 / 12**0.5) * (10 / 100) ** 0.5)  # 4 sigma
    half = random_score("sac", "my_module:My-v0", ("my_module:Half",))
    assert half == pytest.approx(whole / 2)


def test_jobs_of_before_there_were_wrappers_can_be_read():
    job = Job("sac", "Pendulum-v1", (1, 2))
    older = {key: value for key, value in plain(job).items() if key != "wrap"}
    assert from_plain(older) == job
    wrapped = Job("sac", "Pendulum-v1", (1,), wrap=("a:B",))
    assert from_plain(plain(wrapped)) == wrapped
