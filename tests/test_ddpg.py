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

from agents.ddpg import DDPG, DDPGConfig
from agents.explorer import explore
from agents.learner import update

SMALL = DDPGConfig(batch_size=32, learning_starts=0, hidden=(16, 16), tau=0.1)


def make(config=SMALL, *, seeds=(0,), action_dim=2):
    return DDPG(3, action_dim, config, seeds, "cpu", 1000)


def batch(seed=0):
    return random_batch(32, 3, 2, discrete=False, seed=seed)


def soft(target, online, tau):
    with torch.no_grad():
        for a, b in zip(target.parameters(), online.parameters(), strict=True):
            a.copy_(tau * b + (1 - tau) * a)


def test_updates_follow_the_algorithm_written_with_plain_torch_in_float64():
    agent = make()
    critic, actor = plain(agent.critic), plain(agent.actor)
    critic_target, actor_target = copy.deepcopy(critic), copy.deepcopy(actor)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3)
    for k in range(10):
        transitions = batch(k)
        tags = update(agent, transitions)

        s, a, r, terminated, s_next = (field[0].double() for field in transitions)
        with torch.no_grad():
            a_next = actor_target(s_next).tanh()
            q_next = critic_target(torch.cat((s_next, a_next), dim=1))[:, 0]
            y = r + 0.99 * (1 - terminated) * q_next
        value = critic(torch.cat((s, a), dim=1))[:, 0]
        critic_loss = F.mse_loss(value, y)
        critic_optimizer.zero_grad()
        critic_loss.backward()
        critic_optimizer.step()
        actor_loss = -critic(torch.cat((s, actor(s).tanh()), dim=1)).mean()
        actor_optimizer.zero_grad()
        actor_loss.backward()
        actor_optimizer.step()
        soft(critic_target, critic, 0.1)
        soft(actor_target, actor, 0.1)

        assert tags["losses/qf_loss"].mean().item() == pytest.approx(critic_loss.item(), rel=1e-3)
        assert tags["losses/actor_loss"].mean().item() == pytest.approx(actor_loss.item(), rel=1e-3)
        assert tags["losses/q_values"].mean().item() == pytest.approx(value.mean().item(), rel=1e-2)
        assert_same_weights(agent.critic, critic)
        assert_same_weights(agent.actor, actor)
        assert_same_weights(agent.critic_target.module, critic_target)
        assert_same_weights(agent.actor_target.module, actor_target)


def test_both_targets_move_by_tau_at_every_gradient_step():
    agent = make()
    for name, online in (("actor", agent.actor), ("critic", agent.critic)):
        target = agent.targets[name].module
        before = [p.detach().clone() for p in target.parameters()]
        update(agent, batch())
        for old, new, theirs in zip(before, target.parameters(), online.parameters(), strict=True):
            torch.testing.assert_close(new, torch.lerp(old, theirs.detach(), 0.1))
            assert not torch.equal(old, new)


def test_the_actors_loss_gives_the_critic_no_gradient():
    agent = make()
    transitions = batch()
    update(agent, transitions)
    held = agent.descent.flats["critic"].parameters[0].grad.clone()

    # the critic's own gradient at the same point, without any actor's loss
    other = make()
    s, a, r, terminated, s_next = transitions
    with torch.no_grad():
        q_next = other.critic_target(s_next, other.actor_target(s_next)).squeeze(1)
        y = r + 0.99 * (1 - terminated) * q_next
    F.mse_loss(other.critic(s, a).squeeze(1), y).backward()
    torch.testing.assert_close(
        held, other.descent.flats["critic"].parameters[0].grad, rtol=1e-4, atol=1e-6
    )


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
    assert_seeds_do_not_feel_each_other(DDPG, config, 3, 2, updates=200, discrete=False)


def test_training_beside_other_seeds_changes_no_bit_at_the_presets_size():
    assert_seeds_do_not_feel_each_other(DDPG, DDPGConfig(), 3, 1, updates=8, discrete=False)
