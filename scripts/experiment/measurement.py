"""One run of the comparison: train once, and evaluate every average of its policy on the way.

Averaging never touches training, so one run gives every scheme, and all are paired: the same
training, the same evaluation episodes. The folder that a run leaves holds the TensorBoard events
and `evaluations.csv`; `finished.json` is written last. A run that was cut short goes on from its
last evaluation, or begins anew where that would not be exact (Box2D): with the same numbers either
way. `scripts.compare` starts these; a single one is started by

    python -m scripts.experiment JOB.json OUT
"""

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from agents.averaging import record_policy
from agents.checkpoint import Checkpoints, newest, restore
from agents.presets import preset
from agents.seeding import Purpose, evaluation_seeds
from agents.training import TrainConfig, Training
from scripts.experiment.run_folder import RunFolder
from scripts.experiment.schemes import LATE, SCHEMES


@dataclass(frozen=True)
class Job:
    """What one process trains: an algorithm on an environment, for one seed or several."""

    algo: str
    env_id: str
    seeds: tuple[int, ...]
    variant: str = ""
    """what differs from the plain protocol, e.g. "lr=linear"; empty for the protocol itself"""
    total_steps: int | None = None
    """environment steps; None: the preset's"""
    agent: Mapping[str, Any] = field(default_factory=dict)
    """fields of the algorithm's config that differ from the preset"""
    lr_decay: Literal["constant", "linear"] = "constant"
    lr_decay_until: float = 1.0
    """as in `TrainConfig`"""
    lr_floor: float = 0.0
    """as in `TrainConfig`"""
    points: int = 20
    """evaluations, evenly spread"""
    episodes: int = 20
    """episodes in an evaluation"""
    final_episodes: int = 100
    """episodes of every scheme at the last point"""
    capacity: int = 256
    """segments of the timeline"""
    device: str = "cpu"
    """where networks and replay buffer live, as torch names it"""

    def run_names(self) -> list[str]:
        """The folder of each seed's run."""
        env = self.env_id.replace("/", "-")
        variant = f"__{self.variant.replace('=', '-').replace(':', '-')}" if self.variant else ""
        return [f"{env}__{self.algo}{variant}__{seed}" for seed in self.seeds]

    def steps(self) -> int:
        """Environment steps per seed."""
        return self.total_steps or preset(self.algo, self.env_id)[1]

    def agent_config(self) -> Any:
        """The preset's config with this job's changes."""
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in self.agent.items()}
        return dataclasses.replace(preset(self.algo, self.env_id)[0], **values)


def read_job(path: Path) -> Job:
    """The job of a file."""
    values = json.loads(path.read_text())
    return Job(**{**values, "seeds": tuple(values["seeds"])})


def plain(job: Job) -> dict[str, Any]:
    """A job as it reads back from its file."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(job)))
    return values


Report = Callable[[int], None]


def run(job: Job, out: Path, report: Report = lambda step: None) -> None:
    """Train a job's seeds and write a folder for each under `out`.

    Args:
        job: What to train.
        out: The folder of run folders; a try that was cut short there goes on.
        report: Called with the environment step after every thousandth of the run.
    """
    started, total = time.perf_counter(), job.steps()
    measure, checkpoints = resume(job, out) or begin(job, out)
    training, about = measure.training, checkpoints.about
    spent, evaluating = about["seconds"], about["evaluating"]
    with contextlib.closing(measure):
        for point in range(about["point"] + 1, job.points + 1):
            until = total * point // job.points
            while training.step < until:
                training.advance()
                if training.step % max(1, total // 1000) == 0:
                    report(training.step)
            began = time.perf_counter()
            measure.at(point)
            evaluating += time.perf_counter() - began
            seconds = spent + time.perf_counter() - started
            about |= {"point": point, "seconds": seconds, "evaluating": evaluating}
            if point < job.points:
                save(checkpoints, measure)
    for folder in measure.folders:
        end = {
            "seconds": round(seconds / len(job.seeds), 1),
            "evaluating": round(evaluating / len(job.seeds), 1),  # of these seconds
            "updates": training.updates,
            "commit": commit(),
        }
        partial = folder.path / "finished.json.partial"
        partial.write_text(json.dumps(end) + "\n")
        partial.replace(folder.path / "finished.json")
    shutil.rmtree(checkpoints.folder, ignore_errors=True)


def begin(job: Job, out: Path) -> "tuple[Measurement, Checkpoints]":
    """Set a job up at its first step; what its folders held is removed."""
    measure = Measurement(job)
    for name in job.run_names():
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
    measure.open_folders(out)
    about = {"job": plain(job), "commit": commit(), "point": 0, "seconds": 0.0, "evaluating": 0.0}
    folder = checkpoint_folder(job, out)
    return measure, Checkpoints(folder, measure.training, measure.averages, about)


def resume(job: Job, out: Path) -> "tuple[Measurement, Checkpoints] | None":
    """Set a job up at its last checkpoint, or return None if the numbers could become others."""
    folder = checkpoint_folder(job, out)
    try:
        checkpoint, _ = newest(folder)
        about = checkpoint.about
        if (about["job"], about["commit"]) != (plain(job), commit()):
            return None
        measure = Measurement(job)
        if restore(checkpoint, measure.training, measure.averages):
            return None
    except ValueError:
        return None
    measure.checkpoints = checkpoint.extra
    measure.open_folders(out, resume_at=checkpoint.step)
    with (folder.parent / "resumed.txt").open("a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} step {checkpoint.step}\n")
    parts = (measure.training, measure.averages, about)
    return measure, Checkpoints(folder, *parts, after=checkpoint)


def save(checkpoints: Checkpoints, measure: "Measurement") -> None:
    """Write a checkpoint; the run goes on where that fails."""
    try:
        for folder in measure.folders:
            folder.sync()
        checkpoints.save(measure.checkpoints)
    except OSError as error:
        at = f"step {checkpoints.training.step:,} of {checkpoints.folder}"
        print(f"warning: the checkpoint at {at} was not written: {error}", file=sys.stderr)


def checkpoint_folder(job: Job, out: Path) -> Path:
    """Where a job's checkpoints are."""
    return out / job.run_names()[0] / "checkpoint"


