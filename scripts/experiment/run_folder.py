"""One seed's run on disk: configuration, TensorBoard events, evaluations, and the final policy."""

import csv
import dataclasses
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensorboard.plugins.hparams.api_pb2 import MetricName
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor

from agents.training import TrainConfig
from agents.versions import versions
from polyak_rl.files import write_whole
from scripts.experiment.events import EventFile, summary
from scripts.experiment.paths import folder_name
from scripts.experiment.schemes import LAST, SHOWN

CHARTS = {
    "evaluation": {f"last iterate, {s.label}": f"eval/(last|{s.name})$" for s in SHOWN}
    | {"every scheme": "eval/.*"},
    "weights": {
        f"distance to the last iterate, {s.label}": f"averaging/distance_to_last/{s.name}$"
        for s in SHOWN
    }
    | {"lag of target networks": "target/.*"},
}
"""The charts under TensorBoard's custom scalars, and their tags.

TensorBoard has one colour for a folder's curves, and tells them apart by marks that it gives out
anew for each folder. So the averages' evaluations have a folder of their own, and where it can be,
a chart has one curve of each folder.
"""
AVERAGES = "averages"
"""The folder of TensorBoard events in a run's folder that has the evaluations of averages."""
TABLE = "evaluations.csv"
COLUMNS = ("algo", "env_id", "learning_rate", "seed", "total_steps")
"""The hyper-parameters that TensorBoard's table shows without being asked."""
HEADER = b"step,scheme,episode,return,length\r\n"
_NUMBER = rb"(?:-?\d+(?:\.\d+)?(?:e[-+]\d+)?|-?inf|nan)"
_ROW = re.compile(rb"(\d{1,18}),[\w.]+,\d+," + _NUMBER + rb",\d{1,18}\r\n")


def new_run_folder(root: Path, env_id: str, algo: str, seed: int) -> Path:
    """Make `root/<env>__<algo>__<seed>__<time>`, numbered on if two runs begin in one second.

    Raises:
        ValueError: The folder cannot be made.
    """
    name = folder_name(env_id, algo, str(seed), time.strftime("%Y%m%d-%H%M%S"))
    for number in itertools.count(1):
        path = root / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(f"cannot make a folder in {root}: {error.strerror}") from error
    raise AssertionError("unreachable: the count has no end")


def rows_until(folder: Path, mark: Sequence[Any], step: int) -> tuple[bytes, str]:
    """The table that a checkpoint of this step and mark knew, and what is wrong with it, or "".

    One that is damaged gives its whole rows up to there.
    """
    size, sha256 = mark
    try:
        data = (folder / TABLE).read_bytes()
    except OSError as error:
        return HEADER, f"the evaluations up to step {step:,} are lost: {error}"
    known = data[: int(size)]
    if hashlib.sha256(known).hexdigest() == sha256:
        return known, ""
    rows = (_ROW.fullmatch(line) for line in data.splitlines(keepends=True))
    kept = b"".join(row[0] for row in rows if row and int(row[1]) <= step)
    return HEADER + kept, f"{folder / TABLE} is not as it was at step {step:,}: some rows are lost"


