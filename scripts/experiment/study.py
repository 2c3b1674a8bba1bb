"""The registered study: its cells, in the order in which they are run.

What is measured, tested and predicted is in `results/registration.md`, which was written before the
first of these runs. `python -m scripts.compare --tier study --workers 1` does them, and goes on
with them when it is started again.
"""

from dataclasses import dataclass, field
from typing import Any

FIRST_SEED = 201


@dataclass(frozen=True)
class Cell:
    """Runs of one algorithm on one environment under one setting."""

    number: int  # its place in the registration
    algo: str
    env_id: str
    runs: int  # training seeds, from `FIRST_SEED` on
    together: int  # seeds trained as members of one process
    changes: dict[str, Any] = field(default_factory=dict)  # of the protocol, as fields of `Job`


def cartpole(number: int, variant: str, **changes: Any) -> Cell:
    """DQN on CartPole under another setting."""
    return Cell(number, "dqn", "CartPole-v1", 20, 20, {"variant": variant, **changes})


@dataclass(frozen=True)
class PPOConfig:
    """Settings of Stable-Baselines3's PPO in cell 12; all others are its defaults.

    They are what rl-baselines3-zoo publishes for LunarLander (Raffin 2020,
    https://github.com/DLR-RM/rl-baselines3-zoo, `hyperparams/ppo.yml`, LunarLander-v2).
    """

    n_envs: int = 16
    """environments side by side"""
    n_steps: int = 1024
    """steps of each of them in a rollout"""
    batch_size: int = 64
    """transitions in a gradient step"""
    n_epochs: int = 4
    """passes over a rollout"""
    gamma: float = 0.999
    """discount per environment step"""
    gae_lambda: float = 0.98
    """of generalised advantage estimation"""
    ent_coef: float = 0.01
    """weight of the entropy in the loss"""


RATE = 2.3e-3  # of the preset for CartPole
HOPPER = {"total_steps": 100_000}

CELLS = (
    Cell(1, "dqn", "CartPole-v1", 20, 20),
    Cell(2, "dqn", "LunarLander-v3", 20, 4),
    Cell(3, "ddpg", "Hopper-v5", 20, 1, HOPPER),
    *(
        cartpole(4, f"lr=x{factor:g}", agent={"learning_rate": factor * RATE})
        for factor in (0.25, 0.5, 2)
    ),
    cartpole(5, "lr=decay75", lr_decay="linear", lr_decay_until=0.75, lr_floor=0.01),
    *(
        cartpole(6, f"target=hard:{every}", agent={"target_update_every": every})
        for every in (32, 512)
    ),
    # 2 / (C + 1) has the mean age of copies every C = 128 gradient steps, the preset's
    cartpole(6, "target=soft:0.0155", agent={"target": "soft", "tau": 2 / 129}),
    cartpole(6, "target=none", agent={"target": "none"}),
    Cell(7, "dqn", "Acrobot-v1", 20, 5),
    Cell(8, "ddpg", "Pendulum-v1", 20, 2),
    Cell(9, "td3", "Hopper-v5", 10, 1, HOPPER),
    Cell(10, "sac", "HalfCheetah-v5", 8, 1, {"total_steps": 50_000}),
    Cell(11, "sac", "Hopper-v5", 10, 1, HOPPER),
    # the 256 segments of a job are too coarse for windows of 5 %: the callback isn't told how long
    # the run will be
    Cell(12, "ppo", "LunarLander-v3", 10, 1, {"total_steps": 300_000, "capacity": 1024}),
)
