"""One run of the comparison: train once, and evaluate every average of its policy on the way.

Averaging never touches training, so one run gives every scheme, and all are paired: the same
training, the same evaluation episodes. The folder that a run leaves holds the TensorBoard events
and `evaluations.csv`; `finished.json` is written last and says how many rows there are, and their
digest. A run that was cut short goes on from its last evaluation, or begins anew where that would
not be exact (Box2D): with the same numbers either way. `scripts.compare` starts these; a single one
is started by

    python -m scripts.experiment JOB.json OUT
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from agents.averaging import record_policy
from agents.checkpoint import newest
from agents.evaluation import Evaluation, Evaluator
from agents.seeding import Purpose, evaluation_seeds
from agents.training import TrainConfig, Training, crossings
from agents.versions import commit
from polyak_rl import Ema, PolicyAverages, Rule, TargetNetwork
from polyak_rl.files import write_whole
from scripts.experiment import life
from scripts.experiment.jobs import Job, from_plain, plain
from scripts.experiment.locks import LOCK, Hold
from scripts.experiment.paths import own_folder
from scripts.experiment.run_folder import TABLE, RunFolder
from scripts.experiment.schemes import LAST, PLACEBO, SCHEMES, TARGET, is_late, rules_of

Report = Callable[[int], None]
SetUp = Callable[[Job, list[Path], Hold], "Measurement"]
END = "finished.json"


def set_up(job: Job, paths: list[Path], held: Hold) -> "Measurement":
    """Set a job up at its last checkpoint, or else at its first step."""
    return resume(job, paths, held) or begin(job, paths, held)


def run(
    job: Job,
    out: Path,
    report: Report = lambda step: None,
    set_up: SetUp = set_up,
    processes: int | None = 1,
) -> None:
    """Train a job's seeds and write a folder for each under `out`; do nothing where that is done.

    A try that was cut short goes on, and one that another process makes is waited for.

    Args:
        report: Called with the environment step after every thousandth of the run.
        set_up: Readies a job whose folders are held.
        processes: That play evaluation episodes, as in `TrainConfig`.
    """
    paths = [out / name for name in job.run_names()]
    with ExitStack() as stack:
        held = stack.enter_context(closing(Hold()))
        out.mkdir(parents=True, exist_ok=True)
        for path in sorted(paths):  # in one order: no two processes wait for each other
            own_folder(path)
            held.take(path, wait=True)
        if all(ending(path, job) for path in paths):
            return
        measure = set_up(job, paths, held)
        stack.callback(measure.run.close)
        measure.training.evaluator.players.processes = processes
        measure.go(report)
        for folder in measure.run.folders:
            folder.sync()
            write_ending(folder, measure)
        shutil.rmtree(paths[0] / life.CHECKPOINT, ignore_errors=True)


def begin(job: Job, paths: list[Path], held: Hold) -> "Measurement":
    """Set a job up at its first step; what its folders held is removed."""
    training, averages = recorded(job)
    for path in paths:
        clear(path)
    run = life.begin(training, averages, held, paths, beginning(job))
    return Measurement(job, training, averages, run, training.agent.targets.get("actor"))


def clear(folder: Path) -> None:
    """Remove what a folder that is held has of an earlier try."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()


def beginning(job: Job) -> dict[str, Any]:
    """What is known of a run at its first step."""
    return {"job": plain(job), "commit": commit(), "point": 0, "seconds": 0.0, "evaluating": 0.0}


def resume(job: Job, paths: list[Path], held: Hold) -> "Measurement | None":
    """Set a job up at its last checkpoint; None where there is none or numbers could differ."""
    try:
        checkpoint, _ = newest(paths[0] / life.CHECKPOINT)
        about = checkpoint.about
        if (about.get("job"), about.get("commit")) != (plain(job), commit()):
            return None
        training, averages = recorded(job)
        run = life.go_on(training, averages, held, paths, checkpoint, exact=True)
    except ValueError:
        return None
    if run is None:
        return None
    measure = Measurement(job, training, averages, run, training.agent.targets.get("actor"))
    measure.checkpoints = checkpoint.extra
    return measure


def recorded(job: Job) -> tuple[Training, PolicyAverages]:
    """The training of a job, and the averages that are kept of it."""
    config = TrainConfig(
        job.env_id,
        job.steps(),
        eval_every=0,  # `Measurement.at` evaluates
        lr_decay=job.lr_decay,
        lr_decay_until=job.lr_decay_until,
        lr_floor=job.lr_floor,
        device=job.device,
        wrap=job.wrap,
    )
    training = Training(job.algo, job.agent_config(), config, job.seeds)
    return training, record_policy(training, in_bank(training.total_updates), job.capacity)


def in_bank(updates: int) -> dict[str, Rule]:
    """The averages of a run of so many updates that are too fine for a timeline."""
    rules = rules_of(SCHEMES.values(), updates)
    return {name: rule for name, rule in rules.items() if isinstance(rule, Ema)}


def write_ending(folder: RunFolder, measure: "Measurement") -> None:
    """Say that a run has finished, and what it left."""
    about, seeds = measure.run.about, len(measure.job.seeds)
    count, sha256 = count_rows(folder.path)
    if sha256 != folder.mark[1]:
        raise OSError(f"{folder.path / TABLE} is not what was written: the run is to be done again")
    end = {
        "seconds": round(about["seconds"] / seeds, 1),
        "evaluating": round(about["evaluating"] / seeds, 1),  # of these seconds
        "updates": measure.averages.clock,
        "commit": commit(),
        "job": plain(measure.job),
        "rows": count,
        "sha256": sha256,
    }
    with write_whole(folder.path / END) as file:
        file.write(json.dumps(end).encode() + b"\n")


