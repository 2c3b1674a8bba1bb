"""A run is killed, loses its power, or meets a disk that fails, at every call that writes.

`make test` takes a sample. `make test-full` ends trainings at every point and jobs at every second
one, and lets every fifth call fail.
"""

import errno
import re
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents.checkpoint import newest
from scripts import train
from scripts.experiment import driver
from scripts.experiment.jobs import Job
from scripts.experiment.measurement import END, ending, run
from scripts.experiment.results import collect
from tests.disk import Disk, Fault, lay_out
from tests.test_checkpoint import assert_same

QUICK = "--total-steps 90 --eval-every 45 --eval-episodes 1 --log-every 30 --device cpu"
QUICK += " --hidden 4 --learning-starts 20 --batch-size 4 --checkpoint-every 30 --segments 8"
COMMANDS = {
    "dqn": f"dqn {QUICK} --train-every 2 --gradient-steps 1 --target-update-every 7",
    "sac": f"sac --env-id test/Brief-v0 {QUICK} --seeds 1,3 --together",
}
JOB = Job(
    "sac",
    "test/Brief-v0",
    (1, 3),
    total_steps=60,
    agent={"hidden": (4,), "batch_size": 4, "learning_starts": 20},
    points=3,
    episodes=1,
    final_episodes=1,
    capacity=20,
)
SAMPLE = 7
"""The sample has every seventh point."""
POINTS = pytest.mark.parametrize(
    "every", [SAMPLE, pytest.param(1, marks=pytest.mark.full)], ids=["sample", "all"]
)


class Brief(gym.Env):
    """Episodes of 4 steps, so that evaluations take no time."""

    observation_space = spaces.Box(-1, 1, (2,))
    action_space = spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.steps = self.np_random.uniform(-1, 1, 2).astype(np.float32), 0
        return self.state, {}

    def step(self, action):
        self.steps += 1
        self.state = np.clip(self.state + 0.1 * action, -1, 1).astype(np.float32)
        return self.state, float(self.state.sum()), False, self.steps == 4, {}


@pytest.fixture(scope="module", autouse=True)
def _environment():
    gym.register("test/Brief-v0", Brief)
    yield
    gym.registry.pop("test/Brief-v0")


def kept(folder):
    """What a run leaves that later commands read."""
    table = (folder / "evaluations.csv").read_bytes()
    return table, *(
        torch.load(folder / name, weights_only=True) for name in ("policy.pt", "timeline.pt")
    )


@pytest.fixture(scope="module", params=COMMANDS)
def trained(request, tmp_path_factory):
    """A command, the disk on which it ran without an accident, and what it left."""
    root = tmp_path_factory.mktemp(request.param)
    command = [*COMMANDS[request.param].split(), "--runs-dir", str(root / "runs")]
    with Disk(root).mounted() as disk:
        assert train.main(command) == 0
        disk.remember()
    folders = sorted((root / "runs").iterdir())
    return command[:-1], disk, [kept(folder) for folder in folders]


def folders_in(root):
    return sorted((root / "runs").iterdir()) if (root / "runs").exists() else []


def assert_ends_as_if_nothing_had_happened(folders, left):
    assert train.main(["--resume", str(folders[0])]) == 0
    assert len(folders) == len(left)
    for folder, whole in zip(folders, left, strict=True):
        assert_same(kept(folder), whole)
        assert not [*folder.rglob("*.partial")]


@POINTS
@pytest.mark.parametrize("how", ["killed", "lost"])
def test_a_run_that_ends_at_any_call_goes_on_to_the_same_bits_or_had_not_begun(
    how, every, trained, tmp_path, capsys
):
    _, disk, left = trained
    states = [*getattr(disk, how).values()]
    begun = False
    for number, state in enumerate(states):
        begun_here = any(re.fullmatch(r".*/checkpoint/\d+\.json", name) for name in state)
        if number % every and begun_here == begun:
            continue
        assert begun_here or not begun  # what was begun stays so
        begun = begun_here
        root = tmp_path / str(number)
        lay_out(state, root)
        folders = folders_in(root)
        if begun:
            assert_ends_as_if_nothing_had_happened(folders, left)
        elif folders:
            assert train.main(["--resume", str(folders[0])]) == 2
            assert "there is no checkpoint in" in capsys.readouterr().err
    assert begun
    print(f"{how} at {len(states)} points")


FAULTS = pytest.mark.parametrize(
    ("number", "stays"),
    [(errno.ENOSPC, True), (errno.EIO, False), (errno.EROFS, True)],
    ids=["full", "error", "read-only"],
)


