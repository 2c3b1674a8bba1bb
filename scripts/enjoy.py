"""Watch, record or score a trained policy: python -m scripts.enjoy runs/<run>."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.wrappers import RecordVideo
from torch import nn

from agents import evaluation
from agents.environments import Interface, interface, make_env
from agents.presets import ALGORITHMS


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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = tyro.cli(Options, args=argv, prog="python -m scripts.enjoy")
    try:
        if options.episodes < 1 or options.seed < 0:
            raise ValueError(
                "episodes must be at least 1 and seed at least 0, "
                f"got {options.episodes} and {options.seed}"
            )
        policy, env_id, algo = load_policy(options.run)
        folder = options.run / "videos" if options.video else None
        seeds = range(options.seed, options.seed + options.episodes)
        env = open_env(env_id, folder, render=options.render)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    returns = []
    for seed, (total, length) in zip(seeds, play(policy, env, algo, seeds), strict=True):
        returns.append(total)
        print(f"episode seed {seed}: return {total:.1f} in {length} steps")
    env.close()
    print(f"mean return {np.mean(returns):.1f} over {len(returns)} episodes")
    if folder:
        print(f"videos: {folder}")
    return 0


def load_policy(run: Path) -> tuple[nn.Module, str, str]:
    """The policy of a run, its environment's name and its algorithm.

    Raises:
        ValueError: The folder does not hold a run that has been finished, or a file is damaged.
    """
    for name in ("config.json", "policy.pt"):
        if not (run / name).is_file():
            raise ValueError(f"{run} is not the folder of a finished run: it has no {name}")
    try:
        record = json.loads((run / "config.json").read_text())
        agent_class, config_class = ALGORITHMS[record["algo"]]
        values = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in record["agent"].items()
        }
        env_id = record["run"]["env_id"]
        spaces = _interface(make_env(env_id), record["algo"])
        agent = agent_class(
            spaces.obs_dim, spaces.action_dim, config_class(**values), [record["seed"]], "cpu", 1
        )
        weights = torch.load(run / "policy.pt", weights_only=True, map_location="cpu")
        agent.policy.load_state_dict(weights)
    except Exception as error:  # damaged files raise anything
        raise ValueError(f"the run in {run} cannot be read: {error}") from error
    return agent.policy, env_id, record["algo"]


def open_env(env_id: str, video_folder: Path | None, *, render: bool = False) -> gym.Env[Any, Any]:
    """The environment, recorded to a folder or shown in a window if asked for.

    Raises:
        ValueError: It cannot be drawn here.
    """
    if video_folder:
        return RecordVideo(
            drawn_env(env_id, "rgb_array"),
            str(video_folder),
            episode_trigger=lambda episode: True,
            disable_logger=True,
        )
    return drawn_env(env_id, "human") if render else make_env(env_id)


def drawn_env(env_id: str, mode: str) -> gym.Env[Any, Any]:
    """The environment in a render mode that has been seen to work.

    Raises:
        ValueError: It cannot be drawn here.
    """
    try:
        env = make_env(env_id, render_mode=mode)
        env.reset(seed=0)
        env.render()  # fails now rather than after training
    except Exception as error:  # whatever the graphics stack raises
        raise ValueError(f"cannot draw {env_id} as {mode} on this machine: {error}") from error
    return env


def play(
    policy: nn.Module, env: gym.Env[Any, Any], algo: str, seeds: Iterable[int]
) -> Iterable[tuple[float, int]]:
    """Play an episode per seed with the deterministic actions of a policy of one member.

    Yields:
        The return and length of each episode.
    """
    spaces = _interface(env, algo)
    for seed in seeds:
        played = evaluation.play(policy, [env], spaces, np.array([[seed]]))
        yield played.returns.item(), played.lengths.item()


def _interface(env: gym.Env[Any, Any], algo: str) -> Interface:
    return interface(env.observation_space, env.action_space, algo)


if __name__ == "__main__":
    sys.exit(main())