def ending(folder: Path, job: Job) -> dict[str, Any] | None:
    """What a run said when it had finished; None where it has not, or has not left what it said.

    Raises:
        ValueError: It was a run of another job.
    """
    try:
        end: dict[str, Any] = json.loads((folder / END).read_bytes())
        found = count_rows(folder)
        if found != (end["rows"], end["sha256"]):
            return None
        done = from_plain(end["job"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if plain(done) != plain(job):
        raise ValueError(f"{folder} has finished with other settings than asked for now")
    return end


def count_rows(folder: Path) -> tuple[int, str]:
    """The evaluation episodes of a run, and the digest of their table."""
    data = (folder / TABLE).read_bytes()
    return data.count(b"\n") - 1, hashlib.sha256(data).hexdigest()


class Trains(Protocol):
    """What is measured: an `agents.training.Training`, or another program's in this form."""

    evaluator: Evaluator
    step: int  # environment steps taken

    @property
    def total_updates(self) -> int:
        """Gradient steps of the whole run."""

    def advance(self) -> None:
        """Go on by what cannot be divided."""

    def play(
        self, states: Mapping[str, Mapping[str, Tensor]], episodes: NDArray[Any]
    ) -> Mapping[str, Evaluation]:
        """As `Training.play` does."""


class Kept(Protocol):
    """Where a run is kept: a `life.Run`, or another in this form."""

    about: dict[str, Any]
    folders: list[RunFolder]

    def try_to_save(self, extra: Mapping[str, Any]) -> None:
        """Make sure of what was reached."""

    def close(self) -> None:
        """Close environments and files."""


@dataclass(eq=False)
class Measurement:
    """Trains, and evaluates the schemes of a run at its points."""

    job: Job
    training: Trains
    averages: PolicyAverages  # of the training's policy: those `in_bank`, and a timeline
    run: Kept
    target: TargetNetwork | None = None  # of the policy, where there is one

    def __post_init__(self) -> None:
        job = self.job
        assert self.averages.timeline is not None
        self.timeline = self.averages.timeline
        self.rules = rules_of(SCHEMES.values(), self.training.total_updates)
        # The weights of past iterates that wait for the end, by scheme.
        self.checkpoints: dict[str, dict[str, Tensor]] = {}
        self.common, self.other = (  # [S, E] each
            np.stack(
                [evaluation_seeds(job.env_id, s, job.final_episodes, purpose) for s in job.seeds]
            )
            for purpose in (Purpose.EVALUATION, Purpose.PLACEBO)
        )

    def go(self, report: Report) -> None:
        """Train from point to point, and write down what is measured and how long it took."""
        job, training, about = self.job, self.training, self.run.about
        began, spent = time.perf_counter(), about["seconds"]
        for point in range(about["point"] + 1, job.points + 1):
            while (before := training.step) < self.step(point):
                training.advance()
                if crossings(before, training.step, max(1, job.steps() // 1000)):
                    report(training.step)
            paused = time.perf_counter()
            self.at(point)
            now = time.perf_counter()
            about["evaluating"] += now - paused
            about |= {"point": point, "seconds": spent + now - began}
            if point < job.points:
                self.run.try_to_save(self.checkpoints)

    def step(self, point: int) -> int:
        """The environment step of a point."""
        return self.job.steps() * point // self.job.points

    def at(self, point: int) -> None:
        """Evaluate what is due at a point, 1 to `points`, and write it down."""
        job, final = self.job, point == self.job.points
        late = is_late(self.step(point), job.steps())
        # Few segments lie behind an early point: there a border segment may count for a lot.
        self.timeline.max_weight_error = 0.05 if late else 1.0
        due = {"always", *["late"] * late, *["end"] * final}
        for scheme in SCHEMES.values():
            if scheme.is_checkpoint and scheme.until == 100 * point / job.points:
                self.checkpoints[scheme.name] = self.averages.last()
            if scheme.when in due and (weights := self.weights(scheme.name)) is not None:
                seeds = self.other if scheme is PLACEBO else self.common
                seeds = seeds if final else seeds[:, : job.episodes]
                self._play(self.step(point), scheme.name, weights, seeds)

    def weights(self, scheme: str) -> Mapping[str, Tensor] | None:
        """The policy's weights [S, ...] under a scheme, by name; None where there are none."""
        if scheme in (LAST.name, PLACEBO.name):
            return self.averages.last()
        if scheme == TARGET.name:
            return dict(self.target.module.named_parameters()) if self.target else None
        if scheme in self.rules:
            in_bank = scheme in self.averages.rules
            return self.averages.average(scheme if in_bank else self.rules[scheme])
        return self.checkpoints.get(scheme)

    def _play(
        self, step: int, scheme: str, weights: Mapping[str, Tensor], seeds: NDArray[Any]
    ) -> None:
        result = self.training.play({scheme: weights}, seeds)[scheme]
        curve = SCHEMES[scheme].when != "end"
        for folder, returns, lengths in zip(
            self.run.folders, result.returns, result.lengths, strict=True
        ):
            folder.evaluation(step, scheme, returns, lengths, curve=curve)
