import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from scripts import train
from scripts.experiment import driver, locks
from scripts.experiment.jobs import Job
from scripts.experiment.locks import LOCK, HeldError, Hold
from scripts.experiment.measurement import END, ending, run
from tests.test_compare import TINY, tiny_jobs
from tests.test_resume import COMMAND

ROOT = Path(__file__).parent.parent
HOLDER = """
import sys
from pathlib import Path
from scripts.experiment.locks import Hold
hold = Hold()
hold.take(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds a folder until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_has_one_writer_who_is_named_and_is_free_when_that_one_is_killed(
    holder, tmp_path, capsys, monkeypatch
):
    message = rf"is in use by another process \('{holder.pid} on .*'\)"
    with closing(Hold()) as hold, pytest.raises(HeldError, match=message):
        hold.take(tmp_path)
    monkeypatch.setattr(locks, "POLL", 0.01)
    threading.Timer(0.1, holder.kill).start()
    with closing(Hold()) as hold:
        hold.take(tmp_path, wait=True)
        hold.check()
    assert capsys.readouterr().err.count("waiting: ") == 1


@pytest.mark.parametrize("how", ["deleted", "moved", "another", "another with a lock"])
def test_a_folder_that_is_not_the_one_that_was_taken_is_noticed(how, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with closing(Hold()) as hold:
        hold.take(folder)
        hold.check()
        if how == "moved":
            folder.rename(tmp_path / "away")
        else:
            shutil.rmtree(folder)
        if "another" in how:
            folder.mkdir()
        if "lock" in how:
            (folder / LOCK).touch()
        with pytest.raises(FileNotFoundError, match="the folder was deleted, moved or replaced"):
            hold.check()


def test_a_lock_that_was_removed_is_made_anew_unless_another_has_the_folder_since(tmp_path):
    with closing(Hold()) as hold, closing(Hold()) as other:
        hold.take(tmp_path)
        (tmp_path / LOCK).unlink()
        hold.check()
        with pytest.raises(HeldError):
            other.take(tmp_path)
        (tmp_path / LOCK).unlink()
        other.take(tmp_path)
        with pytest.raises(HeldError, match="is in use by another process"):
            hold.check()


def test_whoever_takes_a_folder_removes_what_a_killed_writer_left_half_written(tmp_path):
    (tmp_path / "policy.pt.0123456789abcdef.partial").touch()
    (tmp_path / "film.partial").touch()
    with closing(Hold()) as hold:
        hold.take(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {LOCK, "film.partial"}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP])
def test_where_locks_cannot_be_had_that_is_said_once_and_the_run_goes_on(
    number, tmp_path, monkeypatch, capsys
):
    def refuse(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    assert train.main([*COMMAND, "--seeds", "1,2", "--together", "--runs-dir", str(tmp_path)]) == 0
    (note,) = [line for line in capsys.readouterr().err.splitlines() if "locked" in line]
    assert note.endswith(f"({os.strerror(number)}): start no second process on it")


def test_a_lock_is_taken_of_a_file_that_is_open_for_writing(tmp_path, monkeypatch):
    """As NFSv4 wants it."""
    modes = []
    monkeypatch.setattr(locks.fcntl, "flock", lambda file, how: modes.append(file.writable()))
    with closing(Hold()) as hold:
        hold.take(tmp_path)
    assert modes == [True]


def test_without_fcntl_training_can_be_imported_and_says_that_nothing_is_locked(tmp_path):
    program = "import sys; sys.modules['fcntl'] = None\n"
    program += "import scripts.train, scripts.compare, scripts.experiment.__main__\n" + HOLDER
    process = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.stdout == "held\n"
    assert "cannot be locked (this operating system has no flock)" in process.stderr


def test_a_worker_whose_driver_was_killed_is_waited_for_and_its_work_is_taken(
    tmp_path, monkeypatch
):
    """Two processes are asked to do one job: it is done once."""
    monkeypatch.setattr(locks, "POLL", 0.01)
    job = tiny_jobs()[0]
    driver.prepare(job, tmp_path)
    first = driver.start(job, tmp_path)  # and its driver is killed
    while not driver.reached(job, tmp_path):
        time.sleep(0.01)
        assert first.poll() is None
    steps = []
    run(job, tmp_path / "runs", steps.append)
    assert first.wait() == 0
    assert steps == []
    assert driver.finished(job, tmp_path)


@pytest.mark.parametrize("damage", ["rows", "digest", "end", "table"])
def test_what_says_that_it_is_finished_is_believed_only_with_its_rows(damage, tmp_path):
    job = Job("dqn", "CartPole-v1", (1,), **TINY)
    run(job, tmp_path / "runs")
    folder = tmp_path / "runs" / job.run_names()[0]
    whole = (folder / "evaluations.csv").read_bytes()
    assert ending(folder, job)["rows"] == whole.count(b"\n") - 1
    if damage == "rows":
        (folder / "evaluations.csv").write_bytes(whole[: len(whole) // 2])
    if damage == "digest":
        (folder / "evaluations.csv").write_bytes(whole.replace(b"1", b"2", 1))
    if damage == "table":
        (folder / "evaluations.csv").unlink()
    if damage == "end":
        (folder / END).write_bytes(b"")
    assert ending(folder, job) is None
    assert not driver.finished(job, tmp_path)
    run(job, tmp_path / "runs")  # does it again
    assert (folder / "evaluations.csv").read_bytes() == whole
    assert driver.finished(job, tmp_path)