def commit() -> str:
    """The commit of the code that runs, with a + where files have changed since; "" without git."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    here = Path(__file__).parent
    try:
        return subprocess.run(
            command, cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


class Measurement:
    """Evaluates the schemes of a run at its points.

    Attributes:
        checkpoints: The weights [S, ...] of past iterates that wait for the end, by scheme.
    """

    def __init__(self, job: Job) -> None:
        total = job.steps()
        config = TrainConfig(
            job.env_id,
            total,
            eval_every=0,  # `at` evaluates
            lr_decay=job.lr_decay,
            lr_decay_until=job.lr_decay_until,
            lr_floor=job.lr_floor,
            device=job.device,
        )
        self.job = job
        self.training = training = Training(job.algo, job.agent_config(), config, job.seeds)
        self.folders: list[RunFolder] = []
        rules = {
            scheme.name: scheme.rule(training.total_updates)
            for scheme in SCHEMES.values()
            if scheme.rule is not None
        }
        self.averages = record_policy(training, rules, job.capacity)
        self.checkpoints: dict[str, dict[str, Tensor]] = {}
        self.common, self.other = (  # [S, E] each
            np.stack(
                [evaluation_seeds(job.env_id, s, job.final_episodes, purpose) for s in job.seeds]
            )
            for purpose in (Purpose.EVALUATION, Purpose.PLACEBO)
        )

    def open_folders(self, out: Path, resume_at: int | None = None) -> None:
        """Write to the runs' folders from here on; see RunFolder for `resume_at`."""
        job, config = self.job, self.training.config
        self.folders = [
            RunFolder(out / name, job.algo, seed, config, job.agent_config(), resume_at)
            for name, seed in zip(job.run_names(), job.seeds, strict=True)
        ]
        self.training.logs = tuple(self.folders)

    def close(self) -> None:
        """Close the environments and the folders' files."""
        self.training.close()
        for folder in self.folders:
            folder.close()

    def at(self, point: int) -> None:
        """Evaluate what is due at a point, 1 to `points`, and write it down."""
        job, final = self.job, point == self.job.points
        late = point >= LATE * job.points
        # Few segments lie behind an early point: there a border segment may count for a lot.
        self.averages.timeline.max_weight_error = 0.05 if late else 1.0
        due = {"always", *["late"] * late, *["end"] * final}
        for scheme in SCHEMES.values():
            if scheme.at is not None and scheme.at * job.points == 100 * point:
                self.checkpoints[scheme.name] = self.averages.last()
            if scheme.when in due and (weights := self.weights(scheme.name)) is not None:
                seeds = self.other if scheme.name == "placebo" else self.common
                self._play(scheme.name, weights, seeds if final else seeds[:, : job.episodes])

    def weights(self, scheme: str) -> Mapping[str, Tensor] | None:
        """The policy's weights [S, ...] under a scheme, by name; None where there are none."""
        if scheme in ("last", "placebo"):
            return self.averages.last()
        if scheme == "target":
            target = self.training.agent.targets.get("actor")
            return dict(target.module.named_parameters()) if target else None
        if scheme in self.averages.rules:
            return self.averages.average(scheme)
        return self.checkpoints.get(scheme)

    def _play(self, scheme: str, weights: Mapping[str, Tensor], seeds: NDArray[Any]) -> None:
        result = self.training.play({scheme: weights}, seeds)[scheme]
        curve = SCHEMES[scheme].when != "end"
        for folder, returns, lengths in zip(
            self.folders, result.returns, result.lengths, strict=True
        ):
            folder.evaluation(self.training.step, scheme, returns, lengths, curve=curve)
