"""What the tests of the agents share: random batches, plain copies, and one seed beside others."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agents.explorer import explore
from agents.learner import update
from agents.replay import Batch, Replay
from agents.seeding import Purpose, Streams
from agents.training import Training


def random_batch(size: int, obs_dim: int, action_dim: int, *, discrete: bool, seed: int) -> Batch:
    """A batch [1, size, ...] with every fifth transition or so terminated."""
    rng = np.random.default_rng(seed)
    obs, next_obs = rng.normal(size=(2, 1, size, obs_dim))
    action = (
        rng.integers(action_dim, size=(1, size, 1))
        if discrete
        else rng.uniform(-1, 1, size=(1, size, action_dim))
    )
    reward = rng.normal(size=(1, size)) * 3
    terminated = rng.random((1, size)) < 0.2
    return Batch(
        *(torch.as_tensor(x, dtype=torch.float32) for x in (obs, action, reward, terminated)),
        torch.as_tensor(next_obs, dtype=torch.float32),
    )


def after_each_step(training: Training, call: Callable[[], object]) -> None:
    """Have something done after each gradient step of a training."""
    step = training.learner.step

    def both() -> dict[str, Tensor]:
        tags = step()
        call()
        return tags

    training.learner.step = both  # type: ignore[method-assign]


def plain(network: nn.Module, member: int = 0) -> nn.Sequential:
    """One member of a network as torch.nn layers, in float64."""
    layers: list[nn.Module] = []
    for layer in network.net:  # type: ignore[union-attr]
        if isinstance(layer, nn.ReLU):
            layers.append(nn.ReLU())
            continue
        inputs, outputs = layer.weight.shape[1:]
        linear = nn.Linear(inputs, outputs, dtype=torch.float64)
        linear.weight.data = layer.weight[member].detach().double().T.clone()
        linear.bias.data = layer.bias[member, 0].detach().double().clone()
        layers.append(linear)
    return nn.Sequential(*layers)


def assert_same_weights(network: nn.Module, oracle: nn.Sequential, member: int = 0) -> None:
    """A member's weights agree with torch.nn's to float32 accuracy."""
    for ours, theirs in zip(plain(network, member), oracle, strict=True):
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=2e-4, atol=2e-5)


def train_on_noise(
    agent_class: Any,
    config: Any,
    seeds: Sequence[int],
    obs_dim: int,
    action_dim: int,
    updates: int,
    *,
    discrete: bool,
) -> dict[str, Tensor]:
    """Everything an agent's seeds end with, [S, ...] each, after updates on noise."""
    agent = agent_class(obs_dim, action_dim, config, seeds, "cpu", 10_000)
    stored = 300
    replay = Replay(stored, obs_dim, 1 if discrete else action_dim, members=len(seeds))
    batches = [
        random_batch(stored, obs_dim, action_dim, discrete=discrete, seed=seed) for seed in seeds
    ]
    obs, *rest = (torch.cat(field).numpy() for field in zip(*batches, strict=True))
    replay.add(obs, *rest)
    sampling = Streams(Purpose.REPLAY, seeds)
    actions = []
    for k in range(updates):
        actions.append(explore(agent, torch.from_numpy(obs[:, k : k + 1]), 5_000 + k))
        tags = update(agent, replay.sample(config.batch_size, sampling))
    end = {"actions": torch.stack(actions, dim=1)} | tags
    networks = {"policy": agent.policy} | {k: t.module for k, t in agent.targets.items()}
    for name, network in networks.items():
        for key, tensor in network.state_dict().items():
            end[f"{name}.{key}"] = tensor.unflatten(0, (len(seeds), -1))
    return end


def assert_seeds_do_not_feel_each_other(*args: Any, updates: int, discrete: bool) -> None:
    """Training three seeds together ends, to the bit, where training each alone does."""
    agent_class, config, obs_dim, action_dim = args
    sizes = {"obs_dim": obs_dim, "action_dim": action_dim, "discrete": discrete}
    together = train_on_noise(agent_class, config, (7, 1, 4), updates=updates, **sizes)
    for member, seed in enumerate((7, 1, 4)):
        alone = train_on_noise(agent_class, config, (seed,), updates=updates, **sizes)
        for name, tensor in alone.items():
            assert torch.equal(tensor[0], together[name][member]), f"seed {seed}: {name}"
