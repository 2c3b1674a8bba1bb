import copy
import math
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
from torch.distributions import Normal

from agents.explorer import explore
from agents.learner import update
from agents.sac import SAC, SACConfig
from agents.seeding import Purpose, generators

SMALL = SACConfig(
    learning_rate=1e-3, batch_size=32, learning_starts=0, hidden=(16, 16), tau=0.1, alpha_init=0.5
)


def make(config=SMALL, *, seeds=(0,)):
    return SAC(3, 2, config, seeds, "cpu", 1000)


def batch(seed=0):
    return random_batch(32, 3, 2, discrete=False, seed=seed)


def naive_sample(actor, s, noise):
    """Action and log density in float64, by the textbook formula."""
    mean, log_std = actor(s).chunk(2, dim=1)
    std = log_std.clamp(-20, 2).exp()
    u = mean + std * noise
    log_prob = Normal(mean, std).log_prob(u) - torch.log(1 - u.tanh() ** 2)
    return u.tanh(), log_prob.sum(dim=1)


def test_updates_follow_the_algorithm_written_with_plain_torch_in_float64():
    agent = make()
    actor, critics = plain(agent.actor), [plain(agent.critic, i) for i in range(2)]
    targets = copy.deepcopy(critics)
    log_alpha = torch.tensor(math.log(0.5), dtype=torch.float64, requires_grad=True)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3)
    critic_optimizer = torch.optim.Adam([p for c in critics for p in c.parameters()], lr=1e-3)
    alpha_optimizer = torch.optim.Adam([log_alpha], lr=1e-3)
    (noises,) = generators(Purpose.UPDATE, [0])

    def q(networks, s, a):
        return torch.stack([network(torch.cat((s, a), dim=1))[:, 0] for network in networks])

    for k in range(10):
        transitions = batch(k)
        tags = update(agent, transitions)

        s, a, r, terminated, s_next = (field[0].double() for field in transitions)
        noise, noise_next = torch.randn(2, 32, 2, generator=noises).double()
        a_pi, log_pi = naive_sample(actor, s, noise)
        alpha = log_alpha.detach().exp()
        alpha_loss = -(log_alpha * (log_pi.detach() - 2)).mean()
        alpha_optimizer.zero_grad()
        alpha_loss.backward()
        alpha_optimizer.step()
        with torch.no_grad():
            a_next, log_pi_next = naive_sample(actor, s_next, noise_next)
            soft_value = q(targets, s_next, a_next).min(dim=0).values - alpha * log_pi_next
            y = r + 0.99 * (1 - terminated) * soft_value
        critic_loss = 0.5 * sum(F.mse_loss(value, y) for value in q(critics, s, a))
        critic_optimizer.zero_grad()
        critic_loss.backward()
        critic_optimizer.step()
        actor_loss = (alpha * log_pi - q(critics, s, a_pi).min(dim=0).values).mean()
        actor_optimizer.zero_grad()
        actor_loss.backward()
        actor_optimizer.step()
        with torch.no_grad():
            for target, online in zip(targets, critics, strict=True):
                for old, new in zip(target.parameters(), online.parameters(), strict=True):
                    old.copy_(0.1 * new + 0.9 * old)

        expected = {
            "losses/qf_loss": critic_loss,
            "losses/actor_loss": actor_loss,
            "losses/alpha": alpha,
            "losses/alpha_loss": alpha_loss,
        }
        for tag, value in expected.items():
            assert tags[tag].mean().item() == pytest.approx(value.item(), rel=1e-3, abs=1e-4), tag
        assert_same_weights(agent.actor, actor)
        for i in range(2):
            assert_same_weights(agent.critic, critics[i], member=i)
            assert_same_weights(agent.critic_target.module, targets[i], member=i)
        assert agent.temperature.log_alpha.item() == pytest.approx(log_alpha.item(), abs=1e-5)


def test_the_temperature_rises_when_the_policy_is_more_certain_than_asked_and_falls_when_less():
    for target_entropy, direction in ((50.0, 1), (-50.0, -1)):
        agent = make(replace(SMALL, target_entropy=target_entropy))
        before = agent.temperature.log_alpha.item()
        update(agent, batch())
        assert math.copysign(1, agent.temperature.log_alpha.item() - before) == direction


