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
import dataclasses
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

import numpy as np
import torch
import tyro
from rich.progress import Progress
from tyro.conf import OmitArgPrefixes

from agents.averaging import evaluate_averages, record_policy
from agents.checkpoint import newest
from agents.environments import EnvironmentFault
from agents.malloc import keep_freed_memory
from agents.nonfinite import NonFiniteError
from agents.presets import ALGORITHMS, describe_preset, preset
from agents.training import TrainConfig, Training, crossings
from agents.vector import flattened
from polyak_rl import PolicyAverages
from scripts.experiment import life, tracking
from scripts.experiment.finished import read
from scripts.experiment.life import Run
from scripts.experiment.locks import Hold
from scripts.experiment.room import require_room, size
from scripts.experiment.run_folder import new_run_folder
from scripts.experiment.schemes import SHOWN, rules_of
from scripts.experiment.shipping import require_enough, ship
from scripts.experiment.terminal import stop_signals, unfailing_output, whole_numbers
from scripts.experiment.trust import require_trusted

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
    ship: int | None = None
    """at the end choose the weights to ship on so many episodes, as scripts.ship does; 0: tail25,
    unseen"""
    track: Literal["wandb"] | None = None
    """follow the run in Weights & Biases too, where wandb is installed; WANDB_MODE=offline: here"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, which nothing that is printed can change."""
    with unfailing_output():
        return command(whole_numbers(sys.argv[1:] if argv is None else argv))


def command(argv: Sequence[str]) -> int:
    """Do what a command line asks for; returns the exit code."""
    try:
        path, trust = folder_to_resume(argv)
        started = set_up(*parse(argv)) if path is None else resume(path, trust=trust)
    except (ValueError, OSError, EnvironmentFault) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if started is None:
        print(f"{path} has finished: there is nothing to resume.")
        return 0

    run, options = started
    print(describe_preset(run.algo, options.run.env_id))
    if line := flattened(run.training.envs):
        print(line)
    code = 1
    try:
        code = train_or_explain(run, options)
    finally:
        tracking.end(code)
    return code


def train_or_explain(run: Run, options: Options[Any]) -> int:
    """Train, and say what went wrong if it did; returns the exit code."""
    try:
        return train(run, options)
    except (NonFiniteError, EnvironmentFault) as error:
        print(f"error: {error}", file=sys.stderr)
        print(
            f"The last good checkpoint is of step {run.checkpoints.step:,}. From there it "
            "happens again, for a debugger.",
            file=sys.stderr,
        )
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
    finally:
        close(run)
    print(how_to_go_on(run), file=sys.stderr)
    return 1


def close(run: Run) -> None:
    """Close a run; an environment that raises even then changes nothing of what was kept."""
    try:
        run.close()
    except EnvironmentFault as error:
        print(f"warning: {error}", file=sys.stderr)


def train(run: Run, options: Options[Any]) -> int:
    """Train to the end or until stopped, and leave what there is; returns the exit code."""
    training, began = run.training, time.perf_counter()
    with stop_signals(lambda: setattr(training, "stopping", True)) as signals:
        train_with_progress(run, options)
        completed = training.step >= training.config.total_steps
        if not completed:
            run.try_to_save()  # first: whoever asked to stop may not wait
        run.keep(completed=completed)
        if completed:
            run.try_to_save()  # last: it says that all is done
    seconds = time.perf_counter() - began
    code = 0 if completed else 128 + signals[0]
    for member in range(len(run.folders)):
        print(summary(run, member, seconds))
        if completed and options.ship is not None:
            try:
                print(ship(read(run.folders[member].path, trust=True), options.ship))
            except (ValueError, OSError, EnvironmentFault) as error:
                print(f"error: {error}", file=sys.stderr)
                code = 1
    print(how_to_see(run))
    if not completed:
        print(how_to_go_on(run))
    return code


def folder_to_resume(argv: Sequence[str]) -> tuple[Path | None, bool]:
    """The folder after --resume, and whether --trust stands beside it.

    Raises:
        ValueError: Something else is asked for besides.
    """
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scan.add_argument("--resume", type=Path, default=None)
    scan.add_argument("--trust", action="store_true")
    try:
        known, others = scan.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(f"--resume takes the folder of a run: {error.message}") from error
    if known.resume is not None and others:
        raise ValueError(f"--resume goes on as the run began: {' '.join(others)} cannot be changed")
    return known.resume, known.trust


