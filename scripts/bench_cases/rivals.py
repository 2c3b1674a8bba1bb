"""What other libraries offer, each as its own examples call it, its fastest setting chosen."""

import copy
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import stable_baselines3 as sb3
import torch
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.utils import polyak_update
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

SB3, SBX = "SB3", "SBX"
CLEANRL, AVERAGED_MODEL = "CleanRL's loop", "torch AveragedModel"


def installed(name: str) -> Any:
    """A library that may be missing, or unable to load here."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return None


def rival_updates(network: nn.Module, tau: float) -> dict[str, Callable[[], object]]:
    """One target update on copies of a network, by library."""
    online, target = copy.deepcopy(network), copy.deepcopy(network)
    ema_fn = get_ema_multi_avg_fn(1 - tau)  # type: ignore[no-untyped-call]
    averaged = AveragedModel(online, multi_avg_fn=ema_fn)
    rivals: dict[str, Callable[[], object]] = {
        SB3: lambda: polyak_update(online.parameters(), target.parameters(), tau),
        CLEANRL: lambda: cleanrl_update(online, target, tau),
        AVERAGED_MODEL: lambda: averaged.update_parameters(online),
    }
    if module := installed("ema_pytorch"):
        ema = module.EMA(
            copy.deepcopy(network),
            beta=1 - tau,
            update_every=1,
            update_after_step=0,
            use_foreach=True,
        )
        rivals["ema-pytorch"] = ema.update
    if module := installed("torch_ema"):
        shadow = module.ExponentialMovingAverage(online.parameters(), 1 - tau, False)
        rivals["torch_ema"] = shadow.update
    if module := installed("timm.utils"):
        model_ema = module.ModelEmaV3(online, decay=1 - tau)
        rivals["timm ModelEmaV3"] = lambda: model_ema.update(online)
    jax, optax = installed("jax"), installed("optax")
    if jax and optax and next(network.parameters()).device.type == "cpu":
        rivals["optax, jitted"] = OptaxUpdate(jax, optax, network, tau)
    return rivals


def cleanrl_update(online: nn.Module, target: nn.Module, tau: float) -> None:
    """The loop that CleanRL's files repeat."""
    for param, target_param in zip(online.parameters(), target.parameters(), strict=True):
        target_param.data.copy_(tau * param.data + (1 - tau) * target_param.data)


class OptaxUpdate:
    """`optax.incremental_update`, compiled, with the old target's memory given up to the new."""

    def __init__(self, jax: Any, optax: Any, network: nn.Module, tau: float) -> None:
        arrays = {name: p.detach().numpy() for name, p in network.named_parameters()}
        self.online, self.target = jax.device_put(arrays), jax.device_put(arrays)
        self.update = jax.jit(partial(optax.incremental_update, step_size=tau), donate_argnums=1)
        self.wait = jax.block_until_ready

    def __call__(self) -> None:
        """One update, waited for."""
        self.target = self.wait(self.update(self.online, self.target))


def rival_agents(algo: str, env_id: str, config: Any, device: torch.device) -> dict[str, Any]:
    """The same agent in Stable-Baselines3, and in SBX where that is installed."""
    models = {SB3: sb3_agent(sb3, algo, env_id, config, device=device)}
    # JAX's CPU build runs on the CPU only.
    if device.type == "cpu" and (sbx := installed("sbx")):
        models[SBX] = sb3_agent(sbx, algo, env_id, config)
    return models


def sb3_agent(
    library: Any, algo: str, env_id: str, config: Any, seed: int = 1, **options: Any
) -> Any:
    """An agent of Stable-Baselines3, or of a library like it, with the settings of one of ours."""
    options |= {
        "learning_rate": config.learning_rate,
        "batch_size": config.batch_size,
        "buffer_size": config.buffer_size,
        "learning_starts": config.learning_starts,
        "gamma": config.gamma,
        "tau": config.tau,
        "train_freq": config.train_every,
        "gradient_steps": config.gradient_steps,
        "policy_kwargs": {"net_arch": [*config.hidden]},
        "seed": seed,
    }
    if algo == "dqn":
        options["exploration_fraction"] = config.exploration_fraction
        options["exploration_final_eps"] = config.epsilon_end
        # Counted in environment steps there; 10 is rl-baselines3-zoo's for CartPole-v1.
        options["target_update_interval"] = 10
    model = getattr(library, algo.upper())("MlpPolicy", env_id, **options)
    if algo in ("ddpg", "td3"):
        size = model.action_space.shape
        model.action_noise = NormalActionNoise(np.zeros(size), np.full(size, config.noise_std))
    model.set_logger(Logger(None, []))
    return model


def fill(buffer: Any) -> None:
    """Random transitions in every row of a Stable-Baselines3 buffer."""
    rng = np.random.default_rng(0)
    for array in (buffer.observations, buffer.next_observations, buffer.rewards):
        array[:] = rng.standard_normal(array.shape)
    buffer.dones[:] = rng.random(buffer.dones.shape) < 0.01
    if np.issubdtype(buffer.actions.dtype, np.integer):
        buffer.actions[:] = rng.integers(buffer.action_space.n, size=buffer.actions.shape)
    else:
        buffer.actions[:] = rng.uniform(-1, 1, buffer.actions.shape)
    buffer.full = True
