from contextlib import nullcontext

import pytest
import torch

from agents import training
from agents.ddpg import DDPGConfig
from agents.denormals import flushed
from agents.dqn import DQNConfig
from agents.sac import SACConfig
from agents.td3 import TD3Config
from agents.training import TrainConfig, Training

CONFIGS = {"dqn": DQNConfig, "ddpg": DDPGConfig, "td3": TD3Config, "sac": SACConfig}


def flushes():
    return (torch.tensor(1e-30) * 1e-10).item() == 0


def fail():
    assert flushes()
    raise RuntimeError("stopped")


@pytest.mark.parametrize("outside", [False, True])
def test_what_held_before_holds_afterwards(outside):
    torch.set_flush_denormal(outside)
    try:
        with pytest.raises(RuntimeError, match="stopped"), flushed():
            fail()
        assert flushes() == outside
    finally:
        torch.set_flush_denormal(False)


def trained(algo):
    """Weights, and denormal numbers in Adam's moments, of a run in which half of the units die."""
    config = CONFIGS[algo](
        learning_rate=1e-3, batch_size=8, learning_starts=8, train_every=1, hidden=(8, 8)
    )
    env_id = "CartPole-v1" if algo == "dqn" else "Pendulum-v1"
    run = Training(algo, config, TrainConfig(env_id, 200, eval_every=0))
    agent, networks = run.agent, [run.agent.policy, *run.agent.targets.values()]
    while run.updates < 20:
        run.advance()
    with torch.no_grad():
        dict(agent.policy.named_parameters())["net.0.bias"][..., ::2] = -100
    for optimizer in agent.descent.optimizers.values():
        for state in optimizer.state.values():
            state["exp_avg"].mul_(1e-34)  # as they are after some 700 steps
    run.run()
    run.close()
    moments = [s["exp_avg"] for o in agent.descent.optimizers.values() for s in o.state.values()]
    tiny = sum(int(((x != 0) & (x.abs() < 1.17e-38)).sum()) for x in moments)
    return [p.detach().clone() for network in networks for p in network.parameters()], tiny


@pytest.mark.parametrize("algo", CONFIGS)
def test_no_weight_depends_on_them(algo, monkeypatch):
    weights, tiny = trained(algo)
    monkeypatch.setattr(training, "flushed", nullcontext)
    slow_weights, slow_tiny = trained(algo)
    assert all(map(torch.equal, weights, slow_weights))
    assert tiny == 0 < slow_tiny