def parse(argv: Sequence[str]) -> tuple[str, Options[Any]]:
    """The algorithm and the options of a command line; the preset fills what it leaves out."""
    prog = "python -m scripts.train"
    if not argv or argv[0].startswith("-"):
        layout = argparse.RawDescriptionHelpFormatter
        parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=layout)
        parser.add_argument("algo", choices=ALGORITHMS, help="its options: ALGO --help")
        parser.parse_args(argv[:1])  # which exits
    algo, *words = argv
    if any(word.partition("=")[0] == "--lr" for word in words):
        raise ValueError("there is no --lr: the learning rate is --learning-rate")
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    untold = "CartPole-v1" if algo == "dqn" else "Pendulum-v1"
    scan.add_argument("--env-id", "--env_id", default=untold)
    env_id = scan.parse_known_args(words)[0].env_id
    agent, total_steps = preset(algo, env_id)
    run = TrainConfig(env_id, total_steps, eval_processes=None, device="auto")
    options: Options[Any] = tyro.cli(
        OmitArgPrefixes[cast(Any, Options)[type(agent)]],  # type: ignore[misc]
        args=words,
        default=Options(run=run, agent=agent),
        prog=f"{prog} {algo}",
        description="Train DQN, DDPG, SAC or TD3 on a Gymnasium environment. "
        "A run that was stopped or killed goes on with: python -m scripts.train --resume RUN "
        "(--trust, if its environment is of a module of yours).",
    )
    if options.threads < 1:
        raise ValueError(f"threads must be at least 1, got {options.threads}")
    run = dataclasses.replace(options.run, device=resolve_device(options.run.device))
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
        if "Expected one of" in str(error):  # all that torch was ever built for
            raise ValueError(f"device must be cpu, cuda or auto, got {name!r}") from error
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}") from error
    return name


def chosen_seeds(options: Options[Any]) -> tuple[int, ...]:
    """The seeds of a command line.

    Raises:
        ValueError: They are not written as 1..20 or 1,5,7, or several were not asked for together.
    """
    if options.seeds is None:
        if options.together:
            raise ValueError("--together needs several seeds, such as --seeds 1..20")
        return (options.seed,)
    try:
        if ".." in options.seeds:
            first, last = map(int, options.seeds.split(".."))
            seeds = tuple(range(first, last + 1))
        else:
            seeds = tuple(map(int, options.seeds.split(",")))
    except ValueError:
        seeds = ()
    if not seeds:
        raise ValueError(f"seeds must be like 1..20 or 1,5,7, got {options.seeds!r}")
    if len(seeds) > 1 and not options.together:
        raise ValueError("several seeds in one process need --together; or start one process each")
    return seeds


def build(algo: str, options: Options[Any]) -> tuple[Training, PolicyAverages | None]:
    """The training of a command line, and its averages as schemes of evaluation."""
    if options.checkpoint_every < 0:
        raise ValueError(f"checkpoint_every must be at least 0, got {options.checkpoint_every}")
    if options.segments is not None and (options.segments < 2 or options.segments % 2):
        raise ValueError(f"segments must be even and at least 2, got {options.segments}")
    seeds = chosen_seeds(options)
    if options.track:
        tracking.require_wandb()
        if len(seeds) > 1:
            raise ValueError("--track follows one seed: start one process each")
    if options.ship is not None and not options.averages:
        raise ValueError("ship chooses among averages: it cannot be with no-averages")
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    training = Training(algo, options.agent, options.run, seeds)
    if options.ship is not None:
        require_enough(options.ship, "actor" in training.agent.targets)
    if not options.averages:
        return training, None
    rules = rules_of(SHOWN, training.total_updates)
    averages = record_policy(training, rules, options.segments)
    evaluate_averages(training, averages)
    return training, averages


def set_up(algo: str, options: Options[Any]) -> tuple[Run, Options[Any]]:
    """Build everything that can be refused; the run's folder is made last."""
    training, averages = build(algo, options)
    root, keeps = options.runs_dir.expanduser(), size(training, averages)
    replay = keeps.replay if options.checkpoint_replay else 0
    less = "fewer --segments" + f" or --no-checkpoint-replay ({replay >> 20:,} MiB)" * (replay > 0)
    require_room(root, replay + keeps.state + keeps.end, f"give another --runs-dir, {less}")
    paths: list[Path] = []
    with ExitStack() as stack:
        held = stack.enter_context(closing(Hold()))
        try:
            for seed in training.seeds:
                env_id = options.run.env_id
                paths.append(new_run_folder(root, env_id, algo, seed))
                held.take(paths[-1])
            values = dataclasses.asdict(options) | {"runs_dir": str(options.runs_dir)}
            about = {"algo": algo, "options": values}
            if options.track:
                tracking.begin(paths[0], described(algo, options))
            kept = options.checkpoint_replay
            run = life.begin(training, averages, held, paths, about, replay=kept)
            stack.callback(run.close)
            run.save()  # from here on the run can be resumed
        except (ValueError, OSError):
            for path in paths:
                shutil.rmtree(path, ignore_errors=True)
            raise
        stack.pop_all()
    return run, options


