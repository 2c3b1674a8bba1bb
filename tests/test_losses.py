"""What an agent shows as its loss is what it learns from."""

import pytest
import torch
from agent_cases import random_batch

from agents.ddpg import DDPG, DDPGConfig
from agents.dqn import DQN, DQNConfig
from agents.learner import update
from agents.sac import SAC, SACConfig
from agents.td3 import TD3, TD3Config

SMALL = {"hidden": (16, 16), "batch_size": 32}
AGENTS = {
    "dqn": (DQN, DQNConfig(**SMALL, max_grad_norm=1e9)),
    "ddpg": (DDPG, DDPGConfig(**SMALL)),
    "td3": (TD3, TD3Config(**SMALL, policy_delay=1)),
    "sac": (SAC, SACConfig(**SMALL)),
}
TAGS = {
    "q": "losses/td_loss",
    "critic": "losses/qf_loss",
    "actor": "losses/actor_loss",
    "temperature": "losses/alpha_loss",
}
LOSSES = [
    ("dqn", "q"), ("ddpg", "critic"), ("ddpg", "actor"), ("td3", "critic"), ("td3", "actor"),
    ("sac", "temperature"), ("sac", "critic"), ("sac", "actor"),
]  # fmt: skip


def learn(algo, network, factor):
    """One update with one loss multiplied: all weights, that loss, its gradient, and the tags."""
    agent_class, config = AGENTS[algo]
    agent = agent_class(3, 2, config, (1,), "cpu", 1000)
    step, seen = agent.descent.step, []

    def multiplied(name, loss):
        step(name, loss * (factor if name == network else 1))
        if name == network:
            seen.extend((loss.detach(), agent.descent.flats[name].parameters[0].grad.clone()))

    agent.descent.step = multiplied
    tags = update(agent, random_batch(32, 3, 2, discrete=algo == "dqn", seed=0))
    flats = agent.descent.flats.items()
    return {name: flat.buffers[0].clone() for name, flat in flats}, *seen, tags


@pytest.mark.parametrize(("algo", "network"), LOSSES)
def test_a_loss_times_a_constant_is_another_training(algo, network):
    weights, loss, gradient, tags = learn(algo, network, 1)
    others, _, other, _ = learn(algo, network, -4)
    assert gradient.any()
    assert torch.equal(other, -4 * gradient)
    assert not torch.equal(weights[network], others[network])
    assert torch.equal(tags[TAGS[network]], loss)  # what is shown is what is differentiated


@pytest.mark.parametrize(("algo", "network"), LOSSES)
def test_a_loss_moves_its_own_network_and_what_steps_after_it(algo, network):
    weights, others = (learn(algo, network, factor)[0] for factor in (1, 0))
    moved = {name for name in weights if not torch.equal(weights[name], others[name])}
    if network == "critic":
        moved.discard("actor")
    assert moved == {network}


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_seeds_loss_is_the_mean_of_its_transitions_losses(seeds):
    gradients = []
    for reduced in (False, True):
        agent = DDPG(3, 2, DDPGConfig(**SMALL), range(seeds), "cpu", 1000)
        loss = agent.actor(torch.linspace(-1, 1, seeds * 32 * 3).view(seeds, 32, 3)).sum(-1)
        agent.descent.step("actor", loss.mean(-1) if reduced else loss)
        gradients.append(agent.descent.flats["actor"].parameters[0].grad)
    assert gradients[0].any()
    torch.testing.assert_close(*gradients)
