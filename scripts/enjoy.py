"""Watch, record or score a trained policy: python -m scripts.enjoy runs/<run>."""

import functools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.wrappers import RecordVideo
from torch import nn

from agents import evaluation
from agents.environments import EnvironmentFault, Interface, interface, make_env
from agents.presets import ALGORITHMS
from polyak_rl.files import verify_archive
from scripts.experiment.paths import own_folder
from scripts.experiment.terminal import unfailing_output
from scripts.experiment.trust import require_trusted

VIDEOS = "videos"
"""The folder of videos in a run's folder."""


@dataclass(frozen=True)
class Options:
    """Play deterministic episodes with the policy of a finished run, and print their returns."""

    run: tyro.conf.Positional[Path]
    """the run's folder"""
    episodes: int = 5
    """how many episodes"""
    seed: int = 0
    """seed of the first episode; the others count on from it"""
    render: bool = False
    """show them in a window"""
    video: bool = False
    """record them to the run's folder, videos/"""
    trust: bool = False
    """import the module that the run's environment names, as in my_module:My-v0"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    with unfailing_output():
        return command(tyro.cli(Options, args=argv, prog="python -m scripts.enjoy"))


def command(options: Options) -> int:
    """Do what a command line asks for; returns the exit code."""
    try:
        if options.episodes < 1 or options.seed < 0:
            raise ValueError(
                "episodes must be at least 1 and seed at least 0, "
                f"got {options.episodes} and {options.seed}"
            )
        trained = load_policy(options.run, trust=options.trust)
        seeds = range(options.seed, options.seed + options.episodes)
        with ExitStack() as stack:
            if options.video:
                env = stack.enter_context(recorded(trained, options.run / VIDEOS))
            else:
                make = functools.partial(drawn_env, "human") if options.render else make_env
                env = stack.enter_context(closing(make(trained.env_id, trained.wrap)))
            returns = []
            for seed, (total, length) in zip(seeds, play(trained, env, seeds), strict=True):
                returns.append(total)
                print(f"episode seed {seed}: return {total:.1f} in {length} steps")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except EnvironmentFault as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"mean return {np.mean(returns):.1f} over {len(returns)} episodes")
    if options.video:
        print(f"videos: {options.run / VIDEOS}")
    return 0


class Trained(NamedTuple):
    """A policy of one member, and what it acts in."""

    policy: nn.Module
    algo: str
    seed: int
    env_id: str
    wrap: Sequence[str] = ()
    max_steps: int = evaluation.MAX_STEPS


def load_policy(run: Path, *, trust: bool = False) -> Trained:
    """The policy of a run.

    Args:
        run: The run's folder.
        trust: Import the modules that its environment and its wrappers name.

    Raises:
        ValueError: The folder does not hold a run that has been finished, a file is damaged, or it
            names a module that is not to be imported.
    """
    for name in ("config.json", "policy.pt"):
        if not (run / name).is_file():
            raise ValueError(f"{run} is not the folder of a finished run: it has no {name}")
    try:
        record = json.loads((run / "config.json").read_text())
        about = record["run"]
        names = (about["env_id"], tuple(about.get("wrap", ())))
        for name in (names[0], *names[1]):
            require_trusted(name, run, trust=trust)
        verify_archive(run / "policy.pt")
        weights = torch.load(run / "policy.pt", weights_only=True, map_location="cpu")
        policy = new_policy(record, sum(x.numel() for x in weights.values()))
        policy.load_state_dict(weights)
    except Exception as error:  # damaged files raise anything
        raise ValueError(f"the run in {run} cannot be read: {error}") from error
    steps = about.get("max_episode_steps", evaluation.MAX_STEPS)
    return Trained(policy, record["algo"], record["seed"], *names, steps)


def new_policy(record: dict[str, Any], size: int) -> nn.Module:
    """The policy that a config.json describes, which has no more weights than its file."""
    config_class: Any
    agent_class, config_class = ALGORITHMS[record["algo"]]
    values = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in record["agent"].items()
    }
    if any(a * b > size for a, b in pairwise(values["hidden"])):
        raise ValueError(f"layers of {values['hidden']} units have more than its {size:,} weights")
    with closing(make_env(record["run"]["env_id"], record["run"].get("wrap", ()))) as env:
        spaces = _interface(env, record["algo"])
    agent = agent_class(
        spaces.obs_dim, spaces.action_dim, config_class(**values), [record["seed"]], "cpu", 1
    )
    policy: nn.Module = agent.policy
    return policy


def record(trained: Trained, seeds: Sequence[int], folder: Path) -> None:
    """Record episodes of a policy to a folder, made if it is not there."""
    with recorded(trained, folder) as env:
        list(play(trained, env, seeds))


@contextmanager
def recorded(trained: Trained, folder: Path) -> Iterator[gym.Env[Any, Any]]:
    """An environment whose episodes are recorded to a folder, made if it is not there.

    The files are made in a new folder, and take their places when the environment is closed: a link
    that is there is replaced, not followed.

    Raises:
        ValueError: It cannot be drawn here.
        OSError: The folder is a link, or cannot be written.
    """
    own_folder(folder)
    with TemporaryDirectory(dir=folder) as temporary:
        new = Path(temporary, "new")  # RecordVideo warns of a folder that is there
        env = RecordVideo(
            drawn_env("rgb_array", trained.env_id, trained.wrap),
            str(new),
            episode_trigger=lambda episode: True,
            disable_logger=True,
        )
        with closing(env):
            yield env
        for video in new.iterdir():
            video.replace(folder / video.name)


def drawn_env(mode: str, env_id: str, wrap: Sequence[str] = ()) -> gym.Env[Any, Any]:
    """The environment in a render mode that has been seen to work.

    Raises:
        ValueError: It cannot be drawn here.
    """
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & {*os.environ}:
        if mode == "human":
            raise ValueError("there is no display here for a window: use --video")
        os.environ.setdefault("MUJOCO_GL", "egl")  # which draws without one
    try:
        env = make_env(env_id, wrap, render_mode=mode)
        env.reset(seed=0)
        env.render()  # fails now rather than after training
    except Exception as error:  # whatever the graphics stack raises
        raise ValueError(f"cannot draw {env_id} as {mode} on this machine: {error}") from error
    return env


def play(
    trained: Trained, env: gym.Env[Any, Any], seeds: Iterable[int]
) -> Iterable[tuple[float, int]]:
    """Play an episode per seed with the deterministic actions of a policy.

    Yields:
        The return and length of each episode.
    """
    spaces = _interface(env, trained.algo)
    for seed in seeds:
        episode = np.array([[seed]])
        played = evaluation.play(
            trained.policy, [env], spaces, episode, max_steps=trained.max_steps
        )
        yield played.returns.item(), played.lengths.item()


def _interface(env: gym.Env[Any, Any], algo: str) -> Interface:
    return interface(env.observation_space, env.action_space, algo)


if __name__ == "__main__":
    sys.exit(main())
