"""A new agent is its paper: REDQ, Algorithm 1 of Chen et al. 2021.

https://arxiv.org/abs/2101.05982
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from agent_cases import random_batch

from agents.agent import Turns
from agents.explorer import Explorer
from agents.learner import Learner, update
from agents.networks import Critic, GaussianActor
from agents.optimizers import Descent
from agents.presets import ALGORITHMS
from agents.replay import Replay
from agents.sac import SAC, SACConfig, Temperature
from agents.seeding import Purpose, Streams, generators
from agents.targets import target_every, target_networks
from agents.training import TrainConfig, Training

SMALL = {"hidden": (16, 16), "batch_size": 32, "learning_starts": 10}


@dataclass(frozen=True)
class REDQConfig(SACConfig):
    """The paper's values for MuJoCo."""

    gradient_steps: int = 20
    critics: int = 10
    subset: int = 2
    """critics over which the target takes the minimum"""


class REDQ:
    """SAC with an ensemble of critics, a random few of which bootstrap."""

    def __init__(self, obs_dim, action_dim, config, seeds, device, total_steps):
        self.config, self.action_dim = config, action_dim
        self.exploration = Streams(Purpose.EXPLORATION, seeds, device)
        self.randomness = Streams(Purpose.UPDATE, seeds, device)
        self.draws = [
            (self.randomness, "normal", (2, config.batch_size, action_dim)),
            (self.randomness, "uniform", (config.critics,)),
        ]

        init = generators(Purpose.INIT, seeds)
        self.actor = GaussianActor(obs_dim, action_dim, config.hidden, init).to(device)
        self.critic = Critic(obs_dim, action_dim, config.hidden, init, n=config.critics).to(device)
        self.temperature = Temperature(config.alpha_init, len(seeds)).to(device)
        networks = {"temperature": self.temperature, "critic": self.critic, "actor": self.actor}
        self.descent = Descent(networks, config.learning_rate, len(seeds))
        self.targets = target_networks(config, {"critic": self.critic})
        self.turns = Turns(target_every(config))
        self.policy = self.actor

    noise, explore, charts = SAC.noise, SAC.explore, SAC.charts

    def learn(self, batch, noise, order, follow):
        s, a, r, terminated, s_next = batch
        chosen = order.argsort(-1)[:, : self.config.subset]  # a set M of distinct indices
        a_pi, log_pi = self.actor.sample(s, noise[:, 0])

        # temperature, as in SAC
        alpha = self.temperature.log_alpha.detach().exp()  # [S, 1]
        gap = log_pi.detach() - self.action_dim
        self.descent.step("temperature", -(self.temperature.log_alpha * gap).mean(-1))

        # y = r + gamma (min_{i in M} Qbar_i(s', a') - alpha log pi(a'|s')), a' ~ pi(.|s')
        with torch.no_grad():
            a_next, log_pi_next = self.actor.sample(s_next, noise[:, 1])
            q_next = self.targets["critic"](s_next, a_next)  # [S, N, B]
            q_next = q_next.gather(1, chosen.unsqueeze(-1).expand(-1, -1, r.shape[1])).amin(1)
            y = r + self.config.gamma * (1 - terminated) * (q_next - alpha * log_pi_next)

        # critics: sum_i mean 1/2 (Q_i(s, a) - y)^2
        error = self.critic(s, a) - y.unsqueeze(1)
        critic_loss = (0.5 * error.square()).sum(1).mean(-1)
        self.descent.step("critic", critic_loss)

        # actor: mean alpha log pi(a_pi|s) - 1/N sum_i Q_i(s, a_pi)
        actor_loss = (alpha * log_pi - self.critic(s, a_pi).mean(1)).mean(-1)
        self.descent.step("actor", actor_loss)
        if follow:
            self.targets["critic"].update()
        return {"losses/qf_loss": critic_loss.detach(), "losses/actor_loss": actor_loss.detach()}


def batch(seed):
    return random_batch(32, 3, 1, discrete=False, seed=seed)


def weights(agent):
    return [flat.buffers[0] for flat in agent.descent.flats.values()]


def test_with_two_critics_that_both_count_its_critics_are_those_of_sac():
    redq = REDQ(3, 1, REDQConfig(**SMALL, critics=2), (4,), "cpu", 100)
    sac = SAC(3, 1, SACConfig(**SMALL), (4,), "cpu", 100)
    for agent in (redq, sac):
        update(agent, batch(0))
    assert torch.equal(weights(redq)[0], weights(sac)[0])
    assert torch.equal(weights(redq)[1], weights(sac)[1])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_it_can_be_one_program(device):
    ends, actions = [], []
    for compiled in (False, True):
        agent = REDQ(3, 1, REDQConfig(**SMALL), (4, 5), device, 100)
        replay = Replay(32, 3, 1, 2, device)
        replay.add(*(torch.cat(pair).numpy() for pair in zip(batch(0), batch(1), strict=True)))
        sampling = Streams(Purpose.REPLAY, (4, 5), device)
        # Operations as they were recorded, and on CUDA the kernels as they are, fused by nobody.
        build = None if device == "cuda" else lambda graph, inputs: graph
        learner = Learner(agent, replay, sampling, compiled=compiled, build=build)
        learner.begin(3)
        for _ in range(3):
            learner.step()
        ends.append(weights(agent))
        explorer = Explorer(agent, (2, 1, 3), torch.device(device), compiled=compiled, build=build)
        actions.append([explorer(np.ones((2, 1, 3), np.float32), step) for step in range(9, 12)])
    assert all(map(torch.equal, *ends))
    assert np.array_equal(*actions)


def test_the_loop_trains_it_as_any_other(monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "redq", (REDQ, REDQConfig))
    config = TrainConfig("Pendulum-v1", 14, eval_episodes=1)
    training = Training("redq", REDQConfig(**SMALL, critics=4), config, (1, 2))
    training.run()
    training.close()
    assert training.updates == 4 * 20
    assert training.evaluations["last"].returns.shape == (2, 1)


def test_its_target_takes_the_minimum_over_another_few_each_time():
    agent, seen = REDQ(3, 1, REDQConfig(**SMALL, critics=4), (4,), "cpu", 100), []
    learn = agent.learn
    agent.learn = lambda *given: seen.append(given[2].argsort(-1)[:, :2]) or learn(*given)
    for k in range(20):
        update(agent, batch(k))
    assert all(len({*pair.flatten().tolist()}) == 2 for pair in seen)
    assert {i for pair in seen for i in pair.flatten().tolist()} == {0, 1, 2, 3}
