import csv
import gzip
import json
import signal
import threading
import time

import numpy as np
import pytest
import torch

from scripts import compare, report
from scripts.compare import Options, plan
from scripts.experiment import CORE, Job, run

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


def test_the_target_study_matches_the_mean_ages():
    jobs = plan(Options(algo="dqn", env_id="CartPole-v1", seeds=1, targets=True))
    assert [job.variant for job in jobs[:2]] == ["target=hard:32", "target=soft:0.06061"]
    hard, soft = (job.agent_config() for job in jobs[:2])
    assert (hard.target, hard.target_update_every, soft.target) == ("hard", 32, "soft")
    mean_age = (1 - soft.tau) / soft.tau
    assert mean_age == pytest.approx((hard.target_update_every - 1) / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(), "either --tier or both"),
        (Options(tier="s", algo="dqn", env_id="CartPole-v1"), "either --tier or both"),
        (Options(algo="dqn"), "either --tier or both"),
        (Options(algo="ppo", env_id="CartPole-v1"), "algo must be one of"),
        (Options(tier="s", workers=0), "workers must be at least 1, got 0"),
        (Options(algo="sac", env_id="Pendulum-v1", targets=True), "target-network study is of dqn"),
    ],
)
def test_contradictory_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan(options)


def test_a_run_evaluates_every_scheme_on_common_episodes(tmp_path):
    job = Job("ddpg", "Pendulum-v1", (3,), **{**TINY, "agent": {**TINY["agent"], "train_every": 1}})
    torch.set_num_threads(1)
    run(job, tmp_path)
    with (tmp_path / job.run_names()[0] / "evaluations.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    steps = sorted({int(row["step"]) for row in found})
    assert steps == [100, 200, 300, 400, 500, 600]
    counts = {
        (scheme, step): sum(r["scheme"] == scheme and int(r["step"]) == step for r in found)
        for scheme in {row["scheme"] for row in found}
        for step in steps
    }
    for scheme in CORE:
        assert [counts[scheme, step] for step in steps] == [2, 2, 2, 2, 2, 3]
    for scheme in ("suffix90", "ema0.1", "power6.94", "lawa", "target"):
        assert [counts[scheme, step] for step in steps] == [0, 2, 2, 2, 2, 2]
    for scheme in ("placebo", "best"):
        assert [counts[scheme, step] for step in steps] == [0, 2, 2, 2, 2, 3]
    assert counts["line0.25", 600] == 2

    def returns(scheme, step):
        return [
            float(r["return"]) for r in found if (r["scheme"], r["step"]) == (scheme, str(step))
        ]

    # before any gradient step all schemes are one policy, on the same episodes
    assert returns("last", 100) == returns("uniform0", 100) == returns("ema1", 100)
    # the line begins at the last weights and ends at the average's
    assert returns("line0", 600) == returns("last", 600)[:2]
    np.testing.assert_allclose(returns("line1", 600), returns("suffix50", 600)[:2], rtol=1e-6)
    # the placebo plays other episodes
    assert returns("placebo", 600) != returns("last", 600)


def execute(out, jobs):
    out.mkdir(exist_ok=True)
    failed = compare.execute(jobs, out, workers=2)
    compare.collect(out)
    return failed


def tiny_jobs():
    return [Job("dqn", "CartPole-v1", (seed,), **TINY) for seed in (1, 2)]


def test_a_killed_worker_changes_no_number(tmp_path, monkeypatch):
    assert execute(tmp_path / "whole", tiny_jobs()) == []
    started, start = [], compare.start

    def start_and_remember(job, out):
        process = start(job, out)
        started.append(process)
        if len(started) == 1:
            threading.Thread(target=kill_midway, args=(process, job, out)).start()
        return process

    def kill_midway(process, job, out):
        while compare.reached(job, out) < 250 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)

    monkeypatch.setattr(compare, "start", start_and_remember)
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
    assert not compare.finished(job, out)
    execute(out, [job])
    assert compare.finished(job, out)
    other = Job("dqn", "CartPole-v1", (1,), **{**TINY, "episodes": 5})
    with pytest.raises(SystemExit, match="other settings"):
        compare.finished(other, out)


def test_the_smallest_tier_runs_to_its_report(tmp_path):
    assert compare.main(["--tier", "s", "--out", str(tmp_path)]) == 0
    table = rows(tmp_path)
    assert {row["env"] for row in table} == {"CartPole-v1", "Pendulum-v1"}
    assert set(table[0]) == set(compare.COLUMNS)
    report.main([str(tmp_path / "results"), "--out", str(tmp_path / "report")])
    text = (tmp_path / "report" / "report.md").read_text()
    assert "CartPole-v1" in text
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
