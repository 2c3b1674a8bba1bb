import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from agent_cases import (
    assert_same_weights,
    assert_seeds_do_not_feel_each_other,
    plain,
    random_batch,
)

from agents.explorer import explore
from agents.learner import update
from agents.seeding import Purpose, generators
from agents.td3 import TD3, TD3Config
from agents.training import TrainConfig, Training
from tests.test_training import Recorder

SMALL = TD3Config(batch_size=32, learning_starts=0, hidden=(16, 16), tau=0.1)


def make(config=SMALL, *, seeds=(0,), action_dim=2):
    return TD3(3, action_dim, config, seeds, "cpu", 1000)


def batch(seed=0):
    return random_batch(32, 3, 2, discrete=False, seed=seed)


def weights(network):
    return [p.detach().clone() for p in network.parameters()]


def moved(network, before):
    return not all(map(torch.equal, network.parameters(), before))


def soft(target, online, tau):
    with torch.no_grad():
        for a, b in zip(target.parameters(), online.parameters(), strict=True):
            a.copy_(tau * b + (1 - tau) * a)


def test_updates_follow_the_algorithm_written_with_plain_torch_in_float64():
    agent = make(replace(SMALL, policy_delay=3))
    actor, critics = plain(agent.actor), [plain(agent.critic, i) for i in range(2)]
    actor_target, critic_targets = copy.deepcopy(actor), copy.deepcopy(critics)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3)
    critic_optimizers = [torch.optim.Adam(c.parameters(), lr=1e-3) for c in critics]
    (noises,) = generators(Purpose.UPDATE, [0])

    def q(network, s, a):
        return network(torch.cat((s, a), dim=1))[:, 0]

    for k in range(1, 13):
        transitions = batch(k)
        tags = update(agent, transitions)

        s, a, r, terminated, s_next = (field[0].double() for field in transitions)
        with torch.no_grad():
            noise = (0.2 * torch.randn(32, 2, generator=noises).double()).clamp(-0.5, 0.5)
            a_next = (actor_target(s_next).tanh() + noise).clamp(-1, 1)
            q_next = torch.minimum(*(q(target, s_next, a_next) for target in critic_targets))
            y = r + 0.99 * (1 - terminated) * q_next
        losses = [F.mse_loss(q(critic, s, a), y) for critic in critics]
        for loss, optimizer in zip(losses, critic_optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert tags["losses/qf_loss"].mean().item() == pytest.approx(sum(losses).item(), rel=1e-3)
        assert ("losses/actor_loss" in tags) == (k % 3 == 0)
        if k % 3 == 0:
            actor_loss = -q(critics[0], s, actor(s).tanh()).mean()
            actor_optimizer.zero_grad()
            actor_loss.backward()
            actor_optimizer.step()
            soft(actor_target, actor, 0.1)
            for target, critic in zip(critic_targets, critics, strict=True):
                soft(target, critic, 0.1)
            assert tags["losses/actor_loss"].mean().item() == pytest.approx(
                actor_loss.item(), rel=1e-3
            )

        assert_same_weights(agent.actor, actor)
        assert_same_weights(agent.actor_target.module, actor_target)
        for i in range(2):
            assert_same_weights(agent.critic, critics[i], member=i)
            assert_same_weights(agent.critic_target.module, critic_targets[i], member=i)


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_the_actor_and_both_targets_move_at_every_dth_gradient_step_by_plain_tau(delay):
    agent = make(replace(SMALL, policy_delay=delay))
    for k in range(1, 3 * delay + 1):
        actor, critic = weights(agent.actor), weights(agent.critic)
        targets = {name: weights(target.module) for name, target in agent.targets.items()}
        update(agent, batch(k))
        assert moved(agent.critic, critic)
        assert moved(agent.actor, actor) == (k % delay == 0)
        for name, online in (("actor", agent.actor), ("critic", agent.critic)):
            now = weights(agent.targets[name].module)
            for old, new, theirs in zip(targets[name], now, weights(online), strict=True):
                expected = torch.lerp(old, theirs, 0.1) if k % delay == 0 else old
                torch.testing.assert_close(new, expected, rtol=0, atol=1e-7 * (k % delay == 0))


def test_between_two_updates_of_the_actor_its_last_loss_is_shown():
    log = Recorder()
    config = replace(SMALL, learning_starts=4, policy_delay=4)
    run = TrainConfig("Pendulum-v1", 20, eval_every=40, log_every=1)
    training = Training("td3", config, run, logs=[log])
    while training.step < 20:
        training.advance()
    losses = {step: value for step, tag, value in log.values if tag == "losses/actor_loss"}
    assert [*losses] == [*range(8, 21)]  # the fourth gradient step is that of step 8
    assert [losses[step] == losses[step - 1] for step in range(9, 21)] == [
        True,
        True,
        True,
        False,
    ] * 3


def smoothed(config, monkeypatch):
    """The actions a~ that the targets are asked about, around an actor that says 0."""
    agent = make(replace(config, batch_size=20_000), action_dim=1)
    seen = []

    def spy(s, a):
        seen.append(a.clone())
        return torch.zeros(1, 2, a.shape[1])

    monkeypatch.setattr(agent.actor_target, "forward", lambda s: torch.zeros(*s.shape[:2], 1))
    monkeypatch.setattr(agent.critic_target, "forward", spy)
    update(agent, random_batch(20_000, 3, 1, discrete=False, seed=0))
    return seen[0]


def test_the_noise_that_smooths_the_target_policy_is_gaussian_and_clipped(monkeypatch):
    config = replace(SMALL, target_noise_std=0.3, target_noise_clip=0.45)
    noise = smoothed(config, monkeypatch)
    assert noise.abs().max() == pytest.approx(0.45)
    # a normal variable is beyond 1.5 of its standard deviations with probability 0.1336
    clipped = (noise.abs() >= 0.45).double().mean().item()
    assert clipped == pytest.approx(0.1336, abs=5 * (0.1336 * 0.8664 / 20_000) ** 0.5)
    assert noise.mean().abs() < 5 * 0.3 / 20_000**0.5
    inside = noise[noise.abs() < 0.15]  # half a standard deviation: probability 0.3829
    assert len(inside) / 20_000 == pytest.approx(0.3829, abs=0.02)


def test_smoothed_actions_stay_in_the_range(monkeypatch):
    wild = smoothed(replace(SMALL, target_noise_std=5.0, target_noise_clip=9.0), monkeypatch)
    assert (wild.min().item(), wild.max().item()) == (-1.0, 1.0)


def test_without_noise_the_target_policy_is_not_smoothed(monkeypatch):
    assert not smoothed(replace(SMALL, target_noise_std=0.0), monkeypatch).any()


def test_the_bootstrap_takes_the_smaller_of_both_critics(monkeypatch):
    agent = make()
    both = torch.stack((torch.full((32,), 7.0), torch.full((32,), -3.0)))[None]  # [1, 2, B]
    monkeypatch.setattr(agent.critic_target, "forward", lambda s, a: both)
    monkeypatch.setattr(agent.critic, "forward", lambda s, a: both)
    monkeypatch.setattr(agent.descent, "step", lambda name, loss: None)
    transitions = batch()
    loss = update(agent, transitions)["losses/qf_loss"]
    y = transitions.reward - 3 * 0.99 * (1 - transitions.terminated)
    torch.testing.assert_close(loss, (7 - y) ** 2 + (-3 - y) ** 2)


def test_the_actors_loss_gives_the_critics_no_gradient():
    gradients = []
    for delay in (1, 10):  # with an actor's loss, and without
        agent = make(replace(SMALL, policy_delay=delay))
        update(agent, batch())
        gradients.append(agent.descent.flats["critic"].parameters[0].grad)
    assert torch.equal(*gradients)


def test_exploration_is_gaussian_around_the_actor_and_clipped_to_the_range():
    agent = make(replace(SMALL, noise_std=0.25))
    obs = torch.zeros(1, 20_000, 3)
    noise = explore(agent, obs, 0) - agent.actor.act(obs)
    assert noise.mean().abs() < 5 * 0.25 / 40_000**0.5
    assert noise.std().item() == pytest.approx(0.25, rel=0.03)
    wild = explore(make(replace(SMALL, noise_std=5.0)), obs, 0)
    assert (wild.min().item(), wild.max().item()) == (-1.0, 1.0)


def test_actions_are_uniform_until_learning_starts():
    agent = make(replace(SMALL, learning_starts=10, noise_std=0.0))
    obs = torch.zeros(1, 20_000, 3)
    action = explore(agent, obs, 9)
    assert action.shape == (1, 20_000, 2)
    assert action.abs().max() <= 1
    assert action.mean().abs() < 5 / (3 * 40_000) ** 0.5
    assert action.std().item() == pytest.approx(1 / 3**0.5, rel=0.02)
    assert torch.equal(explore(agent, obs, 10), agent.actor.act(obs))


def test_targets_are_frozen_and_in_no_optimizer():
    agent = make()
    optimized = {
        p.data_ptr()
        for optimizer in agent.descent.optimizers.values()
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for target in agent.targets.values():
        assert not any(p.requires_grad for p in target.parameters())
        assert not optimized & {p.data_ptr() for p in target.parameters()}


def test_the_policy_that_is_averaged_is_the_actor():
    agent = make()
    assert agent.policy is agent.actor


def test_training_beside_other_seeds_changes_no_bit():
    config = replace(SMALL, hidden=(64, 64))
    assert_seeds_do_not_feel_each_other(TD3, config, 3, 2, updates=200, discrete=False)


def test_training_beside_other_seeds_changes_no_bit_at_the_presets_size():
    assert_seeds_do_not_feel_each_other(TD3, TD3Config(), 3, 1, updates=8, discrete=False)
