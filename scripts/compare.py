"""Uniform Polyak-Ruppert averaging of the policy against no averaging, on Gymnasium environments.

    python -m scripts.compare --tier s                         # minutes; also `make compare`
    python -m scripts.compare --algo dqn --env-id CartPole-v1 --seeds 20
    python -m scripts.compare --tier m --workers 2             # hours; start it again to go on
    python -m scripts.compare --tier l --ray auto              # on a cluster: experiment/cluster.py

Plans the runs, does what is missing, one process a run, and writes `results/results.csv.gz` (a row
an evaluation episode) and `results/runs.json` (what became of each planned run) under `--out`.
`python -m scripts.report OUT/results` makes the report of them. When it is stopped or killed, or
the whole machine is, start it again: finished runs stay, others go on from their last checkpoint.
"""

import contextlib
import csv
import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from agents.presets import ALGORITHMS
from scripts.experiment.measurement import Job, plain, read_job
from scripts.experiment.study import CELLS, FIRST_SEED

COLUMNS = ("run", "env", "algo", "seed", "variant", "scheme", "step", "episode", "return")
TRIES = 3  # of a run that is killed

SMALL = {"hidden": (32, 32), "batch_size": 32}
TIERS: dict[str, list[tuple[str, str, int, dict[str, Any]]]] = {  # algo, env, seeds, changes
    "s": [
        ("dqn", "CartPole-v1", 2, {"total_steps": 8_000, "agent": {"hidden": (32, 32)}}),
        (
            "ddpg",
            "Pendulum-v1",
            1,
            {"total_steps": 3_000, "agent": {**SMALL, "learning_starts": 500}},
        ),
    ],
    "m": [
        ("dqn", "CartPole-v1", 20, {}),
        ("dqn", "Acrobot-v1", 20, {}),
        ("dqn", "LunarLander-v3", 10, {}),
        ("ddpg", "InvertedPendulum-v5", 20, {}),
        ("ddpg", "Reacher-v5", 10, {}),
        ("sac", "InvertedDoublePendulum-v5", 10, {}),
        ("ddpg", "Pendulum-v1", 5, {}),
        ("sac", "Pendulum-v1", 5, {}),
    ],
    "l": [
        (algo, f"{env}-v5", 20, {"total_steps": 1_000_000})
        for algo in ("sac", "ddpg")
        for env in (
            "Hopper",
            "Walker2d",
            "HalfCheetah",
            "InvertedDoublePendulum",
            "Reacher",
            "Swimmer",
        )
    ],
}
TARGET_STUDY = (32, 128, 512)  # gradient steps between two hard copies
SMOKE = {"points": 10, "episodes": 5, "final_episodes": 10}  # tier s


