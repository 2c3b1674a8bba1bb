import collections
import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from torch import nn

from polyak_rl import Timeline
from scripts import compare
from scripts.experiment import driver, ppo, results
from scripts.experiment.jobs import Job, Options, plan
from scripts.experiment.locks import Hold
from scripts.experiment.measurement import run
from scripts.experiment.schemes import SCHEMES, TARGET, rules_of
from tests.test_compare import TINY, rows
from tests.test_experiment import run_until, tables

SMALL = {"n_envs": 2, "n_steps": 16, "batch_size": 16, "n_epochs": 2}
JOB = Job("ppo", "CartPole-v1", (3,), **{**TINY, "agent": SMALL, "points": 20})


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def form(table):
    """How often each scheme was played at each step."""
    return collections.Counter((row["scheme"], row["step"]) for row in table)


def test_a_ppo_job_leaves_rows_of_the_form_of_all_others(tmp_path):
    dqn = dataclasses.replace(JOB, algo="dqn", agent=TINY["agent"])
    for job in (JOB, dqn):
        out = tmp_path / job.algo
        out.mkdir()
        assert driver.execute([job], out, workers=1) == []
        results.collect(out)
    found, others = rows(tmp_path / "ppo"), rows(tmp_path / "dqn")
    assert found[0].keys() == others[0].keys()
    assert {(row["env"], row["algo"], row["seed"]) for row in found} == {
        ("CartPole-v1", "ppo", "3")
    }
    assert form(found) == form(others)
    assert {row["scheme"] for row in found} == SCHEMES.keys() - {TARGET.name}
    (record,) = json.loads((tmp_path / "ppo" / "results" / "runs.json").read_text())["runs"]
    assert record["status"] == "finished"
    assert record["config"]["n_steps"] == 16
    assert 0 < record["evaluating"] < record["seconds"]


def test_a_measured_run_trains_as_learn_does_and_a_point_is_the_model_of_then(tmp_path):
    measure = ppo.set_up(JOB, [tmp_path], Hold())
    measure.go(lambda step: None)
    trained = measure.training
    updates = trained.averages.clock
    assert (trained.step, updates) == (608, trained.total_updates)  # 19 rollouts of 32
    assert updates == 19 * 2 * 2
    settings = {**vars(JOB.agent_config())}
    envs = make_vec_env("CartPole-v1", settings.pop("n_envs"), seed=3)
    model = PPO("MlpPolicy", envs, seed=3, device="cpu", **settings).learn(600)
    plain = model.policy.state_dict()
    for name, tensor in trained.model.policy.state_dict().items():
        assert torch.equal(tensor, plain[name])
    envs = make_vec_env("CartPole-v1", 2, seed=3)
    then = PPO("MlpPolicy", envs, seed=3, device="cpu", **settings).learn(600 * 80 // 100)
    for name, tensor in measure.checkpoints["checkpoint80"].items():
        assert torch.equal(tensor, then.policy.state_dict()[name])
    measure.run.close()


def test_a_ppo_run_that_is_killed_begins_anew_with_the_same_numbers(tmp_path):
    run(JOB, tmp_path / "whole", set_up=ppo.set_up)
    run_until(350, JOB, tmp_path / "killed", set_up=ppo.set_up)
    run(JOB, tmp_path / "killed", set_up=ppo.set_up)
    assert tables(JOB, tmp_path / "killed") == tables(JOB, tmp_path / "whole")


def test_averages_play_in_their_own_right_and_leave_the_model_alone(tmp_path):
    trained = ppo.set_up(JOB, [tmp_path], Hold()).training
    trained.advance()
    before = {n: x.clone() for n, x in trained.model.policy.state_dict().items()}
    left = {n: torch.zeros_like(x) for n, x in before.items()}
    left["action_net.bias"] = torch.tensor([1.0, 0.0])  # always the first action
    seeds = np.arange(4)[None]
    last, pushed = trained.play({"last": before, "left": left}, seeds).values()
    assert (pushed.lengths < 13).all()
    assert pushed.lengths.tolist() != last.lengths.tolist()
    for name, tensor in trained.model.policy.state_dict().items():
        assert torch.equal(tensor, before[name])
    trained.close()


def test_the_registered_timeline_is_fine_enough_for_every_scheme():
    (cell, *_) = (job for job in plan(Options(tier="study")) if job.algo == "ppo")
    c = cell.agent_config()
    each = c.n_epochs * c.n_envs * c.n_steps // c.batch_size
    rollouts = -(-cell.steps() // (c.n_envs * c.n_steps))
    assert (each, rollouts) == (1024, 19)
    timeline = Timeline(nn.Linear(1, 1), capacity=cell.capacity)
    worst = {}
    for clock in range(1, each * rollouts + 1):
        timeline.record()
        done = clock // each
        if clock % each == 0 and done >= 15:  # the rollouts of the points from 80 % on
            due = {"always", "late", *["end"] * (done == rollouts)}
            for name, rule in rules_of(SCHEMES.values(), each * rollouts).items():
                if SCHEMES[name].when in due and name != "ema1":  # which the bank has
                    worst[name] = max(worst.get(name, 0), timeline.weight_error(rule))
    assert worst.keys() == {name for name, s in SCHEMES.items() if s.rule} - {"ema1"}
    assert max(worst.values()) < 0.02


@pytest.mark.parametrize(
    "change", [{"seeds": (1, 2)}, {"wrap": ("a:B",)}, {"lr_decay": "linear"}], ids=str
)
def test_what_ppo_jobs_cannot_do_is_refused_before_anything_is_removed(tmp_path, change):
    (tmp_path / "kept").touch()
    job = dataclasses.replace(JOB, **change)
    with pytest.raises(ValueError, match="a job of PPO has one seed, no wrapper and a constant"):
        ppo.set_up(job, [tmp_path] * len(job.seeds), Hold())
    assert (tmp_path / "kept").exists()


def test_a_study_without_stable_baselines3_ends_before_its_first_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    monkeypatch.delitem(sys.modules, "scripts.experiment.ppo")
    monkeypatch.setattr(compare, "check", lambda jobs: None)
    assert compare.main(["--tier", "study", "--out", str(tmp_path)]) == 2
    said = "cell 12 needs Stable-Baselines3: pip install -c constraints.txt --group sb3"
    assert capsys.readouterr().err == f"error: {said}\n"
    assert not [*tmp_path.iterdir()]