def test_the_target_entropy_is_minus_the_actions_size_unless_given():
    assert make().target_entropy == -2
    assert make(replace(SMALL, target_entropy=0.5)).target_entropy == 0.5


def test_the_soft_value_contains_the_entropy_and_the_smaller_critic():
    # all transitions bootstrap; the loss is recomputed with a target that lacks one ingredient
    transitions = batch()._replace(terminated=torch.zeros(1, 32))
    agent, loss = make(), update(make(), transitions)["losses/qf_loss"]
    s, a, r, _, s_next = transitions
    (noises,) = generators(Purpose.UPDATE, [0])
    noise_next = torch.randn(2, 32, 2, generator=noises)[1:]
    with torch.no_grad():
        a_next, log_pi = agent.actor.sample(s_next, noise_next)
        q_next, q = agent.critic_target(s_next, a_next), agent.critic(s, a)

        def loss_for(value):
            y = r + 0.99 * value
            return 0.5 * (q - y.unsqueeze(1)).square().sum(1)

        right = loss_for(q_next.amin(1) - 0.5 * log_pi)
        torch.testing.assert_close(loss, right, rtol=1e-5, atol=1e-6)
        for wrong in (q_next.amin(1), q_next.mean(1) - 0.5 * log_pi, q_next[:, 0] - 0.5 * log_pi):
            assert not torch.allclose(loss, loss_for(wrong), rtol=1e-4)


def test_the_actors_loss_gives_the_critics_no_gradient():
    agent, other = make(), make()
    s, a, r, terminated, s_next = batch()
    update(agent, batch())

    # the critics' own gradient at the same point, without any actor's loss
    (noises,) = generators(Purpose.UPDATE, [0])
    noise_next = torch.randn(2, 32, 2, generator=noises)[1:]
    with torch.no_grad():
        a_next, log_pi = other.actor.sample(s_next, noise_next)
        soft_value = other.critic_target(s_next, a_next).amin(1) - 0.5 * log_pi
        y = r + 0.99 * (1 - terminated) * soft_value
    loss = 0.5 * (other.critic(s, a) - y.unsqueeze(1)).square().mean(-1).sum()
    loss.backward()
    ours, alone = (x.descent.flats["critic"].parameters[0].grad for x in (agent, other))
    torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-6)


def test_the_critics_targets_move_by_tau_at_every_gradient_step():
    agent = make()
    before = [p.detach().clone() for p in agent.critic_target.parameters()]
    update(agent, batch())
    moved = agent.critic_target.module.parameters()
    for old, new, online in zip(before, moved, agent.critic.parameters(), strict=True):
        torch.testing.assert_close(new, torch.lerp(old, online.detach(), 0.1))
        assert not torch.equal(old, new)


def test_exploration_samples_the_policy_and_is_uniform_until_learning_starts():
    agent = make(replace(SMALL, learning_starts=10))
    obs = torch.zeros(1, 20_000, 3)
    uniform = explore(agent, obs, 9)
    assert uniform.abs().max() <= 1
    assert uniform.std().item() == pytest.approx(1 / 3**0.5, rel=0.02)
    sampled = torch.atanh(explore(agent, obs, 10).double())
    mean, log_std = agent.actor(obs[:, :1])
    torch.testing.assert_close(sampled.mean(1), mean[:, 0].double(), rtol=0.05, atol=0.05)
    torch.testing.assert_close(sampled.std(1), log_std[:, 0].exp().double(), rtol=0.05, atol=0)


def test_targets_are_frozen_and_in_no_optimizer():
    agent = make()
    optimizers = agent.descent.optimizers.values()
    optimized = {
        p.data_ptr() for o in optimizers for group in o.param_groups for p in group["params"]
    }
    assert not any(p.requires_grad for p in agent.critic_target.parameters())
    assert not optimized & {p.data_ptr() for p in agent.critic_target.parameters()}


def test_the_policy_that_is_averaged_is_the_actor():
    agent = make()
    assert agent.policy is agent.actor


def test_training_beside_other_seeds_changes_no_bit():
    config = replace(SMALL, hidden=(64, 64))
    assert_seeds_do_not_feel_each_other(SAC, config, 3, 2, updates=200, discrete=False)


def test_training_beside_other_seeds_changes_no_bit_at_the_presets_size():
    assert_seeds_do_not_feel_each_other(SAC, SACConfig(), 17, 6, updates=5, discrete=False)
