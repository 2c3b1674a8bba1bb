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
import functools
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
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.averaging import PolicyAverages
from agents.checkpoint import Checkpoints, newest, restore
from agents.malloc import keep_freed_memory
from agents.presets import preset
from agents.seeding import Purpose, evaluation_seeds
from agents.training import TrainConfig, Training
from polyak_rl import Ema, Power, Rule, Tail, Uniform, Window, weighted_average
from scripts.run_folder import RunFolder

CORE = ("last", "suffix50", "uniform0", "ema1")
"""Evaluated at every point, and on more episodes at the end."""

LATE_POINTS = 5
"""Evaluations at the end of a run that see every scheme; the endpoint is the mean over them."""

LINE = (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
"""Where the return is taken along the line from the last weights (0) to the average's (1)."""

FROM_TIMELINE: dict[str, Rule] = {
    "suffix50": Tail(0.5),
    "uniform0": Uniform(),
    "suffix90": Tail(0.9),
    "suffix75": Tail(0.75),
    "suffix25": Tail(0.25),
    "suffix10": Tail(0.1),
    "power6.94": Power(sigma_rel=0.1),
    "power16.97": Power(sigma_rel=0.05),
}


def in_bank(updates: int) -> dict[str, Rule]:
    """Averages that are too fine for the timeline; periods are shares of the run's updates."""
    half_lives = {"ema0.1": 0.001, "ema0.3": 0.003, "ema1": 0.01, "ema3": 0.03, "ema10": 0.1}
    rules: dict[str, Rule] = {
        name: Ema(half_life=max(1.0, share * updates)) for name, share in half_lives.items()
    }
    rules["lawa"] = Window(size=5, every=max(1, updates // 100))  # the last 5 % of the run
    return rules


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
    points: int = 20
    """evaluations, evenly spread"""
    episodes: int = 20
    """episodes in an evaluation"""
    final_episodes: int = 100
    """episodes of the core schemes at the last point"""
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
    spent = about["seconds"]
    with contextlib.closing(measure):
        for point in range(about["point"] + 1, job.points + 1):
            until = total * point // job.points
            while training.step < until:
                training.advance()
                if training.step % max(1, total // 1000) == 0:
                    report(training.step)
            measure.at(point)
            seconds = spent + time.perf_counter() - started
            about |= {"point": point, "seconds": seconds, "measurement": measure.state()}
            if point < job.points:
                save(checkpoints, measure.folders)
    for folder in measure.folders:
        end = {
            "seconds": round(seconds / len(job.seeds), 1),
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
    about = {"job": plain(job), "commit": commit(), "point": 0, "seconds": 0.0}
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
    measure.load_state(about["measurement"])
    measure.open_folders(out, resume_at=checkpoint.step)
    with (folder.parent / "resumed.txt").open("a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} step {checkpoint.step}\n")
    parts = (measure.training, measure.averages, about)
    return measure, Checkpoints(folder, *parts, after=checkpoint)


def save(checkpoints: Checkpoints, folders: list[RunFolder]) -> None:
    """Write a checkpoint; the run goes on where that fails."""
    try:
        for folder in folders:
            folder.sync()
        checkpoints.save()
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
    """Evaluates the schemes of a run at its points."""

    def __init__(self, job: Job) -> None:
        total = job.steps()
        config = TrainConfig(
            job.env_id, total, eval_every=total + 1, lr_decay=job.lr_decay, device=job.device
        )
        self.job = job
        self.training = training = Training(job.algo, job.agent_config(), config, job.seeds)
        self.folders: list[RunFolder] = []
        self.averages = PolicyAverages(training, in_bank(training.total_updates), job.capacity)
        self.best: dict[str, Tensor] = self.averages.last()
        self.best_return = np.full(len(job.seeds), -np.inf)
        rows = functools.partial(self._episodes, job.final_episodes)
        self.common = rows(Purpose.EVALUATION)  # [S, E] each
        self.other = rows(Purpose.PLACEBO)
        self.fresh = rows(Purpose.ORACLE)

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

    def state(self) -> dict[str, Any]:
        """What changes from point to point besides the averages, as plain values of JSON."""
        best = {name: weights.tolist() for name, weights in self.best.items()}
        return {"best": best, "best_return": self.best_return.tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.best = {
            name: weights.new_tensor(state["best"][name]) for name, weights in self.best.items()
        }
        self.best_return = np.array(state["best_return"])

    def at(self, point: int) -> None:
        """Evaluate what is due at a point, 1 to `points`, and write it down."""
        job, late = self.job, point > self.job.points - LATE_POINTS
        # Few segments lie behind an early point: there a border segment may count for a lot.
        self.averages.timeline.max_weight_error = 0.05 if late else 1.0
        states = {scheme: self.weights(scheme) for scheme in self.schemes(late)}
        core = {scheme: states.pop(scheme) for scheme in CORE}
        final = point == job.points
        self._play(core, self.common, job.final_episodes if final else job.episodes)
        self._remember_best(core["last"])
        if not late:
            return
        self._play(states, self.common, job.episodes)
        many = job.final_episodes if final else job.episodes
        self._play({"placebo": core["last"]}, self.other, many)
        self._play({"best": self.best}, self.fresh, many)
        if final:
            self._play(self.line(core), self.common, job.episodes, curve=False)

    def schemes(self, late: bool) -> list[str]:
        """The schemes due: the core ones, and late in the run all."""
        every = [*CORE, *FROM_TIMELINE, *self.averages.bank.rules]
        if "actor" in self.training.agent.targets:
            every.append("target")
        return [*dict.fromkeys(every if late else CORE)]

    def weights(self, scheme: str) -> dict[str, Tensor]:
        """The policy's weights [S, ...] under a scheme, by name."""
        if scheme == "last":
            return self.averages.last()
        if scheme == "target":
            actor = self.training.agent.targets["actor"].module
            return {name: p.detach().clone() for name, p in actor.named_parameters()}
        return self.averages.average(FROM_TIMELINE.get(scheme, scheme))

    def line(self, core: Mapping[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Weights along the straight line through the last ones and the average's."""
        ends = [core["last"], core["suffix50"]]
        return {f"line{at:g}": weighted_average(ends, [1 - at, at]) for at in LINE}

    def _play(
        self,
        states: Mapping[str, Mapping[str, Tensor]],
        seeds: NDArray[Any],
        episodes: int,
        curve: bool = True,
    ) -> None:
        results = self.training.play(states, seeds[:, :episodes])
        for scheme, result in results.items():
            for folder, returns, lengths in zip(
                self.folders, result.returns, result.lengths, strict=True
            ):
                folder.evaluation(self.training.step, scheme, returns, lengths, curve=curve)
            if scheme == "last":
                self.last_return = result.returns.mean(1)

    def _remember_best(self, last: Mapping[str, Tensor]) -> None:
        better = self.last_return > self.best_return
        self.best_return = np.where(better, self.last_return, self.best_return)
        chosen = torch.from_numpy(better).to(self.training.device)
        self.best = {
            name: torch.where(chosen.view(-1, *[1] * (last[name].dim() - 1)), last[name], old)
            for name, old in self.best.items()
        }

    def _episodes(self, episodes: int, purpose: Purpose) -> NDArray[Any]:
        env_id = self.job.env_id
        return np.stack([evaluation_seeds(env_id, s, episodes, purpose) for s in self.job.seeds])


def main(argv: list[str]) -> int:
    """Run the job of a file; the step reached is kept in `<first run>/progress`."""
    job_file, out = map(Path, argv)
    job = read_job(job_file)
    torch.set_num_threads(1)
    keep_freed_memory()
    progress = out / job.run_names()[0] / "progress"
    run(job, out, lambda step: progress.write_text(str(step)) and None)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