def resume(path: Path, *, trust: bool = False) -> tuple[Run, Options[Any]] | None:
    """Build a run as its last checkpoint says, or None if it has finished.

    Nothing is written before everything has been read and verified.

    Args:
        path: The run's folder, of several seeds the first one's.
        trust: Import the module that the run's environment names.

    Raises:
        ValueError: There is no checkpoint that can be used, or the run still goes on.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not the folder of a run")
    if not any((path / life.CHECKPOINT).glob("*.json")):
        raise ValueError(f"there is no checkpoint in {path / life.CHECKPOINT}")
    with ExitStack() as stack:
        held = stack.enter_context(closing(Hold()))
        held.take(path)  # then read: nobody else writes
        checkpoint, notes = newest(path / life.CHECKPOINT)
        algo, options = recorded(checkpoint.about)
        paths = life.folders_of(path, checkpoint)
        there = [each for each in paths if each.exists()]
        kept = all(life.is_kept(each, checkpoint) for each in there)
        if kept and checkpoint.step >= options.run.total_steps:
            return None
        for other in there[1:]:
            held.take(other)
        for name in (options.run.env_id, *options.run.wrap):
            require_trusted(name, path, trust=trust)
        resolve_device(options.run.device)
        training, averages = build(algo, options)
        if options.track:
            tracking.begin(path, described(algo, options))
        parts = (training, averages, held, paths, checkpoint, notes)
        run = life.go_on(*parts, replay=options.checkpoint_replay)
        assert run is not None
        stack.pop_all()
    print(f"Resumed at step {training.step:,}.")
    for note in run.notes:
        print(f"note: {note}", file=sys.stderr)
    return run, options


def described(algo: str, options: Options[Any]) -> dict[str, Any]:
    """The hyper-parameters of one seed's run, by name."""
    run, agent = dataclasses.asdict(options.run), dataclasses.asdict(options.agent)
    return {"algo": algo, "seed": chosen_seeds(options)[0]} | run | agent


def recorded(about: dict[str, Any]) -> tuple[str, Options[Any]]:
    """The algorithm and options that a checkpoint recorded.

    Raises:
        ValueError: They are not those of this program.
    """
    try:
        algo, values = about["algo"], dict(about["options"])
        run: Any
        agent: Any
        run, agent = (
            {k: tuple(v) if isinstance(v, list) else v for k, v in values.pop(part).items()}
            for part in ("run", "agent")
        )
        values["runs_dir"] = Path(values["runs_dir"])
        config: Any = ALGORITHMS[algo][1]
        return algo, Options(run=TrainConfig(**run), agent=config(**agent), **values)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint is of another version of this program: {error}") from None


def train_with_progress(run: Run, options: Options[Any]) -> None:
    """Run the training under a progress bar with its speed and the latest return."""
    training, every = run.training, options.checkpoint_every
    total = training.config.total_steps
    started, first = time.perf_counter(), training.step
    shown = 0.0
    with Progress() as progress:
        what = f"{run.algo} {training.config.env_id}"
        bar = progress.add_task(what, total=total)

        def after_step() -> None:
            nonlocal shown
            due = every and crossings(run.tried_at, training.step, every)
            if due and training.step < total:
                run.try_to_save()
            now = time.perf_counter()
            if now - shown > 0.1 or training.step >= total:
                shown = now
                speed = (training.step - first) / (now - started)
                said = f"{what}, {speed:,.0f} steps/s, return {np.mean(training.latest_return):.1f}"
                progress.update(bar, completed=training.step, description=said)

        training.run(after_step)


def summary(run: Run, member: int, seconds: float) -> str:
    """What a seed learned."""
    training, folder = run.training, run.folders[member]
    lines = [
        f"{run.algo} on {training.config.env_id}, seed {training.seeds[member]}: {training.step:,} "
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
    (first_step, first), (last_step, last) = folder.last[0], folder.last[-1]
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


def how_to_see(run: Run) -> str:
    """Where the files are, and what to type next."""
    return "\n".join(
        [
            *(f"Files: {folder.path}" for folder in run.folders),
            f"Curves: tensorboard --logdir {shlex.quote(str(run.path.parent))}",
            f"Play: python -m scripts.enjoy {run.words}",
            f"Choose the weights to ship: python -m scripts.ship {run.words}",
            f"Other averages: python -m scripts.posthoc {run.words} --rule tail:0.3",
        ]
    )


def how_to_go_on(run: Run) -> str:
    """What to type to resume."""
    if not run.path.exists():
        return f"{run.path} is gone: there is nothing to go on from."
    return f"Go on: python -m scripts.train --resume {run.words}"


if __name__ == "__main__":
    sys.exit(main())
