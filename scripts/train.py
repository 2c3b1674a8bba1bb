"""Train DQN, DDPG, SAC or TD3 on a Gymnasium environment.

    python -m scripts.train dqn --env-id CartPole-v1
    python -m scripts.train sac --env-id Pendulum-v1 --seed 2 --learning-rate 3e-4
    python -m scripts.train dqn --env-id ALE/Pong-v5  # needs the group atari
    python -m scripts.train --resume runs/RUN

The defaults are the preset of the algorithm for the environment (agents/presets.py);
`python -m scripts.train sac --env-id Pendulum-v1 --help` shows them. A run that was stopped, or
killed at any moment, goes on from its last checkpoint with --resume and ends, to the bit on CPU,
as if nothing had happened; of seeds trained together, RUN is the first one's folder.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Generic, TypeVar

import numpy as np
import torch
import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from tyro.conf import OmitArgPrefixes, subcommand

from agents.averaging import default_rules, evaluate_averages, record_policy
from agents.checkpoint import Checkpoints, newest, restore
from agents.ddpg import DDPGConfig
from agents.dqn import DQNConfig
from agents.environments import EnvironmentFault
from agents.malloc import keep_freed_memory
from agents.networks import select_member, stack_members
from agents.nonfinite import NonFiniteError
from agents.presets import ALGORITHMS, preset
from agents.sac import SACConfig
from agents.td3 import TD3Config
from agents.training import TrainConfig, Training, crossings
from polyak_rl import PolicyAverages
from scripts.enjoy import drawn_env, open_env, play
from scripts.experiment.run_folder import RunFolder, new_run_folder

DEFAULT_ENV = {
    "dqn": "CartPole-v1",
    "ddpg": "Pendulum-v1",
    "sac": "Pendulum-v1",
    "td3": "Pendulum-v1",
}

AgentConfig = TypeVar("AgentConfig")


@dataclass(frozen=True)
class Options(Generic[AgentConfig]):
    """Train on a Gymnasium environment; the defaults are its preset."""

    run: TrainConfig
    agent: AgentConfig
    seed: int = 1
    """the training seed, 0 or more"""
    seeds: str | None = None
    """several instead: 1..20, or 1,5,7; with --together"""
    together: bool = False
    """train the seeds in one process, as members of the same networks; each seed's run is the same,
    to the bit on CPU, as if it were alone"""
    threads: int = 1
    """threads inside one operation of torch; more are slower on networks of this size"""
    runs_dir: Path = Path("runs")
    """folder in which each run's folder is made"""
    averages: bool = True
    """keep averages of the policy beside it, and the timeline for scripts.posthoc"""
    segments: int | None = None
    """segments of the timeline; each takes the memory of the policy's weights in float64. None:
    256, or as many as 512 MiB a seed hold"""
    checkpoint_every: int = 10_000
    """environment steps between two checkpoints for --resume; 0: only at the beginning, at the end
    and when stopped (Ctrl-C, SIGTERM)"""
    checkpoint_replay: bool = True
    """keep the replay buffer on disk too; without it a resumed run is not the same"""
    video: bool = False
    """record an episode of the final policy"""


