"""Watch, record or score a trained policy: python -m scripts.enjoy runs/<run>."""

import functools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gymnasium as gym
import numpy as np
import tyro
from gymnasium.wrappers import RecordVideo
from torch import nn

from agents import evaluation
from agents.environments import make_env
from agents.players import Slots
from scripts.experiment.finished import FinishedRun, read
from scripts.experiment.life import printable
from scripts.experiment.paths import own_folder
from scripts.experiment.terminal import command_line

VIDEOS = "videos"
"""The folder of videos in a run's folder."""


@dataclass(frozen=True)
class Options:
    """Play deterministic episodes with the policy of a finished run, and print their returns."""

    run: tyro.conf.Positional[Path]
    """the run's folder"""
    policy: str | None = None
    """last, shipped, a scheme such as tail25 or window80, or a rule such as tail:0.3; None: what
    was shipped, or else the last"""
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


@command_line("enjoy", Options)
def main(options: Options) -> int:
    """Play the episodes, and print their returns."""
    if options.episodes < 1 or options.seed < 0:
        raise ValueError(
            "episodes must be at least 1 and seed at least 0, "
            f"got {options.episodes} and {options.seed}"
        )
    run = read(options.run, trust=options.trust)
    which = options.policy or run.default
    policy = run.policy(which)
    print(f"policy: {named(run, which)}")
    seeds = range(options.seed, options.seed + options.episodes)
    with ExitStack() as stack:
        if options.video:
            env = stack.enter_context(recorded(run, options.run / VIDEOS))
        else:
            make = functools.partial(drawn_env, "human") if options.render else make_env
            env = stack.enter_context(closing(make(run.env_id, run.wrap)))
        returns = []
        for seed, (total, length) in zip(seeds, play(run, policy, env, seeds), strict=True):
            returns.append(total)
            print(f"episode seed {seed}: return {total:.1f} in {length} steps")
    print(f"mean return {np.mean(returns):.1f} over {len(returns)} episodes")
    if options.video:
        print(f"videos: {options.run / VIDEOS}")
    return 0


def named(run: FinishedRun, which: str) -> str:
    """What is played, in words."""
    if which != "shipped":
        return which
    return f"shipped, {printable(str(run.choice['choice']['winner']))}"


@contextmanager
def recorded(run: FinishedRun, folder: Path) -> Iterator[gym.Env[Any, Any]]:
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
            drawn_env("rgb_array", run.env_id, run.wrap),
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
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # nor does it look for one, and complain
    try:
        env = make_env(env_id, wrap, render_mode=mode)
        env.reset(seed=0)
        env.render()  # fails now rather than after training
    except Exception as error:  # whatever the graphics stack raises
        raise ValueError(f"cannot draw {env_id} as {mode} on this machine: {error}") from error
    return env


def play(
    run: FinishedRun, policy: nn.Module, env: gym.Env[Any, Any], seeds: Iterable[int]
) -> Iterable[tuple[float, int]]:
    """Play an episode per seed with the deterministic actions of a policy of one member.

    Yields:
        The return and length of each episode.
    """
    face = run.interface
    slots = Slots(run.env_id, run.wrap, face.obs_shape, face.obs_dtype, [env])
    for seed in seeds:
        played = evaluation.play(policy, slots, face, np.array([[seed]]), max_steps=run.max_steps)
        yield played.returns.item(), played.lengths.item()


if __name__ == "__main__":
    sys.exit(main())
