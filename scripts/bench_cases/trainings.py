"""This project's agents, ready to be timed: replay buffers filled, evaluation off."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from agents.program import require_compiler
from agents.training import TrainConfig, Training

Precision = Literal["highest", "high"]
OURS, COMPILED = "polyak_rl", "polyak_rl, compiled"
ROWS = 5_000  # transitions in a replay buffer that gradient steps are measured on
FEWEST_ROWS = 512  # of one seed among many
STEPS_OF_A_RUN = 1_000_000  # environment steps that averages and timelines are laid out for


def ways(device: torch.device, compile: bool) -> list[str]:
    """In which ways gradient steps are measured; compiled ones where they can be."""
    try:
        if compile and device.type == "cpu":
            require_compiler()
    except ValueError:
        return [OURS]
    return [OURS, COMPILED] if compile else [OURS]


def fresh(
    algo: str,
    env_id: str,
    config: Any,
    device: torch.device,
    seeds: Sequence[int] = (1,),
    buffer_size: int = 100_000,
    compile: bool = False,
    precision: Precision = "highest",
) -> Training:
    """A training that never evaluates and never ends."""
    run = TrainConfig(
        env_id,
        STEPS_OF_A_RUN,
        eval_every=2 * STEPS_OF_A_RUN,
        device=str(device),
        compile=compile,
        matmul_precision=precision,
    )
    return Training(algo, dataclasses.replace(config, buffer_size=buffer_size), run, seeds)


def filled(
    algo: str,
    env_id: str,
    config: Any,
    device: torch.device,
    seeds: Sequence[int] = (1,),
    compile: bool = False,
    precision: Precision = "highest",
) -> Training:
    """A training with random transitions in every row of its replay buffer."""
    rows = max(FEWEST_ROWS, ROWS // len(seeds))
    training = fresh(algo, env_id, config, device, seeds, rows, compile, precision)
    rng = np.random.default_rng(0)
    shape, size = (len(seeds), rows), training.interface
    if size.discrete:
        action = rng.integers(size.action_dim, size=shape)
    else:
        action = rng.uniform(-1, 1, (*shape, size.action_dim)).astype(np.float32)
    obs, next_obs = rng.standard_normal((2, *shape, *size.obs_shape), dtype=np.float32)
    reward, terminated = rng.standard_normal(shape), rng.random(shape) < 0.01
    training.replay.add(obs, action, reward, terminated, next_obs)
    return training


def learn(training: Training, count: int = 1) -> None:
    """Gradient steps as the training loop takes them, sampling included."""
    training.learn(count)


def advance(training: Training, env_steps: int) -> None:
    """Environment steps, with the gradient steps that fall due."""
    for _ in range(env_steps):
        training.advance()