@dataclass(frozen=True)
class Options:
    """What to compare, and how."""

    tier: Literal["s", "m", "l", "study"] | None = None
    """a set of runs: s takes minutes, m hours, l a cluster; study is the registered one"""
    algo: str | None = None
    """instead of a tier: one algorithm, with --env-id"""
    env_id: str | None = None
    """Gymnasium's name of the environment"""
    seeds: int | None = None
    """runs of each algorithm on each environment; None: the tier's, or 20"""
    first_seed: int = 1
    """the seeds are this one and those after it"""
    total_steps: int | None = None
    """environment steps of each run; None: the preset's"""
    lr_decay: Literal["constant", "linear"] = "constant"
    """the rival explanation: learning rates that fall to 0 over the run"""
    targets: bool = False
    """the target-network study (dqn): hard copies every C against soft tau = 2 / (C + 1)"""
    workers: int = 2
    """processes side by side, one thread each; a cluster has as many as it has room for"""
    together: int = 1
    """seeds trained as members of one process"""
    ray: str | None = None
    """do the runs on Ray: the address of a running cluster ("auto": the one of this machine), or
    "local" to begin one here"""
    num_cpus: float = 1
    """CPUs that each process takes on Ray"""
    num_gpus: float = 0
    """GPUs that each process takes on Ray, and trains on: 0.25 for four on one"""
    out: Path = Path("runs/compare")
    """where run folders and results go; runs that are finished there are not done again"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = tyro.cli(Options, args=argv, prog="python -m scripts.compare", description=__doc__)
    try:
        jobs = plan(options)
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    missing = [job for job in jobs if not finished(job, options.out)]
    try:
        if options.ray is None:
            failed = execute(missing, options.out, options.workers)
        else:
            failed = execute_on_ray(missing, options)
    except (ImportError, ConnectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; start again to go on.")
        return 130
    finally:
        collect(options.out)
    runs = sum(len(job.seeds) for job in jobs)
    print(f"{runs} runs, {len(failed)} jobs failed. Results: {options.out / 'results'}")
    print(f"Report: python -m scripts.report {options.out / 'results'}")
    return 1 if failed else 0


def plan(options: Options) -> list[Job]:
    """The jobs of a command line, in the order in which they are done.

    Raises:
        ValueError: The options contradict each other or name something unknown.
    """
    if (options.tier is None) == (options.algo is None or options.env_id is None):
        raise ValueError("give either --tier or both --algo and --env-id")
    for name in ("seeds", "workers", "together", "total_steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("num_cpus", "num_gpus"):
        value = getattr(options, name)
        if value < 0 or (value > 1 and value % 1):
            raise ValueError(
                f"{name.replace('_', '-')} must be a share of one or a whole number, got {value}"
            )
    if options.num_gpus and options.ray is None:
        raise ValueError("num-gpus is for --ray: without it, runs are on the CPU")
    if options.tier == "study":
        return study(options)
    if options.tier is not None:
        grid = TIERS[options.tier]
    else:
        assert options.algo is not None
        assert options.env_id is not None
        grid = [(options.algo, options.env_id, options.seeds or 20, {})]
    common: dict[str, Any] = {"device": "cuda" if options.num_gpus else "cpu"}
    if options.tier == "s":
        common |= SMOKE
    jobs: list[Job] = []
    for algo, env_id, seeds, changes in grid:
        if algo not in ALGORITHMS:
            raise ValueError(f"algo must be one of {', '.join(ALGORITHMS)}, got {algo!r}")
        base = Job(algo, env_id, (), **{**common, **changes})
        if options.total_steps:
            base = dataclasses.replace(base, total_steps=options.total_steps)
        for variant in variants(base, options):
            last = options.first_seed + (options.seeds or seeds)
            every = range(options.first_seed, last)
            for i in range(0, len(every), options.together):
                group = tuple(every[i : i + options.together])
                jobs.append(dataclasses.replace(variant, seeds=group))
    return jobs


def study(options: Options) -> list[Job]:
    """The jobs of the registered study, which nothing but the way they are run can change."""
    fixed = ("seeds", "first_seed", "total_steps", "lr_decay", "targets", "together", "num_gpus")
    if any(getattr(options, name) != getattr(Options(), name) for name in fixed):
        raise ValueError(f"the registered study fixes {', '.join(fixed)}: leave them out")
    return [
        Job(cell.algo, cell.env_id, tuple(range(first, first + cell.together)), **cell.changes)
        for cell in CELLS
        for first in range(FIRST_SEED, FIRST_SEED + cell.runs, cell.together)
    ]


def variants(base: Job, options: Options) -> list[Job]:
    """The plain protocol, or what is asked for in its place."""
    change = dataclasses.replace
    if options.lr_decay == "linear":
        return [change(base, variant="lr=linear", lr_decay="linear")]
    if not options.targets:
        return [base]
    if base.algo != "dqn":
        raise ValueError(f"the target-network study is of dqn, got {base.algo}")
    studies = []
    for c in TARGET_STUDY:
        tau = 2 / (c + 1)  # the same mean age of the target's weights: (C - 1) / 2
        hard = {**base.agent, "target": "hard", "target_update_every": c}
        soft = {**base.agent, "target": "soft", "tau": tau}
        studies += [
            change(base, variant=f"target=hard:{c}", agent=hard),
            change(base, variant=f"target=soft:{tau:.4g}", agent=soft),
        ]
    return studies


def finished(job: Job, out: Path) -> bool:
    """Whether every run of a job is done, with these very settings."""
    for name in job.run_names():
        if not (out / "runs" / name / "finished.json").exists():
            return False
    record = out / "jobs" / f"{job.run_names()[0]}.json"
    if record.exists() and plain(read_job(record)) != plain(job):
        raise SystemExit(
            f"error: {record} has other settings than asked for now; give another --out"
        )
    return True


class Process(Protocol):
    """A job under way: a `subprocess.Popen`, or a task on Ray."""

    def poll(self) -> int | None:
        """Its exit code, below 0 if it was killed; None while it is under way."""
        ...

    def terminate(self) -> None:
        """Make it end."""
        ...

    def wait(self) -> object:
        """Wait until it has ended."""
        ...


def execute_on_ray(jobs: list[Job], options: Options) -> list[Job]:
    """Do the jobs on Ray, which queues all of them; returns those that failed."""
    from scripts.experiment import cluster  # Ray is there for those who ask for it

    assert options.ray is not None
    with cluster.connected(
        options.ray, options.workers, options.num_cpus, options.num_gpus
    ) as begin:
        return execute(jobs, options.out, workers=len(jobs), begin=begin)


def execute(
    jobs: list[Job],
    out: Path,
    workers: int,
    begin: Callable[[Job, Path], Process] | None = None,
) -> list[Job]:
    """Do the jobs, several at a time; returns those that failed.

    Args:
        jobs: What to do.
        out: As in `Options`.
        workers: How many are begun before one has ended.
        begin: Begins a job whose file is written; None: `start`, a process on this machine.
    """
    waiting, failed = list(jobs), []
    tries = dict.fromkeys(map(id, jobs), 0)
    running: dict[Process, tuple[Job, Any]] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    total = sum(job.steps() * len(job.seeds) for job in jobs)
    done = 0
    with Progress(*columns) as progress, _terminates(running) as interrupted:
        everything = progress.add_task(f"{len(jobs)} jobs, steps", total=total)
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                tries[id(job)] += 1
                bar = progress.add_task(f"  {job.run_names()[0]}", total=job.steps(), visible=False)
                prepare(job, out)
                running[(begin or start)(job, out)] = (job, bar)
            time.sleep(0.2)
            if interrupted:
                raise KeyboardInterrupt
            for process, (job, bar) in list(running.items()):
                step = reached(job, out)
                progress.update(bar, completed=step, visible=step > 0)
                code = process.poll()
                if code is None:
                    continue
                del running[process]
                progress.remove_task(bar)
                if code == 0:
                    done += job.steps() * len(job.seeds)
                elif code < 0 and tries[id(job)] < TRIES:
                    waiting.insert(0, job)  # killed, not wrong: do it again
                else:
                    failed.append(job)
                    note_crash(job, out)
                    progress.print(f"failed: {job.run_names()[0]}, see its stderr.txt")
            now = sum(reached(job, out) * len(job.seeds) for job, _ in running.values())
            progress.update(everything, completed=done + now)
    return failed


def prepare(job: Job, out: Path) -> None:
    """Write what a job's process reads."""
    (out / "jobs").mkdir(parents=True, exist_ok=True)
    record = out / "jobs" / f"{job.run_names()[0]}.json"
    record.write_text(json.dumps(plain(job), indent=2) + "\n")
    progress_file(job, out).unlink(missing_ok=True)


