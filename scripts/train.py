"""Train DQN, DDPG or SAC on a Gymnasium environment.

    python -m scripts.train dqn --env-id CartPole-v1
    python -m scripts.train sac --env-id Pendulum-v1 --seed 2 --learning-rate 3e-4

The defaults are the preset of the algorithm for the environment (agents/presets.py);
`python -m scripts.train sac --env-id Pendulum-v1 --help` shows them.
"""

import argparse
import contextlib
import dataclasses
import functools
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import numpy as np
import torch
import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tyro.conf import OmitArgPrefixes, subcommand

from agents.averaging import PolicyAverages, default_rules
from agents.ddpg import DDPGConfig
from agents.dqn import DQNConfig
from agents.networks import select_member
from agents.presets import ALGORITHMS, preset
from agents.sac import SACConfig
from agents.training import TrainConfig, Training
from scripts.enjoy import drawn_env, open_env, play
from scripts.run_folder import RunFolder, new_run_folder

DEFAULT_ENV = {"dqn": "CartPole-v1", "ddpg": "Pendulum-v1", "sac": "Pendulum-v1"}

AgentConfig = TypeVar("AgentConfig")


@dataclass(frozen=True)
class Options(Generic[AgentConfig]):
    """Train on a Gymnasium environment; the defaults are its preset."""

    run: TrainConfig
    agent: AgentConfig
    seed: int = 1
    """the training seed, 0 or more"""
    threads: int = 1
    """threads inside one operation of torch; more are slower on networks of this size"""
    runs_dir: Path = Path("runs")
    """folder in which the run's folder is made"""
    averages: bool = True
    """keep averages of the policy beside it, and the timeline for scripts.posthoc"""
    segments: int = 256
    """segments of the timeline; each takes the memory of the policy's weights in float64"""
    video: bool = False
    """record an episode of the final policy"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        algo, options = parse(argv)
        torch.set_num_threads(options.threads)
        training, averages, folder = set_up(algo, options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    started = time.perf_counter()
    with contextlib.closing(training), contextlib.closing(folder):
        with stops_on_interrupt(training):
            train_with_progress(algo, training)
        state = training.agent.policy.state_dict()
        folder.finish(select_member(state, 0, seeds=1))
        if averages and averages.timeline.updates:
            averages.timeline.save(folder.path / "timeline.pt", dtype=torch.float32)
        if options.video:
            env = open_env(options.run.env_id, folder.path / "videos")
            list(play(training.agent.policy.cpu(), env, algo, training.eval_seeds[0, :1].tolist()))
            env.close()
    print(summary(algo, options.seed, training, folder, time.perf_counter() - started))
    return 130 if training.stopping else 0


def parse(argv: Sequence[str]) -> tuple[str, Options[Any]]:
    """The algorithm and the options of a command line; the preset fills what it leaves out."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument("--env-id", "--env_id", default=None)
    env_id = scan.parse_known_args(argv)[0].env_id

    def default(algo: str) -> Options[Any]:
        agent, total_steps = preset(algo, env_id or DEFAULT_ENV[algo])
        run = TrainConfig(env_id or DEFAULT_ENV[algo], total_steps, device="auto")
        return Options(run=run, agent=agent)

    choice = (
        Annotated[Options[DQNConfig], subcommand("dqn", default=default("dqn"))]
        | Annotated[Options[DDPGConfig], subcommand("ddpg", default=default("ddpg"))]
        | Annotated[Options[SACConfig], subcommand("sac", default=default("sac"))]
    )
    options: Options[Any] = tyro.cli(
        OmitArgPrefixes[choice],  # type: ignore[valid-type]
        args=argv,
        prog="python -m scripts.train",
        description="Train DQN, DDPG or SAC on a Gymnasium environment.",
    )
    if options.threads < 1:
        raise ValueError(f"threads must be at least 1, got {options.threads}")
    device = resolve_device(options.run.device)
    run = dataclasses.replace(options.run, device=device)
    algo = next(name for name, (_, c) in ALGORITHMS.items() if isinstance(options.agent, c))
    return algo, dataclasses.replace(options, run=run)


def resolve_device(name: str) -> str:
    """torch's name of a device that can be used; "auto" takes a GPU where there is one.

    Raises:
        ValueError: torch does not know the device, or it is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}") from error
    return name


def set_up(algo: str, options: Options[Any]) -> tuple[Training, PolicyAverages | None, RunFolder]:
    """Build everything that can be refused; the run's folder is made last."""
    if options.video:
        drawn_env(options.run.env_id, "rgb_array").close()
    training = Training(algo, options.agent, options.run, seeds=(options.seed,))
    averages = None
    if options.averages:
        averages = PolicyAverages(training, default_rules(training.total_updates), options.segments)
        for name in averages.bank.rules:
            training.schemes[name] = functools.partial(averages.average, name)
        training.diagnostics.append(averages.distances)
    path = new_run_folder(options.runs_dir, options.run.env_id, algo, options.seed)
    try:
        folder = RunFolder(path, algo, options.seed, options.run, options.agent)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)
        raise
    training.logs = (folder,)
    return training, averages, folder


@contextlib.contextmanager
def stops_on_interrupt(training: Training) -> Iterator[None]:
    """The first Ctrl-C ends the run after the step under way, the second at once."""

    def stop(signum: int, frame: Any) -> None:
        if training.stopping:
            raise KeyboardInterrupt
        training.stopping = True

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def train_with_progress(algo: str, training: Training) -> None:
    """Run the training under a progress bar with its speed and the latest return."""
    total = training.config.total_steps
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TextColumn("{task.fields[speed]:,.0f} steps/s"),
        TextColumn("return {task.fields[latest]:.1f}"),
        TimeRemainingColumn(),
    )
    started = time.perf_counter()
    shown = 0.0
    with Progress(*columns) as progress:
        bar = progress.add_task(
            f"{algo} {training.config.env_id}", total=total, speed=0.0, latest=float("nan")
        )

        def show() -> None:
            nonlocal shown
            now = time.perf_counter()
            if now - shown > 0.1 or training.step >= total:
                shown = now
                progress.update(
                    bar,
                    completed=training.step,
                    speed=training.step / (now - started),
                    latest=training.latest_return[0],
                )

        training.run(show)


def summary(algo: str, seed: int, training: Training, folder: RunFolder, seconds: float) -> str:
    """What was learned, where the files are, and how to see them."""
    lines = [
        f"{algo} on {training.config.env_id}, seed {seed}: {training.step:,} environment steps, "
        f"{training.updates:,} gradient steps in {seconds:.0f} s."
    ]
    if training.stopping:
        lines.append(f"Stopped before the end ({training.config.total_steps:,} steps).")
    if folder.last:
        first_step, first, _ = folder.last[0]
        last_step, last, _ = folder.last[-1]
        lines += [
            f"Evaluation, deterministic, the same {len(last)} episodes each time:",
            f"  at step {first_step:,}: mean return {first.mean():.1f}",
            f"  at step {last_step:,}: mean return {last.mean():.1f} "
            f"(episodes from {np.min(last):.1f} to {np.max(last):.1f})",
        ]
        for name, result in training.evaluations.items():
            if name != "last":
                mean = result.returns[0].mean()
                lines.append(
                    f"  {name}, the average instead: {mean:.1f} ({mean - last.mean():+.1f})"
                )
    else:
        lines.append("It was not evaluated.")
    lines += [
        f"Files: {folder.path}",
        f"Curves: tensorboard --logdir {folder.path.parent}",
        f"Play: python -m scripts.enjoy {folder.path}",
        f"Other averages: python -m scripts.posthoc {folder.path} --rule tail:0.3",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
