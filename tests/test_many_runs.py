"""What a comparison costs grows with its runs and not faster, however many share a folder."""

import hashlib
import json
import sys
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from scripts import compare, report
from scripts.experiment import stats
from scripts.experiment.driver import execute, job_file
from scripts.experiment.jobs import Job, plain
from scripts.experiment.measurement import END
from scripts.experiment.run_folder import HEADER, TABLE
from scripts.experiment.tidy import read_results, read_runs

COMMAND = "--algo dqn --env-id CartPole-v1 --total-steps 600 --agent.learning-starts 100"
CALLS = Counter()
COUNTING = []


def count(event, arguments):
    if COUNTING and event in ("open", "os.listdir", "os.scandir"):
        CALLS[event] += 1


sys.addaudithook(count)  # for good: Python cannot remove one


@pytest.fixture
def calls():
    """What is opened and listed, as long as the test runs."""
    COUNTING.append(True)
    yield CALLS
    COUNTING.clear()
    CALLS.clear()


def finished_runs(out, number):
    """Lay out so many runs as if they had ended."""
    agent = {"learning_starts": 100}
    jobs = [Job("dqn", "CartPole-v1", (i,), total_steps=600, agent=agent) for i in range(number)]
    (out / "jobs").mkdir(parents=True)
    for job in jobs:
        folder = out / "runs" / job.run_names()[0]
        folder.mkdir(parents=True)
        rows = HEADER
        for scheme in ("last", "tail25"):
            rows += f"600,{scheme},0,{9.0 + job.seeds[0] % 7},9\r\n".encode()
        end = {"job": plain(job), "rows": 2, "sha256": hashlib.sha256(rows).hexdigest()}
        (folder / TABLE).write_bytes(rows)
        (folder / END).write_text(json.dumps(end))
        job_file(job, out).write_text(json.dumps(plain(job)))
        (folder / "averages").mkdir()
        (folder / "lock").touch()
    return f"{COMMAND} --first-seed 0 --seeds {number} --out {out}".split()


@pytest.mark.parametrize("number", [300, pytest.param(10_000, marks=pytest.mark.full)])
def test_what_is_opened_grows_with_the_runs_and_what_is_listed_does_not(number, tmp_path, calls):
    seen = []
    for size in (100, number):
        command = finished_runs(tmp_path / str(size), size)
        calls.clear()
        assert compare.main(command) == 0  # which finds all finished, and collects
        seen.append(calls.copy())
        files = [tmp_path / str(size) / "results" / "results.csv.gz"]
        calls.clear()
        (stratum,) = read_results(files)
        runs, _ = read_runs(files)
        assert len(stratum.runs) == len(runs) == size
        assert calls["open"] < 10
    few, many = seen
    each = (many["open"] - few["open"]) / (number - 100)
    assert each <= 7.1
    assert many["os.scandir"] <= few["os.scandir"]
    assert many["os.listdir"] <= few["os.listdir"]


class Waits:
    """A process that ends after the driver has looked a few times."""

    def __init__(self):
        self.looks = 0

    def poll(self):
        self.looks += 1
        return 0 if self.looks == 3 else None


def test_a_driver_reads_the_progress_of_each_of_many_jobs_once_a_look(tmp_path, calls):
    jobs = [Job("dqn", "CartPole-v1", (i,), total_steps=600) for i in range(50)]
    begun = []

    def begin(job, out):
        begun.append(Waits())
        if len(begun) == len(jobs):
            calls.clear()
        return begun[-1]

    assert execute(jobs, tmp_path, len(jobs), begin) == []
    assert calls["open"] <= 3 * len(jobs) + 10


@pytest.fixture
def memory():
    """The most memory that was taken since, in bytes."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


@pytest.mark.parametrize("runs", [20, 10_000])
def test_statistics_of_many_runs_take_no_more_memory_than_those_of_few(runs, memory):
    x = np.random.default_rng(0).standard_normal((runs, 20)).cumsum(axis=1)
    stats.simultaneous_band(x, draws=100)
    assert 0 < stats.sign_flip_p(x[:, 0], flips=2_000) <= 1
    assert memory() < 400e6


def test_the_band_of_many_runs_is_that_of_as_many_gaussian_curves():
    x = np.random.default_rng(0).standard_normal((101, 20)).cumsum(axis=1)
    band = stats.simultaneous_band(x, draws=10_000)
    w = x - x.mean(axis=0)
    w /= np.linalg.norm(w, axis=0)  # [N, P]
    null = np.random.default_rng(1).standard_normal((3_000, 101, 101)) @ w
    t = np.abs(null.mean(axis=1)) / (null.std(axis=1, ddof=1) / np.sqrt(101))
    half = np.quantile(t.max(axis=-1), 0.95) * x.std(axis=0, ddof=1) / np.sqrt(101)
    np.testing.assert_allclose((band.high - band.low) / 2, half, rtol=0.05)


def test_a_report_of_a_thousand_runs_is_written(tmp_path):
    command = finished_runs(tmp_path / "out", 1_000)
    assert compare.main(command) == 0
    assert report.main([str(tmp_path / "out" / "results"), "--out", str(tmp_path / "report")]) == 0
    assert "DQN CartPole-v1 (1000 runs)" in (tmp_path / "report" / "report.md").read_text()
