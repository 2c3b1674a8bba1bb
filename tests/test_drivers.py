"""One driver of a comparison at a time, and what becomes of it when it is killed or stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from scripts import compare, report
from scripts.experiment import driver
from scripts.experiment.jobs import plain, read_job, write_job
from scripts.experiment.life import CHECKPOINT
from scripts.experiment.locks import LOCK, Hold
from scripts.experiment.measurement import run
from tests.test_compare import tiny_jobs
from tests.test_experiment import run_until

ROOT = Path(__file__).parent.parent
RUNS = "--algo dqn --env-id CartPole-v1 --seeds 2 --total-steps 1000 --workers 1"
COMMAND = f"{RUNS} --agent.hidden 8 --agent.learning-starts 100".split()
FIRST, SECOND = "CartPole-v1__dqn__1", "CartPole-v1__dqn__2"


def statuses(out):
    about = json.loads((out / "results" / "runs.json").read_bytes())
    return [record["status"] for record in about["runs"]]


def test_a_second_driver_is_refused_before_it_writes_anything(tmp_path, capsys):
    with closing(Hold()) as hold:
        hold.take(tmp_path)
        assert compare.main([*COMMAND, "--out", str(tmp_path)]) == 2
    error = f"error: {tmp_path} is in use by another process ('{os.getpid()} on "
    assert capsys.readouterr().err.startswith(error)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_the_settings_that_a_run_ended_with_count_and_not_what_was_asked_for_meanwhile(tmp_path):
    """A driver was killed, and another asked for something else while the worker lived on."""
    job = tiny_jobs()[0]
    record = driver.job_file(job, tmp_path)
    run(job, tmp_path / "runs")
    write_job(replace(job, episodes=5), record)
    with pytest.raises(ValueError, match="has finished with other settings"):
        driver.finished(replace(job, episodes=5), tmp_path)
    assert driver.finished(job, tmp_path)
    assert plain(read_job(record)) == plain(job)


def test_each_run_of_a_job_is_asked_what_it_ended_with_and_not_the_first_alone(tmp_path):
    job = tiny_jobs()[0]
    run(job, tmp_path / "runs")
    together = replace(job, seeds=(job.seeds[0] + 1, *job.seeds))
    with pytest.raises(ValueError, match="has finished with other settings"):
        driver.finished(together, tmp_path)


def test_a_run_that_has_begun_is_not_begun_anew_with_other_settings(tmp_path):
    job = tiny_jobs()[0]
    other = replace(job, episodes=5)
    driver.prepare(job, tmp_path)
    assert not driver.finished(other, tmp_path)  # nothing was trained yet
    run_until(250, job, tmp_path / "runs")
    assert not driver.finished(job, tmp_path)
    with pytest.raises(ValueError, match="has other settings than asked for now"):
        driver.finished(other, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_driver_that_is_asked_to_stop_ends_its_processes_and_begins_no_more(number, tmp_path):
    was = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, was)  # not what the tests were begun with, such as nohup
    calls = []

    class Endless:
        def poll(self):
            return None

        def terminate(self):
            calls.append("terminate")
            signal.raise_signal(number)  # somebody presses again

        def wait(self):
            calls.append("wait")

    def begin(job, out):
        calls.append("begin")
        if len(calls) == 2:
            signal.raise_signal(number)
        return Endless()

    jobs = [replace(tiny_jobs()[0], seeds=(seed,)) for seed in range(5)]
    try:
        with pytest.raises(KeyboardInterrupt):
            driver.execute(jobs, tmp_path, 5, begin)
        handler = signal.getsignal(number)
    finally:
        signal.signal(number, before)
    assert calls == ["begin", "begin", "terminate", "terminate", "wait", "wait"]
    assert handler is was


def test_a_worker_that_was_interrupted_is_begun_again(tmp_path):
    codes = [130, -15, 0]

    class Process:
        def poll(self):
            return codes.pop(0)

    assert driver.execute(tiny_jobs()[:1], tmp_path, 1, lambda job, out: Process()) == []
    assert codes == []


@pytest.mark.parametrize("script", [compare, report])
def test_an_interrupt_at_any_time_is_a_word_and_a_code(script, tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "check", interrupt)
    monkeypatch.setattr(report, "write_report", interrupt)
    words = [*COMMAND, "--out", str(tmp_path)] if script is compare else [str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        script.main(words)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "Stopped.\n"


def start(out):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup would have it ignore
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "scripts.compare", *COMMAND, "--out", str(out)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
    finally:
        signal.signal(signal.SIGHUP, before)


def wait_for_a_checkpoint(out, name, process):
    """Wait until the run of a driver could go on if it were lost."""
    while not [*(out / "runs" / name / CHECKPOINT).glob("*.json")]:
        time.sleep(0.01)
        assert process.poll() is None


@pytest.mark.full
def test_a_driver_that_was_killed_is_followed_by_one_that_waits_for_its_worker(tmp_path, capsys):
    command = [*COMMAND, "--out", str(tmp_path)]
    first = start(tmp_path)
    wait_for_a_checkpoint(tmp_path, FIRST, first)
    orphan = int((tmp_path / "runs" / FIRST / LOCK).read_text().split()[0])
    os.kill(orphan, signal.SIGSTOP)  # so that the next one meets it
    assert compare.main(command) == 2
    assert "is in use by another process" in capsys.readouterr().err
    first.kill()
    first.wait()
    second = start(tmp_path)
    waits = tmp_path / "jobs" / f"{FIRST}.stderr.txt"
    while not (waits.exists() and waits.read_text().startswith("waiting: ")):
        time.sleep(0.01)
        assert second.poll() is None
    os.kill(orphan, signal.SIGCONT)
    wait_for_a_checkpoint(tmp_path, SECOND, second)
    second.send_signal(signal.SIGHUP)
    assert second.wait() == 130
    assert statuses(tmp_path) == ["finished", "not run"]
    with closing(Hold()) as hold:
        hold.take(tmp_path / "runs" / SECOND)  # its worker has ended too
    assert compare.main(command) == 0
    assert statuses(tmp_path) == ["finished", "finished"]
    assert not (tmp_path / "runs" / FIRST / "resumed.txt").exists()  # it was done once
    assert (tmp_path / "runs" / SECOND / "resumed.txt").read_text().endswith(": exact\n")