def start(job: Job, out: Path) -> Process:
    """Begin a job in a process of its own."""
    name = job.run_names()[0]
    record = out / "jobs" / f"{name}.json"
    with (out / "jobs" / f"{name}.stderr.txt").open("wb") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "scripts.experiment", str(record), str(out / "runs")],
            stderr=stderr,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def collect(out: Path) -> None:
    """Write the results of all finished runs, and what became of every planned one."""
    folder = out / "results"
    folder.mkdir(exist_ok=True)
    records, partial = [], folder / "results.csv.gz.partial"
    # No name and no time in the archive: the same runs give the same bytes.
    with (
        partial.open("wb") as raw,
        gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed,
    ):
        lines = csv.writer(_Text(packed), lineterminator="\n")
        lines.writerow(COLUMNS)
        for path in sorted((out / "jobs").glob("*.json")):
            job = read_job(path)
            for name, seed in zip(job.run_names(), job.seeds, strict=True):
                record = describe(job, name, seed, out)
                records.append(record)
                if record["status"] != "finished":
                    continue
                key = (name, job.env_id, job.algo, seed, job.variant)
                with (out / "runs" / name / "evaluations.csv").open(newline="") as rows:
                    for row in csv.DictReader(rows):
                        shown = f"{float(row['return']):.6g}"
                        lines.writerow((*key, row["scheme"], row["step"], row["episode"], shown))
    partial.replace(folder / "results.csv.gz")
    runs = folder / "runs.json.partial"
    commits = sorted({record["commit"] for record in records} - {""})
    about = {"commit": ", ".join(commits)} if commits else {}
    runs.write_text(json.dumps({**about, "runs": records}, indent=1) + "\n")
    runs.replace(folder / "runs.json")


def describe(job: Job, name: str, seed: int, out: Path) -> dict[str, Any]:
    """A planned run and what became of it, for the report."""
    end_file = out / "runs" / name / "finished.json"
    end = json.loads(end_file.read_text()) if end_file.exists() else {}
    crash = out / "jobs" / f"{job.run_names()[0]}.crashed"
    status = "finished" if end else "crashed" if crash.exists() else "not run"
    config = {"total_steps": job.steps(), **dataclasses.asdict(job.agent_config())}
    return {
        "run": name,
        "env": job.env_id,
        "algo": job.algo,
        "seed": seed,
        "variant": job.variant,
        "status": status,
        "seconds": end.get("seconds"),
        "evaluating": end.get("evaluating"),
        "commit": end.get("commit", ""),
        "config": {
            **config,
            "lr_decay": job.lr_decay,
            "lr_decay_until": job.lr_decay_until,
            "lr_floor": job.lr_floor,
        },
    }


def progress_file(job: Job, out: Path) -> Path:
    """Where a job's process says how far it is."""
    return out / "runs" / job.run_names()[0] / "progress"


def reached(job: Job, out: Path) -> int:
    """The environment step that a job has reached."""
    try:
        return int(progress_file(job, out).read_text() or 0)
    except (OSError, ValueError):
        return 0  # not begun, or just being written


def note_crash(job: Job, out: Path) -> None:
    """Leave a mark, so that the report says that these runs crashed."""
    (out / "jobs" / f"{job.run_names()[0]}.crashed").touch()


class _Text:
    """The text side of a binary file, for `csv.writer`."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, text: str) -> None:
        self.file.write(text.encode())


@contextlib.contextmanager
def _terminates(running: dict[Any, Any]) -> Iterator[list[int]]:
    """End what still runs when the driver ends, by Ctrl-C, SIGTERM or an error.

    Yields:
        The signals that came. An exception raised wherever Python is at that moment could be lost,
        in a callback of Ray's for example; a second signal takes that chance.
    """
    came: list[int] = []

    def stop(signum: int, frame: Any) -> None:
        came.append(signum)
        if len(came) > 1:
            raise KeyboardInterrupt

    previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
