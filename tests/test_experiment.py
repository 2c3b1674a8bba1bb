import dataclasses

import pytest
import torch

from agents.checkpoint import Checkpoints
from scripts.experiment import measurement
from scripts.experiment.jobs import Job
from scripts.experiment.life import CHECKPOINT, Run
from scripts.experiment.measurement import run
from tests.test_compare import TINY

DQN = Job("dqn", "CartPole-v1", (1,), **TINY)
TOGETHER = Job("dqn", "CartPole-v1", (3, 1), **TINY)
DDPG = Job("ddpg", "Pendulum-v1", (2,), **TINY)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


class Killed(BaseException):
    """Ends a run where it is."""


def run_until(step, job, out, **options):
    """Begin a job, or go on with it, and leave it at an environment step."""

    def kill(reached):
        if reached >= step:
            raise Killed

    with pytest.raises(Killed):
        run(job, out, kill, **options)


def checkpoint_folder(job, out):
    return out / job.run_names()[0] / CHECKPOINT


def resumed_at(job, out):
    """The steps at which a job went on."""
    file = out / job.run_names()[0] / "resumed.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    assert all(line.endswith(": exact") for line in lines)
    return [int(line.split()[3].removesuffix(":")) for line in lines]


def tables(job, out):
    """The evaluations of every seed, and whether its run says that it is finished."""
    folders = [out / name for name in job.run_names()]
    return [((f / "evaluations.csv").read_bytes(), (f / "finished.json").exists()) for f in folders]


@pytest.mark.parametrize("job", [TOGETHER, DDPG], ids=["dqn, seeds together", "ddpg"])
def test_a_run_that_is_killed_goes_on_with_the_same_numbers(job, tmp_path, monkeypatch):
    run(job, tmp_path / "whole")
    out = tmp_path / "killed"
    run_until(150, job, out)
    run_until(350, job, out)  # after evaluating at 300
    with monkeypatch.context() as patch:  # after evaluating at 400, before the checkpoint there

        def kill(*_):
            raise Killed

        patch.setattr(Run, "try_to_save", kill)
        with pytest.raises(Killed):
            run(job, out)
    run(job, out)
    assert resumed_at(job, out) == [100, 300, 300]
    assert tables(job, out) == tables(job, tmp_path / "whole")
    assert not checkpoint_folder(job, out).exists()


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(tmp_path):
    run(DQN, tmp_path / "whole")
    out = tmp_path / "killed"
    run_until(350, DQN, out)
    newest = max(checkpoint_folder(DQN, out).glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:-1])
    run(DQN, out)
    assert resumed_at(DQN, out) == [200]
    assert tables(DQN, out) == tables(DQN, tmp_path / "whole")


@pytest.mark.parametrize("what", ["settings", "commit", "checkpoints"])
def test_a_run_of_something_else_begins_anew(what, tmp_path, monkeypatch):
    run_until(350, DQN, tmp_path)
    job = DQN
    if what == "settings":
        job = dataclasses.replace(DQN, episodes=1)
    if what == "commit":
        monkeypatch.setattr(measurement, "commit", lambda: "another")
    if what == "checkpoints":
        for path in checkpoint_folder(DQN, tmp_path).glob("*.json"):
            path.write_text("{}")
    run(job, tmp_path)
    assert resumed_at(job, tmp_path) == []
    ((table, finished),) = tables(job, tmp_path)
    assert finished
    assert table.count(b",last,") == 5 * job.episodes + job.final_episodes


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Box2D's import
def test_where_resuming_is_not_exact_a_run_begins_anew(tmp_path):
    job = Job("dqn", "LunarLander-v3", (1,), **TINY)
    run_until(350, job, tmp_path)
    assert checkpoint_folder(job, tmp_path).exists()
    run(job, tmp_path)
    assert resumed_at(job, tmp_path) == []
    assert all(finished for _, finished in tables(job, tmp_path))


def test_a_checkpoint_that_cannot_be_written_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    def full(self, extra):
        raise OSError("no space left on device")

    monkeypatch.setattr(Checkpoints, "save", full)
    run(DQN, tmp_path)
    assert all(finished for _, finished in tables(DQN, tmp_path))
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == TINY["points"] - 1
    assert all(line.endswith("was not written: no space left on device") for line in warnings)
