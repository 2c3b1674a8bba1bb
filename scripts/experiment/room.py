"""Room on the disk: what runs will leave there is estimated before they begin."""

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from agents.checkpoint import training_state
from agents.presets import ALGORITHMS
from agents.training import EPISODES_SHOWN, Training
from polyak_rl import PolicyAverages
from scripts.experiment.jobs import Job
from scripts.experiment.measurement import recorded

POINT = 64  # bytes of a number in TensorBoard's events, and of a row in the table of evaluations
TAGS = 16  # numbers at a reading


class Size(NamedTuple):
    """Bytes on disk of a run."""

    replay: int  # of the replay buffer, in checkpoints
    state: int  # of all else in the two checkpoints that are kept
    end: int  # of what a run leaves besides


def size(training: Training, averages: PolicyAverages | None) -> Size:
    """How much a run that has not begun will have written at its end."""
    config, seeds = training.config, len(training.seeds)
    timeline = averages.timeline if averages else None
    segments = timeline.nbytes if timeline else 0
    moments = 2 * sum(
        parameter.nbytes
        for optimizer in training.agent.descent.optimizers.values()
        for group in optimizer.param_groups
        for parameter in group["params"]
    )
    readings = TAGS * (config.total_steps // config.log_every) + 2 * min(
        EPISODES_SHOWN, config.total_steps
    )
    evaluations = config.total_steps // training.eval_every if training.eval_every else 0
    episodes = evaluations * len(training.schemes) * config.eval_episodes
    return Size(
        replay=bytes_of(vars(training.replay)),
        state=2 * (bytes_of(training_state(training, averages)) + moments + segments),
        end=segments // 2 + seeds * POINT * (readings + episodes),  # the timeline in float32
    )


def bytes_of(values: Any) -> int:
    """Of all tensors in nested dicts and lists."""
    if isinstance(values, Tensor):
        return values.nbytes
    if isinstance(values, Mapping):
        return sum(map(bytes_of, values.values()))
    return sum(map(bytes_of, values)) if isinstance(values, list | tuple) else 0


def size_of_jobs(jobs: Sequence[Job], workers: int, out: Path) -> int:
    """How much unfinished jobs, so many workers at a time, will write that is not in `out` yet.

    What they leave at their end is next to nothing.
    """
    sizes: dict[str, int] = {}
    each = []
    for job in jobs:
        alike = dataclasses.replace(job, seeds=(0,), device="cpu")
        if repr(alike) not in sizes:
            sizes[repr(alike)] = 0  # of PPO nothing is kept on the way
            if job.algo in ALGORITHMS:
                training, averages = recorded(alike)
                with closing(training):
                    replay, state, _ = size(training, averages)
                sizes[repr(alike)] = replay + state
        each.append(len(job.seeds) * sizes[repr(alike)])
    begun = sum(bytes_in(out / name) for job in jobs for name in job.run_names())
    return sum(sorted(each)[-workers:]) - begun


def bytes_in(folder: Path) -> int:
    """Of all files in a folder, which somebody may be changing."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += Path(base, name).lstat().st_size
    return total


def require_room(folder: Path, needed: int, remedy: str) -> None:
    """Raise ValueError where a folder, which need not be there yet, has less room than needed."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(
            f"{folder} has room for {free / 2**20:,.0f} MiB, and about {needed / 2**20:,.0f} MiB "
            f"would come there: {remedy}"
        )