class RunFolder:
    """Writes what `agents.training.Log` is told, and the rest of a run's record.

    `evaluations.csv` has a row per scheme and episode; it is flushed after each evaluation, so a
    run that is cut short leaves what it had.

    A run goes on from the step `resume_at` with the rows of the table up to there: what was written
    of later steps is taken back.
    """

    def __init__(
        self,
        path: Path,
        algo: str,
        seed: int,
        config: TrainConfig,
        agent_config: Any,
        resume_at: int | None = None,
        rows: bytes = HEADER,
    ) -> None:
        self.path = path
        self.averages: EventFile | None = None  # opened by the first evaluation of an average
        self.averaged: dict[str, None] = {}  # the averages that have a curve, in their order
        self.last = _evaluations_of_last(rows)
        record: dict[str, Any] = {
            "algo": algo,
            "seed": seed,
            "run": dataclasses.asdict(config),
            "agent": dataclasses.asdict(agent_config),
            "versions": versions(config.device),
        }
        self.hyperparameters = {"algo": algo, "seed": seed} | record["run"] | record["agent"]
        if resume_at is None or not _is_json(path / "config.json"):
            with write_whole(path / "config.json") as file:
                file.write(json.dumps(record, indent=2).encode() + b"\n")
        with write_whole(path / TABLE) as file:
            file.write(rows)
        self.size, self._digest = len(rows), hashlib.sha256(rows)
        self.table = (path / TABLE).open("ab")
        self.events = EventFile(path, resume_at)
        if resume_at is None:
            lines = "\n".join(f"| {key} | {value} |" for key, value in self.hyperparameters.items())
            table = f"| name | value |\n|---|---|\n{lines}"
            self.events.add(summary.text("hyperparameters", table))
            layout = {
                about: {title: ["Multiline", [tags]] for title, tags in charts.items()}
                for about, charts in CHARTS.items()
            }
            self.events.add(summary.custom_scalars(layout))
        elif (path / AVERAGES).is_dir():
            self.averages = EventFile(path / AVERAGES, resume_at)

    @property
    def mark(self) -> tuple[int, str]:
        """Bytes and SHA-256 of the table so far."""
        return self.size, self._digest.hexdigest()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write values at an environment step to TensorBoard."""
        for tag, value in values.items():
            self.events.scalar(tag, value, step)

    def evaluation(
        self,
        step: int,
        scheme: str,
        returns: NDArray[np.float64],
        lengths: NDArray[np.int64],
        curve: bool = True,
    ) -> None:
        """Write one scheme's evaluation episodes [E]; to TensorBoard only as part of a curve."""
        if curve:
            self._events_of(scheme).scalar(f"eval/{scheme}", returns.mean(), step)
        data = b"".join(
            f"{step},{scheme},{episode},{float(total)},{length}\r\n".encode()
            for episode, (total, length) in enumerate(zip(returns, lengths, strict=True))
        )
        self.table.write(data)
        self.table.flush()
        (self.path / TABLE).stat()  # a run whose folder is gone does not go on
        self.size += len(data)
        self._digest.update(data)
        if scheme == LAST.name:
            self.last.append((step, returns))

    def sync(self) -> None:
        """Bring what was written to the disk."""
        os.fsync(self.table.fileno())
        self._flush(sync=True)

    def finish(self, policy: Mapping[str, Tensor], *, completed: bool = True) -> None:
        """Save the policy's weights; of a completed run, the score beside the hyper-parameters."""
        with write_whole(self.path / "policy.pt") as file:
            torch.save(dict(policy), file)
        if completed and self.last:
            plain = {
                # a bool would be shown as 0.0000 or 1.0000
                key: value if type(value) in (int, float) else str(value)
                for key, value in self.hyperparameters.items()
            }
            experiment, start, end = summary.hparams(plain, {"eval/last": 0.0})
            self._describe(experiment.value[0].metadata.plugin_data)
            for entry in (experiment, start, end):
                self.events.add(entry, self.last[-1][0])
        self._flush()

    def close(self) -> None:
        """Close the files."""
        self.events.close()
        if self.averages:
            self.averages.close()
        with suppress(OSError):  # what waits in it could not be written before, which was said
            self.table.close()

    def _events_of(self, scheme: str) -> EventFile:
        """Where a scheme's evaluations go."""
        if scheme == LAST.name:
            return self.events
        self.averaged[scheme] = None
        if self.averages is None:
            self.averages = EventFile(self.path / AVERAGES)
        return self.averages

    def _flush(self, *, sync: bool = False) -> None:
        for events in (self.events, self.averages):
            if events:
                events.flush(sync=sync)

    def _describe(self, plugin_data: Any) -> None:
        """Say which columns of TensorBoard's table of hyper-parameters are worth opening with.

        It opens with five, those that are marked as differing first, then by the alphabet.
        """
        description = HParamsPluginData.FromString(plugin_data.content)
        for info in description.experiment.hparam_infos:
            info.differs = info.name in COLUMNS
        for scheme in self.averaged:
            tag = f"eval/{scheme}"
            name = MetricName(tag=tag, group=AVERAGES)
            description.experiment.metric_infos.add(name=name, display_name=tag)
        plugin_data.content = description.SerializeToString()


def _evaluations_of_last(rows: bytes) -> list[tuple[int, NDArray[np.float64]]]:
    """The steps and returns of the last iterate's evaluations in a table."""
    returns = dict[int, list[float]]()
    for step, scheme, _, total, _ in csv.reader(rows.decode().splitlines()[1:]):
        if scheme == LAST.name:
            returns.setdefault(int(step), []).append(float(total))
    return [(step, np.array(each)) for step, each in returns.items()]


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return True