@dataclass
class Run:
    """A training and all that is kept of it."""

    algo: str
    options: Options[Any]
    training: Training
    averages: PolicyAverages | None
    folders: list[RunFolder]
    checkpoints: Checkpoints
    lock: IO[str]
    """held by this process as long as it is open"""
    tried_at: int
    """environment step of the last checkpoint, written or not"""

    def save(self) -> None:
        """Write a checkpoint; training goes on where that fails."""
        self.tried_at = self.training.step
        try:
            for folder in self.folders:
                folder.sync()
            self.checkpoints.save()
        except OSError as error:
            at = f"step {self.training.step:,} of {self.checkpoints.folder}"
            print(f"warning: the checkpoint at {at} was not written: {error}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        path = folder_to_resume(argv)
        run = set_up(*parse(argv)) if path is None else resume(path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if run is None:
        print(f"{path} has finished: there is nothing to resume.")
        return 0

    try:
        return train(run)
    except (NonFiniteError, EnvironmentFault) as error:
        print(f"error: {error}", file=sys.stderr)
        print(
            f"The last good checkpoint is of step {run.checkpoints.step:,}. From there it happens "
            "again, for a debugger.",
            file=sys.stderr,
        )
        print(how_to_go_on(run), file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        print(how_to_go_on(run), file=sys.stderr)
        return 1


def train(run: Run) -> int:
    """Train to the end or until stopped, and leave what there is; returns the exit code."""
    training, started = run.training, time.perf_counter()
    with contextlib.closing(training), contextlib.ExitStack() as stack:
        stack.enter_context(run.lock)
        for folder in run.folders:
            stack.enter_context(contextlib.closing(folder))
        with stops_on_interrupt(training) as signals:
            train_with_progress(run)
            completed = training.step >= training.config.total_steps
            if not completed:
                run.save()  # first: whoever asked to stop may not wait
            for member, folder in enumerate(run.folders):
                keep(training, run.averages, member, folder, completed=completed)
            if completed:
                run.save()  # last: it says that all is done
        seconds = time.perf_counter() - started
        for member, folder in enumerate(run.folders):
            if run.options.video:
                record(run.algo, training, member, folder)
            print(summary(run.algo, training, member, folder, seconds))
    print(how_to_see(run.folders))
    if completed:
        return 0
    print(how_to_go_on(run))
    return 128 + signals[0]


def folder_to_resume(argv: Sequence[str]) -> Path | None:
    """The folder after --resume.

    Raises:
        ValueError: Something else is asked for besides.
    """
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scan.add_argument("--resume", type=Path, default=None)
    try:
        known, others = scan.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(f"--resume takes the folder of a run: {error.message}") from error
    if known.resume is not None and others:
        raise ValueError(f"--resume goes on as the run began: {' '.join(others)} cannot be changed")
    path: Path | None = known.resume
    return path


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
        | Annotated[Options[TD3Config], subcommand("td3", default=default("td3"))]
    )
    options: Options[Any] = tyro.cli(
        OmitArgPrefixes[choice],  # type: ignore[valid-type]
        args=argv,
        prog="python -m scripts.train",
        description="Train DQN, DDPG, SAC or TD3 on a Gymnasium environment.",
    )
    if options.threads < 1:
        raise ValueError(f"threads must be at least 1, got {options.threads}")
    device = resolve_device(options.run.device)
    run = dataclasses.replace(options.run, device=device)
    algo = next(name for name, (_, c) in ALGORITHMS.items() if type(options.agent) is c)
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


def chosen_seeds(options: Options[Any]) -> tuple[int, ...]:
    """The seeds of a command line.

    Raises:
        ValueError: They are not written as 1..20 or 1,5,7, or several were not asked for together.
    """
    if options.seeds is None:
        return (options.seed,)
    try:
        if ".." in options.seeds:
            first, last = map(int, options.seeds.split(".."))
            seeds = tuple(range(first, last + 1))
        else:
            seeds = tuple(map(int, options.seeds.split(",")))
    except ValueError:
        raise ValueError(f"seeds must be like 1..20 or 1,5,7, got {options.seeds!r}") from None
    if len(seeds) > 1 and not options.together:
        raise ValueError("several seeds in one process need --together; or start one process each")
    return seeds


def build(algo: str, options: Options[Any]) -> tuple[Training, PolicyAverages | None]:
    """The training of a command line, and its averages as schemes of evaluation."""
    if options.checkpoint_every < 0:
        raise ValueError(f"checkpoint_every must be at least 0, got {options.checkpoint_every}")
    if options.video:
        drawn_env(options.run.env_id, "rgb_array").close()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    training = Training(algo, options.agent, options.run, chosen_seeds(options))
    if not options.averages:
        return training, None
    rules = default_rules(training.total_updates)
    averages = record_policy(training, rules, options.segments)
    evaluate_averages(training, averages)
    return training, averages


def set_up(algo: str, options: Options[Any]) -> Run:
    """Build everything that can be refused; the run's folder is made last."""
    training, averages = build(algo, options)
    folders: list[RunFolder] = []
    try:
        for seed in training.seeds:
            path = new_run_folder(options.runs_dir, options.run.env_id, algo, seed)
            try:
                folders.append(RunFolder(path, algo, seed, options.run, options.agent))
            except OSError:
                shutil.rmtree(path, ignore_errors=True)
                raise
        about = {
            "algo": algo,
            "options": dataclasses.asdict(options) | {"runs_dir": str(options.runs_dir)},
            "folders": [folder.path.name for folder in folders],
        }
        checkpoints = Checkpoints(
            folders[0].path / "checkpoint",
            training,
            averages,
            about,
            replay=options.checkpoint_replay,
        )
        held = lock(folders[0].path)
        checkpoints.save()  # from here on the run can be resumed
    except (ValueError, OSError):
        for folder in folders:
            folder.close()
            shutil.rmtree(folder.path, ignore_errors=True)
        raise
    training.logs = tuple(folders)
    return Run(algo, options, training, averages, folders, checkpoints, held, training.step)


def resume(path: Path) -> Run | None:
    """Build a run as its last checkpoint says, or None if it has finished.

    Nothing is written before everything has been read and verified.

    Raises:
        ValueError: There is no checkpoint that can be used, or the run still goes on.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not the folder of a run")
    checkpoint, notes = newest(path / "checkpoint")
    algo, options = recorded(checkpoint.about)
    if checkpoint.step >= options.run.total_steps:
        return None
    resolve_device(options.run.device)
    held = lock(path)
    training, averages = build(algo, options)
    notes += restore(checkpoint, training, averages)
    paths = [path, *(path.parent / Path(name).name for name in checkpoint.about["folders"][1:])]
    folders = [
        RunFolder(each, algo, seed, options.run, options.agent, resume_at=training.step)
        for each, seed in zip(paths, training.seeds, strict=True)
    ]
    training.logs = tuple(folders)
    print(f"Resumed at step {training.step:,}.")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    with (path / "resumed.txt").open("a") as file:
        exact = "; ".join(notes) or "exact"
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} step {training.step}: {exact}\n")
    checkpoints = Checkpoints(
        checkpoint.folder,
        training,
        averages,
        checkpoint.about,
        replay=options.checkpoint_replay,
        after=checkpoint,
    )
    return Run(algo, options, training, averages, folders, checkpoints, held, training.step)


def lock(folder: Path) -> IO[str]:
    """Take a run for this process; the system gives it free when the process ends, however.

    Raises:
        ValueError: Another process has it.
    """
    file = (folder / "config.json").open()
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{folder} is being trained by another process") from None
    return file


def recorded(about: dict[str, Any]) -> tuple[str, Options[Any]]:
    """The algorithm and options that a checkpoint recorded.

    Raises:
        ValueError: They are not those of this program.
    """
    try:
        algo, values = about["algo"], dict(about["options"])
        agent = {k: tuple(v) if isinstance(v, list) else v for k, v in values.pop("agent").items()}
        run = TrainConfig(**values.pop("run"))
        values["runs_dir"] = Path(values["runs_dir"])
        return algo, Options(run=run, agent=ALGORITHMS[algo][1](**agent), **values)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint is of another version of this program: {error}") from None


def keep(
    training: Training,
    averages: PolicyAverages | None,
    member: int,
    folder: RunFolder,
    *,
    completed: bool,
) -> None:
    """Write a seed's last policy and timeline to its folder."""
    folder.finish(member_policy(training, member).state_dict(), completed=completed)
    if averages and averages.timeline and averages.timeline.updates:
        policy = member_policy(training, member)
        timeline = averages.timeline.member(member, like=policy)
        timeline.save(folder.path / "timeline.pt", dtype=torch.float32)


def record(algo: str, training: Training, member: int, folder: RunFolder) -> None:
    """Record an episode of a seed's final policy."""
    env = open_env(training.config.env_id, folder.path / "videos")
    policy = member_policy(training, member).cpu()
    list(play(policy, env, algo, training.eval_seeds[member, :1].tolist()))
    env.close()


def member_policy(training: Training, member: int) -> nn.Module:
    """The policy of one seed, as a network of one member."""
    state = training.agent.policy.state_dict()
    return stack_members(training.agent.policy, [select_member(state, member, len(training.seeds))])


@contextlib.contextmanager
def stops_on_interrupt(training: Training) -> Iterator[list[int]]:
    """The first Ctrl-C or SIGTERM ends the run after the step under way, the second at once.

    Yields:
        The signals that came.
    """
    came: list[int] = []

    def stop(signum: int, frame: Any) -> None:
        came.append(signum)
        if training.stopping:
            raise KeyboardInterrupt
        training.stopping = True

    previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train_with_progress(run: Run) -> None:
    """Run the training under a progress bar with its speed and the latest return."""
    training, every = run.training, run.options.checkpoint_every
    total = training.config.total_steps
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TextColumn("{task.fields[speed]:,.0f} steps/s"),
        TextColumn("return {task.fields[latest]:.1f}"),
        TimeRemainingColumn(),
    )
    started, first = time.perf_counter(), training.step
    shown = 0.0
    with Progress(*columns) as progress:
        bar = progress.add_task(
            f"{run.algo} {training.config.env_id}", total=total, speed=0.0, latest=float("nan")
        )

        def after_step() -> None:
            nonlocal shown
            due = every and crossings(run.tried_at, training.step, every)
            if due and training.step < total:
                run.save()
            now = time.perf_counter()
            if now - shown > 0.1 or training.step >= total:
                shown = now
                progress.update(
                    bar,
                    completed=training.step,
                    speed=(training.step - first) / (now - started),
                    latest=float(np.mean(training.latest_return)),
                )

        training.run(after_step)


def summary(algo: str, training: Training, member: int, folder: RunFolder, seconds: float) -> str:
    """What a seed learned."""
    lines = [
        f"{algo} on {training.config.env_id}, seed {training.seeds[member]}: {training.step:,} "
        f"environment steps, {training.updates:,} gradient steps in {seconds:.0f} s."
    ]
    if training.step < training.config.total_steps:
        lines.append(f"Stopped before the end ({training.config.total_steps:,} steps).")
    if training.skipped:
        lines.append(
            f"{training.skipped:,} transitions and gradient steps were not finite: skipped."
        )
    if not folder.last:
        return "\n".join([*lines, "It was not evaluated."])
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
            mean = result.returns[member].mean()
            lines.append(f"  {name}, the average instead: {mean:.1f} ({mean - last.mean():+.1f})")
    return "\n".join(lines)


def how_to_see(folders: Sequence[RunFolder]) -> str:
    """Where the files are, and what to type next."""
    path = folders[0].path
    return "\n".join(
        [
            *(f"Files: {folder.path}" for folder in folders),
            f"Curves: tensorboard --logdir {path.parent}",
            f"Play: python -m scripts.enjoy {path}",
            f"Other averages: python -m scripts.posthoc {path} --rule tail:0.3",
        ]
    )


def how_to_go_on(run: Run) -> str:
    """What to type to resume."""
    return f"Go on: python -m scripts.train --resume {run.folders[0].path}"


if __name__ == "__main__":
    sys.exit(main())