@POINTS
@FAULTS
def test_a_disk_that_fails_at_any_call_costs_no_run_that_had_begun(
    number, stays, every, trained, tmp_path, capsys
):
    command, disk, left = trained
    codes = []
    rarely = (6 if number == errno.EROFS else 2) * every
    for at in range(1, len(disk.calls) + 1, 5 if every == 1 else rarely):
        root = tmp_path / str(at)
        root.mkdir()
        with Disk(root, Fault(at, number, stays=stays)).mounted():
            code = train.main([*command, str(root / "runs")])
        codes.append(code)
        err = capsys.readouterr().err
        assert "Traceback" not in err
        folders = folders_in(root)
        if number != errno.EROFS:  # where nothing can be removed either
            assert not [*root.rglob("*.partial")]
        if code == 2:  # it had not begun
            assert folders == [] or number == errno.EROFS
            assert "error: " in err
        elif code == 1:
            assert f"Go on: python -m scripts.train --resume {folders[0]}" in err
            assert_ends_as_if_nothing_had_happened(folders, left)
        else:
            assert code == 0
            for folder, whole in zip(folders, left, strict=True):
                assert_same(kept(folder), whole)
    assert {1, 2} <= {*codes} <= {0, 1, 2}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The disk on which a job was done without an accident, and the tables that it left."""
    out = tmp_path_factory.mktemp("out")
    with Disk(out).mounted() as disk:
        run(JOB, out)
        disk.remember()
    return disk, [(out / name / "evaluations.csv").read_bytes() for name in JOB.run_names()]


@POINTS
@pytest.mark.parametrize("how", ["killed", "lost"])
def test_a_job_that_ends_at_any_call_is_done_again_with_the_same_numbers(
    how, every, measured, tmp_path
):
    disk, tables = measured
    for number, state in enumerate([*getattr(disk, how).values()]):
        if number % (2 if every == 1 else every):
            continue
        out = tmp_path / str(number)
        lay_out(state, out)
        folders = [out / name for name in JOB.run_names()]
        for folder, table in zip(folders, tables, strict=True):
            if (folder / END).exists():  # what says that it has finished has
                assert ending(folder, JOB)
                assert (folder / "evaluations.csv").read_bytes() == table
        run(JOB, out)
        assert [(folder / "evaluations.csv").read_bytes() for folder in folders] == tables
        assert all(ending(folder, JOB) for folder in folders)


@POINTS
@FAULTS
def test_a_job_whose_disk_fails_at_any_call_ends_with_its_error_or_with_all_its_numbers(
    number, stays, every, measured, tmp_path
):
    disk, tables = measured
    ends = []
    for at in range(1, len(disk.calls) + 1, 7 if every == 1 else 7 * every):
        out = tmp_path / str(at)
        out.mkdir()
        try:
            with Disk(out, Fault(at, number, stays=stays)).mounted():
                run(JOB, out)
            ends.append(0)
        except OSError as error:
            ends.append(error.errno)
        folders = [out / name for name in JOB.run_names()]
        if ends[-1]:
            run(JOB, out)  # on a disk that is whole again
        assert [(folder / "evaluations.csv").read_bytes() for folder in folders] == tables
        assert all(ending(folder, JOB) for folder in folders)
        assert not [*out.glob("*/*.partial")]
    assert number in ends
    assert {*ends} <= {0, number}


@pytest.fixture
def compared(measured, tmp_path, monkeypatch):
    """What does the comparison of the job that was measured, whose process has ended at once."""
    disk, _ = measured

    def compare(out):
        assert driver.finished(JOB, out) or driver.execute([JOB], out, 1) == []
        collect(out)

    def prepared(name):
        out = tmp_path / name
        shutil.copytree(disk.root, out / "runs")
        return out

    monkeypatch.setattr(driver.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(driver, "start", lambda job, out: Done())
    return compare, prepared


class Done:
    """The process of a job that has ended."""

    def poll(self):
        return 0


def results_in(out):
    return {path.name: path.read_bytes() for path in (out / "results").iterdir()}


@pytest.mark.parametrize("how", ["killed", "lost"])
def test_a_driver_that_ends_at_any_call_is_followed_by_one_that_collects_everything(
    how, compared, tmp_path
):
    compare, prepared = compared
    out = prepared("whole")
    with Disk(out).mounted() as disk:
        driver.execute([JOB], out, 1)
        collect(out)
        disk.remember()
    whole = results_in(out)
    states = getattr(disk, how)
    assert len(states) > 10
    for number, state in enumerate(states.values()):
        lay_out(state, tmp_path / str(number))
        compare(tmp_path / str(number))
        assert results_in(tmp_path / str(number)) == whole
        assert not [*(tmp_path / str(number)).rglob("*.partial")]


@FAULTS
def test_a_driver_whose_disk_fails_at_any_call_leaves_the_results_that_were_there(
    number, stays, compared
):
    compare, prepared = compared
    out = prepared("out")
    with Disk(out).mounted() as disk:
        driver.execute([JOB], out, 1)
        collect(out)
    whole = results_in(out)
    errors = []
    for at in range(1, len(disk.calls) + 1):
        try:
            with Disk(out, Fault(at, number, stays=stays)).mounted():
                driver.execute([JOB], out, 1)
                collect(out)
        except OSError as error:
            errors.append(error.errno)
        assert whole.items() <= results_in(out).items()
        compare(out)
        assert results_in(out) == whole
    assert len(errors) > 10
    assert {*errors} == {number}


def test_the_checkpoint_of_a_killed_run_is_read_back_whole(trained):
    """What is enumerated above is a run of three checkpoints besides the first."""
    _, disk, _ = trained
    (folder,) = disk.root.glob("runs/*/checkpoint")
    assert newest(folder)[0].number == 4
    assert min(len(disk.calls), len(disk.killed)) > 100
