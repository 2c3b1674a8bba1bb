"""One seed's run on disk: TensorBoard events, configuration, evaluations, and the final policy."""

import csv
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from tensorboard.plugins.hparams.api_pb2 import MetricName
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from agents.training import TrainConfig
from polyak_rl.files import write_whole

LAYOUT = {
    "evaluation": {
        "last iterate, uniform average of the last half": [
            "Multiline",
            ["eval/(last|tail50|suffix50)$"],
        ],
        "last iterate, EMA": ["Multiline", ["eval/(last|ema1)$"]],
        "every scheme": ["Multiline", ["eval/.*"]],
    },
    "weights": {
        "distance of the uniform average to the last": [
            "Multiline",
            ["averaging/distance_to_last/tail50$"],
        ],
        "distance of the EMA to the last": ["Multiline", ["averaging/distance_to_last/ema1$"]],
        "lag of target networks": ["Multiline", ["target/.*"]],
    },
}
"""The charts under TensorBoard's custom scalars.

TensorBoard has one colour for a folder's curves, and tells them apart by marks that it gives out
anew for each folder. So the averages' evaluations have a folder of their own, and where it can be,
a chart has one curve of each folder.
"""
AVERAGES = "averages"
"""The folder of TensorBoard events in a run's folder that has the evaluations of averages."""
COLUMNS = ("algo", "env_id", "learning_rate", "seed", "total_steps")
"""The hyper-parameters that TensorBoard's table shows without being asked."""
CSV_COLUMNS = ("step", "scheme", "episode", "return", "length")


def new_run_folder(root: Path, env_id: str, algo: str, seed: int) -> Path:
    """Make `root/<env>__<algo>__<seed>__<time>`, numbered on if two runs begin in one second.

    Raises:
        ValueError: The folder cannot be made.
    """
    name = f"{env_id.replace('/', '-')}__{algo}__{seed}__{time.strftime('%Y%m%d-%H%M%S')}"
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


