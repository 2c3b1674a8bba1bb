"""Choose among the weights that a run left, and leave those that are best beside them."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import closing
from io import BytesIO
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import Progress

from agents.evaluation import Evaluator
from agents.networks import stack_members
from agents.versions import versions
from polyak_rl.choose import Choice, choose, rounds
from polyak_rl.files import write_whole
from polyak_rl.rules import describe_rule
from scripts.experiment.episodes import first_episode, note_call, seeds_of
from scripts.experiment.finished import CHOICE, SHIPPED, AbsentError, FinishedRun, Weights
from scripts.experiment.schemes import LAST, PRIMARY, SCHEMES, SHIPPABLE, TARGET

Criterion = Literal["mean", "cvar"]
WORST: dict[Criterion, float] = {"mean": 1.0, "cvar": 0.25}
"""The share of the episodes, the worst ones, whose mean is the criterion."""
SIDE_BY_SIDE = 64
"""Environments that are played at once; more make a step of them no cheaper."""


def ship(
    run: FinishedRun,
    episodes: int,
    criterion: Criterion = "mean",
    again: int | None = None,
    before_writing: Callable[[], None] = lambda: None,
) -> Choice:
    """Choose the weights to ship, value them, and write them to the run's folder.

    Its `shipped.json` says how, with every return and the seed of every episode. The caller holds
    the folder, or no other process writes to it.

    Args:
        run, episodes, criterion, again: As in `scripts.ship`.
        before_writing: What it raises, ends this with the folder as it was.

    Raises:
        ValueError: There is no timeline, a file is damaged, or `choose` refuses.
        OSError: The folder cannot be written.
    """
    weights, left_out = candidates(run)
    prior = PRIMARY.name if PRIMARY.name in weights else LAST.name
    first = first_episode(run.path, again)
    with closing(run.evaluator()) as evaluator, Progress() as progress:
        choice = choose(
            weights,
            lambda group, numbers: play(run, evaluator, group, numbers, progress),
            budget=episodes,
            prior=prior,
            worst=WORST[criterion],
            start=first,
        )
    before_writing()
    call = note_call(run.path, "ship", first, choice.next_start - first)
    write(run, weights[choice.winner], choice, criterion, call, left_out)
    return choice


def candidates(run: FinishedRun) -> tuple[dict[str, Weights], dict[str, str]]:
    """The weights that can be shipped by name of their scheme, and why others are left out.

    Raises:
        ValueError: There is no timeline, or a file is damaged.
    """
    _ = run.timeline
    found: dict[str, Weights] = {}
    left_out: dict[str, str] = {}
    for name in names(run.has_target):
        try:
            found[name] = run.weights(name)
        except AbsentError as error:
            left_out[name] = str(error).partition(":")[0]
    return found, left_out


def names(has_target: bool) -> list[str]:
    """The candidates of a run that has kept everything."""
    return [scheme.name for scheme in SHIPPABLE if scheme is not TARGET or has_target]


def require_enough(episodes: int, has_target: bool) -> None:
    """Raise ValueError where `ship` would refuse a budget after training."""
    rounds(len(names(has_target)), episodes)


def play(
    run: FinishedRun,
    evaluator: Evaluator,
    group: Mapping[str, Weights],
    episodes: range,
    progress: Progress,
) -> dict[str, list[float]]:
    """The returns of several policies, members of one network, on the same episodes."""
    network = stack_members(run.network, list(group.values()))
    seeds = seeds_of(run.env_id, run.seed, episodes)
    each = max(1, SIDE_BY_SIDE // len(group))
    what = f"{len(group)} policies, episodes {episodes.start} to {episodes.stop - 1}"
    bar = progress.add_task(what, total=len(group) * len(episodes))
    parts = []
    for i in range(0, len(seeds), each):
        part = np.tile(seeds[i : i + each], (len(group), 1))
        parts.append(evaluator.evaluate(network, part).returns)
        progress.advance(bar, part.size)
    return dict(zip(group, np.concatenate(parts, axis=1).tolist(), strict=True))


def write(
    run: FinishedRun,
    weights: Weights,
    choice: Choice,
    criterion: Criterion,
    call: int,
    left_out: Mapping[str, str],
) -> None:
    """Write the weights, and what they are: until both are on the disk, what was there stays."""
    rule = SCHEMES[choice.winner].rule
    updates = run.timeline.expected or run.timeline.clock
    valued = choice.next_start - len(choice.valuing.get(choice.winner, ()))
    data = BytesIO()
    torch.save(stack_members(run.network, [weights]).state_dict(), data)
    record: dict[str, Any] = {
        "call": call,
        "env_id": run.env_id,
        "algo": run.algo,
        "seed": run.seed,
        "label": SCHEMES[choice.winner].label,
        "rule": describe_rule(rule(updates)) if rule else None,
        "criterion": criterion,
        "left_out": dict(left_out),
        "seeds": {
            "choosing": seeds_of(run.env_id, run.seed, range(choice.start, valued)).tolist(),
            "valuing": seeds_of(run.env_id, run.seed, range(valued, choice.next_start)).tolist(),
        },
        "choice": dataclasses.asdict(choice),
        "versions": versions(),
        "sha256": hashlib.sha256(data.getbuffer()).hexdigest(),
    }
    with write_whole(run.path / CHOICE) as about, write_whole(run.path / SHIPPED) as file:
        about.write(json.dumps(record, indent=1).encode() + b"\n")
        about.flush()
        os.fsync(about.fileno())  # all that may fail comes before either takes its place
        file.write(data.getbuffer())
