"""One seed's run on disk: TensorBoard events, configuration, evaluations, and the final policy."""

import csv
import dataclasses
import itertools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from agents.training import TrainConfig

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
    """

    def __init__(
        self, path: Path, algo: str, seed: int, config: TrainConfig, agent_config: Any
    ) -> None:
        self.path = path
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
        (path / "config.json").write_text(json.dumps(record, indent=2) + "\n")
        self.hyperparameters = {"algo": algo, "seed": seed} | record["run"] | record["agent"]

        self.writer = SummaryWriter(str(path))
        table = "\n".join(f"| {key} | {value} |" for key, value in self.hyperparameters.items())
        self.writer.add_text("hyperparameters", f"| name | value |\n|---|---|\n{table}")
        self.writer.add_custom_scalars(
            {"evaluation": {"last iterate and averages": ["Multiline", ["eval/.*"]]}}
        )
        self.csv_file = (path / "evaluations.csv").open("w", newline="")
        self.csv = csv.writer(self.csv_file)
        self.csv.writerow(CSV_COLUMNS)
        self.csv_file.flush()
        self.last: list[tuple[int, NDArray[np.float64], NDArray[np.int64]]] = []

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
            self.writer.add_scalar(f"eval/{scheme}", returns.mean(), step)
        for episode, (total, length) in enumerate(zip(returns, lengths, strict=True)):
            self.csv.writerow((step, scheme, episode, float(total), int(length)))
        self.csv_file.flush()
        if scheme == "last":
            self.last.append((step, returns, lengths))
            fewest = min(len(row) for _, row, _ in self.last)  # the file holds a rectangle
            steps = np.array([step for step, _, _ in self.last])
            all_returns = np.stack([row[:fewest] for _, row, _ in self.last])
            all_lengths = np.stack([row[:fewest] for _, _, row in self.last])
            partial = self.path / "evaluations.partial.npz"
            np.savez(partial, timesteps=steps, results=all_returns, ep_lengths=all_lengths)
            partial.replace(self.path / "evaluations.npz")

    def finish(self, policy: Mapping[str, Tensor]) -> None:
        """Save the final policy's weights, its score beside the hyper-parameters, and close."""
        torch.save(dict(policy), self.path / "policy.pt")
        if self.last:
            plain = {
                key: value if isinstance(value, int | float | str | bool) else str(value)
                for key, value in self.hyperparameters.items()
            }
            score = {"eval/last": float(self.last[-1][1].mean())}
            self.writer.add_hparams(plain, score, run_name=".", global_step=self.last[-1][0])
        self.close()

    def close(self) -> None:
        """Close the files."""
        self.writer.close()
        self.csv_file.close()