class RunFolder:
    """Writes what `agents.training.Log` is told, and the rest of a run's record.

    `evaluations.csv` has a row per scheme and episode; it is flushed after each evaluation, so a
    run that is cut short leaves what it had. `evaluations.npz` has the last iterate's evaluations
    in the form of Stable-Baselines3's EvalCallback.

    Args:
        path: An existing folder.
        algo: Name of the algorithm.
        seed: The training seed.
        config: The run's configuration.
        agent_config: The algorithm's.
        resume_at: Environment step from which the run goes on; what was written of later steps is
            taken back. None begins a run.
    """

    def __init__(
        self,
        path: Path,
        algo: str,
        seed: int,
        config: TrainConfig,
        agent_config: Any,
        resume_at: int | None = None,
    ) -> None:
        self.path = path
        self.averages: SummaryWriter | None = None  # opened by the first evaluation of an average
        self.averaged: dict[str, None] = {}  # the averages that have a curve, in their order
        self.last: list[tuple[int, NDArray[np.float64], NDArray[np.int64]]] = []
        record = {
            "algo": algo,
            "seed": seed,
            "run": dataclasses.asdict(config),
            "agent": dataclasses.asdict(agent_config),
            "versions": {
                "torch": torch.__version__,
                "gymnasium": gymnasium.__version__,
                "numpy": np.__version__,
            },
        }
        self.hyperparameters = {"algo": algo, "seed": seed} | record["run"] | record["agent"]
        if resume_at is not None:
            self._resume(resume_at)
            return
        (path / "config.json").write_text(json.dumps(record, indent=2) + "\n")
        self.writer = SummaryWriter(str(path))
        table = "\n".join(f"| {key} | {value} |" for key, value in self.hyperparameters.items())
        self.writer.add_text("hyperparameters", f"| name | value |\n|---|---|\n{table}")
        self.writer.add_custom_scalars(LAYOUT)
        self.csv_file = (path / "evaluations.csv").open("w", newline="")
        self.csv = csv.writer(self.csv_file)
        self.csv.writerow(CSV_COLUMNS)
        self.csv_file.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write values at an environment step to TensorBoard."""
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

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
            self._writer_of(scheme).add_scalar(f"eval/{scheme}", returns.mean(), step)
        for episode, (total, length) in enumerate(zip(returns, lengths, strict=True)):
            self.csv.writerow((step, scheme, episode, float(total), int(length)))
        self.csv_file.flush()
        if scheme == "last":
            self.last.append((step, returns, lengths))
            self._write_archive()

    def sync(self) -> None:
        """Bring what was written to the disk, TensorBoard's queue included."""
        self._flush()
        for path in (self.path / "evaluations.csv", *self._event_files()):
            with path.open("rb") as file:
                os.fsync(file.fileno())

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
            experiment, start, end = hparams(plain, {"eval/last": 0.0})
            self._describe(experiment.value[0].metadata.plugin_data)
            for summary in (experiment, start, end):
                self.writer.file_writer.add_summary(summary, self.last[-1][0])
        self._flush()

    def close(self) -> None:
        """Close the files."""
        self.writer.close()
        if self.averages:
            self.averages.close()
        self.csv_file.close()

    def _writer_of(self, scheme: str) -> SummaryWriter:
        """Where a scheme's evaluations go."""
        if scheme == "last":
            return self.writer
        self.averaged[scheme] = None
        if self.averages is None:
            self.averages = SummaryWriter(str(self.path / AVERAGES))
        return self.averages

    def _flush(self) -> None:
        self.writer.flush()
        if self.averages:
            self.averages.flush()

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

    def _event_files(self) -> list[Path]:
        folders = (self.path, self.path / AVERAGES)
        return [path for folder in folders for path in folder.glob("events.out.tfevents.*")]

    def _write_archive(self) -> None:
        fewest = min(len(row) for _, row, _ in self.last)  # the file holds a rectangle
        steps = np.array([step for step, _, _ in self.last])
        all_returns = np.stack([row[:fewest] for _, row, _ in self.last])
        all_lengths = np.stack([row[:fewest] for _, _, row in self.last])
        partial = self.path / "evaluations.partial.npz"
        np.savez(partial, timesteps=steps, results=all_returns, ep_lengths=all_lengths)
        partial.replace(self.path / "evaluations.npz")

    def _resume(self, step: int) -> None:
        """Take back what was written of steps after this one, and go on writing."""
        table = self.path / "evaluations.csv"
        kept, last = [",".join(CSV_COLUMNS) + "\r\n"], dict[int, list[list[str]]]()
        for line in table.read_bytes().decode(errors="replace").splitlines(keepends=True)[1:]:
            row = line.split(",")
            if not line.endswith("\r\n") or len(row) != len(CSV_COLUMNS):
                continue  # torn when the run was killed
            if int(row[0]) <= step:
                kept.append(line)
                if row[1] == "last":
                    last.setdefault(int(row[0]), []).append(row)
        self.last = [
            (at, np.array([float(row[3]) for row in rows]), np.array([int(row[4]) for row in rows]))
            for at, rows in last.items()
        ]
        with write_whole(table) as file:
            file.write("".join(kept).encode())
        if self.last:
            self._write_archive()
        else:
            (self.path / "evaluations.npz").unlink(missing_ok=True)
        self.csv_file = table.open("a", newline="")
        self.csv = csv.writer(self.csv_file)
        self._wait_for_a_later_name()
        self.writer = SummaryWriter(str(self.path), purge_step=step + 1)
        if (self.path / AVERAGES).is_dir():
            self.averages = SummaryWriter(str(self.path / AVERAGES), purge_step=step + 1)

    def _wait_for_a_later_name(self) -> None:
        """TensorBoard reads event files in the order of their names, which begin with a second."""
        seconds = [int(p.name.split(".")[3]) for p in self._event_files()]
        time.sleep(min(1.0, max(0.0, max(seconds, default=0) + 1 - time.time())))
