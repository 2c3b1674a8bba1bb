"""Hyper-parameters per algorithm and environment, each with its source.

Values called "zoo" are those of rl-baselines3-zoo (Raffin 2020,
https://github.com/DLR-RM/rl-baselines3-zoo, `hyperparams/<algo>.yml`). Its DQN target periods are
environment steps that take effect between rounds of gradient steps; here they are the gradient
steps which that comes to.
"""

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import find_highest_version, get_env_id, parse_env_id

from agents.agent import Agent, AgentConfig
from agents.ddpg import DDPG, DDPGConfig
from agents.dqn import DQN, DQNConfig
from agents.sac import SAC, SACConfig
from agents.td3 import TD3, TD3Config

ALGORITHMS: dict[str, tuple[Callable[..., Agent], type[AgentConfig]]] = {
    "dqn": (DQN, DQNConfig),
    "ddpg": (DDPG, DDPGConfig),
    "sac": (SAC, SACConfig),
    "td3": (TD3, TD3Config),
}
"""Name on the command line -> the agent and its config."""

DEFAULT_STEPS = 100_000
"""Environment steps where no preset names them."""

# zoo, dqn.yml: Acrobot-v1 and LunarLander-v2 share all but the target period, stated once
_DQN_CLASSIC = {
    "learning_rate": 6.3e-4,
    "batch_size": 128,
    "buffer_size": 50_000,
    "learning_starts": 0,
    "target_update_every": 250,
    "train_every": 4,
    "gradient_steps": 4,
    "epsilon_end": 0.1,
    "exploration_fraction": 0.12,
    "hidden": (256, 256),
}

# MuJoCo, quick: small enough for tens of runs on a CPU
_DDPG_QUICK = {"learning_starts": 1000, "batch_size": 128, "hidden": (256, 256)}
# zoo, ddpg.yml and sac.yml, MuJoCo: learning starts after 10 000 steps
_DDPG_MUJOCO = {"learning_starts": 10_000, "hidden": (400, 300)}
_SAC_MUJOCO = {"learning_starts": 10_000}

PRESETS: dict[str, dict[str, tuple[int, Mapping[str, Any]]]] = {
    "dqn": {
        # zoo, dqn.yml; its target period of 10 env steps comes to one copy per round of 128
        "CartPole-v1": (
            50_000,
            {
                "learning_rate": 2.3e-3,
                "batch_size": 64,
                "buffer_size": 100_000,
                "learning_starts": 1000,
                "target_update_every": 128,
                "train_every": 256,
                "gradient_steps": 128,
                "epsilon_end": 0.04,
                "exploration_fraction": 0.16,
                "hidden": (256, 256),
            },
        ),
        "Acrobot-v1": (100_000, _DQN_CLASSIC),
        "LunarLander-v3": (100_000, _DQN_CLASSIC),
        # zoo, dqn.yml; 600 env steps are 300 gradient steps
        "MountainCar-v0": (
            120_000,
            {
                "learning_rate": 4e-3,
                "batch_size": 128,
                "buffer_size": 10_000,
                "learning_starts": 1000,
                "gamma": 0.98,
                "target_update_every": 300,
                "train_every": 16,
                "gradient_steps": 8,
                "epsilon_end": 0.07,
                "exploration_fraction": 0.2,
                "hidden": (256, 256),
            },
        ),
        # zoo, dqn.yml, atari; 1000 env steps are 250 gradient steps. Pong has no lives, and its
        # rewards are -1, 0 and 1, so they need not be clipped as there.
        "ALE/Pong-v5": (
            10_000_000,
            {
                "learning_rate": 1e-4,
                "batch_size": 32,
                "buffer_size": 100_000,
                "learning_starts": 100_000,
                "target_update_every": 250,
                "train_every": 4,
                "gradient_steps": 1,
                "epsilon_end": 0.01,
                "exploration_fraction": 0.1,
                "hidden": (512,),
            },
        ),
    },
    "ddpg": {
        # zoo, ddpg.yml
        "Pendulum-v1": (20_000, {"gamma": 0.98, "buffer_size": 200_000, "learning_starts": 10_000}),
        "InvertedPendulum-v5": (30_000, _DDPG_QUICK),
        "Reacher-v5": (30_000, _DDPG_QUICK),
        **dict.fromkeys(
            ("Hopper-v5", "Walker2d-v5", "HalfCheetah-v5", "InvertedDoublePendulum-v5"),
            (1_000_000, _DDPG_MUJOCO),
        ),
        # zoo, ddpg.yml; the short horizon of gamma .99 keeps Swimmer at 40-140
        "Swimmer-v5": (1_000_000, {**_DDPG_MUJOCO, "gamma": 0.9999}),
    },
    "sac": {
        # zoo, sac.yml
        "Pendulum-v1": (20_000, {"learning_rate": 1e-3}),
        # Stable-Baselines3's defaults, learning_starts 100
        "InvertedDoublePendulum-v5": (30_000, {}),
        **dict.fromkeys(
            ("Hopper-v5", "Walker2d-v5", "HalfCheetah-v5", "Reacher-v5"), (1_000_000, _SAC_MUJOCO)
        ),
        # zoo, sac.yml
        "Swimmer-v5": (1_000_000, {**_SAC_MUJOCO, "gamma": 0.9999}),
    },
}

# zoo, td3.yml has the values of ddpg.yml; TD3's own three are the defaults everywhere
PRESETS["td3"] = PRESETS["ddpg"]


def preset_name(algo: str, env_id: str) -> str | None:
    """The environment whose preset an environment gets; None: there is none for it.

    A name without a version stands for the version that Gymnasium takes for it.

    Example:
        >>> preset_name("dqn", "CartPole"), preset_name("ddpg", "Hopper-v4")
        ('CartPole-v1', None)
    """
    try:
        namespace, name, version = parse_env_id(env_id.rpartition(":")[2])
        if version is None:
            version = find_highest_version(namespace, name)
        env_id = get_env_id(namespace, name, version)
    except gym.error.Error:
        return None
    return env_id if env_id in PRESETS.get(algo, {}) else None


def describe_preset(algo: str, env_id: str) -> str:
    """A line that says where the settings come from.

    Example:
        >>> describe_preset("sac", "Hopper-v4")
        'no preset for Hopper-v4: defaults of SAC'
    """
    name = preset_name(algo, env_id)
    return f"preset: {name}" if name else f"no preset for {env_id}: defaults of {algo.upper()}"


def preset(algo: str, env_id: str) -> tuple[Any, int]:
    """The config of an algorithm for an environment, and how many environment steps to train.

    An environment without a preset gets the algorithm's defaults; `describe_preset` says which.

    Args:
        algo: A name of `ALGORITHMS`.
        env_id: Gymnasium's name of the environment.

    Raises:
        ValueError: There is no such algorithm.

    Example:
        >>> config, total_steps = preset("sac", "Pendulum-v1")
        >>> config.learning_rate, total_steps
        (0.001, 20000)
    """
    if algo not in ALGORITHMS:
        raise ValueError(f"the algorithm must be one of {', '.join(ALGORITHMS)}, got {algo!r}")
    name = preset_name(algo, env_id)
    total_steps, values = PRESETS[algo][name] if name else (DEFAULT_STEPS, {})
    config_class = ALGORITHMS[algo][1]
    return config_class(**values), total_steps
