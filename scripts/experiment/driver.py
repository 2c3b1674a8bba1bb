"""Does the jobs of the comparison, several at a time, each in a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.progress import Progress

from polyak_rl.files import write_whole
from scripts.experiment.jobs import Job, plain, read_job, write_job
from scripts.experiment.life import CHECKPOINT
from scripts.experiment.measurement import ending
from scripts.experiment.terminal import INTERRUPTED, stop_signals

TRIES = 3  # of a run that is killed


def finished(job: Job, out: Path) -> bool:
    """Whether every run of a job is done, with these very settings, and left what it said.

    The job's file is written again where it is damaged, or says something else than the runs.

    Raises:
        ValueError: It was done, or begun, with other settings.
    """
    runs = [out / "runs" / name for name in job.run_names()]
    ends = [ending(run, job) for run in runs]  # of each: what has ended with others is refused
    record = job_file(job, out)
    try:
        said = plain(read_job(record))
    except (FileNotFoundError, ValueError):
        said = None
    if all(ends) and said != plain(job):
        write_job(job, record)
    begun = any((run / CHECKPOINT).is_dir() for run in runs)
    if begun and not all(ends) and said not in (None, plain(job)):
        raise ValueError(f"{record} has other settings than asked for now; give another --out")
    return all(ends)


class Process(Protocol):
    """A job under way: a `subprocess.Popen`, or a task on Ray."""

    def poll(self) -> int | None:
        """Its exit code, below 0 if it was killed; None while it is under way."""

    def terminate(self) -> None:
        """Make it end."""

    def wait(self) -> object:
        """Wait until it has ended."""


def execute(
    jobs: list[Job], out: Path, workers: int, begin: Callable[[Job, Path], Process] | None = None
) -> list[Job]:
    """Do the jobs, so many workers at a time; returns those that failed.

    `begin` begins a job whose file is written; by default as a process on this machine.
    """
    waiting, failed = list(jobs), []
    tries = dict.fromkeys(map(id, jobs), 0)
    running: dict[Process, Job] = {}
    bars: dict[Process, Any] = {}  # of those that have come to a step
    total = sum(job.steps() * len(job.seeds) for job in jobs)
    done = 0
    with Progress() as progress, _terminates(running) as interrupted:
        everything = progress.add_task(f"{len(jobs)} jobs, steps", total=total)
        while waiting or running:
            while waiting and len(running) < workers and not interrupted:
                job = waiting.pop(0)
                tries[id(job)] += 1
                prepare(job, out)
                running[(begin or start)(job, out)] = job
            time.sleep(0.2)
            if interrupted:
                raise KeyboardInterrupt
            under_way = 0
            for process, job in list(running.items()):
                name = job.run_names()[0]
                if step := reached(job, out):
                    if process not in bars:
                        bars[process] = progress.add_task(f"  {name}", total=job.steps())
                    progress.update(bars[process], completed=step)
                code = process.poll()
                if code is None:
                    under_way += step * len(job.seeds)
                    continue
                del running[process]
                if process in bars:
                    progress.remove_task(bars.pop(process))
                if code == 0:
                    done += job.steps() * len(job.seeds)
                elif (code < 0 or code == INTERRUPTED) and tries[id(job)] < TRIES:
                    waiting.insert(0, job)  # killed, not wrong: do it again
                else:
                    failed.append(job)
                    with write_whole(job_file(job, out).with_suffix(".crashed")):
                        pass  # a mark, so that the report says that these runs crashed
                    progress.print(f"failed: {name}, see its stderr.txt")
            progress.update(everything, completed=done + under_way)
    return failed


def prepare(job: Job, out: Path) -> None:
    """Write what a job's process reads."""
    (out / "jobs").mkdir(parents=True, exist_ok=True)
    write_job(job, job_file(job, out))
    errors_file(job, out).unlink(missing_ok=True)
    progress_file(job, out).unlink(missing_ok=True)


def start(job: Job, out: Path) -> Process:
    """Begin a job in a process of its own."""
    arguments = [str(job_file(job, out)), str(out / "runs")]
    with errors_file(job, out).open("xb") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "scripts.experiment", *arguments],
            stderr=stderr,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def job_file(job: Job, out: Path) -> Path:
    """Where a job's settings are, for its process and for the results."""
    return out / "jobs" / f"{job.run_names()[0]}.json"


def errors_file(job: Job, out: Path) -> Path:
    """Where a job's process complains."""
    return job_file(job, out).with_suffix(".stderr.txt")


def progress_file(job: Job, out: Path) -> Path:
    """Where a job's process says how far it is."""
    return out / "runs" / job.run_names()[0] / "progress"


def reached(job: Job, out: Path) -> int:
    """The environment step that a job has reached."""
    try:
        return int(progress_file(job, out).read_text() or 0)
    except (OSError, ValueError):
        return 0  # not begun, or just being written


@contextmanager
def _terminates(running: dict[Any, Any]) -> Iterator[list[int]]:
    """End what still runs when the driver ends, by `stop_signals` or an error.

    Yields:
        The signals that came. An exception raised wherever Python is at that moment could be lost,
        in a callback of Ray's for example, or leave a process behind; a second signal takes that
        chance.
    """
    with stop_signals() as came:
        try:
            yield came
        finally:
            for process in running:
                came.clear()  # whoever presses again still has all of them ended
                process.terminate()
            for process in running:
                process.wait()
