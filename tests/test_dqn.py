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

from agents.dqn import DQN, DQNConfig
from agents.explorer import explore
from agents.learner import update
from agents.replay import Batch

SMALL = DQNConfig(
    learning_rate=1e-2, batch_size=32, learning_starts=0, target_update_every=3, hidden=(16, 16)
)


def make(config=SMALL, *, seeds=(0,), actions=3, total_steps=1000):
    return DQN(4, actions, config, seeds, "cpu", total_steps)


def batch(seed=0):
    return random_batch(32, 4, 3, discrete=True, seed=seed)


@pytest.mark.parametrize("double", [False, True])
def test_updates_follow_the_algorithm_written_with_plain_torch_in_float64(double):
    agent = make(replace(SMALL, double=double, max_grad_norm=0.5))
    q = plain(agent.q)
    q_target = copy.deepcopy(q)
    optimizer = torch.optim.Adam(q.parameters(), lr=1e-2)
    for k in range(1, 11):
        transitions = batch(k)
        tags = update(agent, transitions)

        s, a, r, terminated, s_next = (field[0].double() for field in transitions)
        with torch.no_grad():
            best = (q if double else q_target)(s_next).argmax(dim=1)
            y = r + 0.99 * (1 - terminated) * q_target(s_next)[range(32), best]
        value = q(s)[range(32), a[:, 0].long()]
        loss = F.smooth_l1_loss(value, y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(q.parameters(), 0.5)
        optimizer.step()
        if k % 3 == 0:
            q_target = copy.deepcopy(q)

        assert tags["losses/td_loss"].mean().item() == pytest.approx(loss.item(), rel=1e-3)
        assert tags["losses/q_values"].mean().item() == pytest.approx(value.mean().item(), rel=1e-3)
        assert_same_weights(agent.q, q)
        assert_same_weights(agent.q_target.module, q_target)


def test_the_target_is_copied_every_c_gradient_steps_and_stands_still_between():
    agent = make()
    first = [p.clone() for p in agent.q_target.module.parameters()]
    same_as_online = []
    for k in range(1, 10):
        update(agent, batch(k))
        pairs = zip(agent.q_target.module.parameters(), agent.q.parameters(), strict=True)
        same_as_online.append(all(torch.equal(target, online) for target, online in pairs))
        if k < 3:
            for before, after in zip(first, agent.q_target.module.parameters(), strict=True):
                assert torch.equal(before, after)
    assert same_as_online == [False, False, True] * 3


def test_a_terminal_transition_is_worth_its_reward_and_a_truncated_one_bootstraps():
    agent = make(replace(SMALL, gamma=0.5))
    s, a, r, _, s_next = batch()
    with torch.no_grad():
        value = agent.q(s).gather(-1, a.long()).squeeze(-1)
        future = 0.5 * agent.q_target(s_next).amax(-1)
    for terminated, y in ((torch.ones(1, 32), r), (torch.zeros(1, 32), r + future)):
        expected = F.smooth_l1_loss(value, y).item()
        tags = update(make(replace(SMALL, gamma=0.5)), Batch(s, a, r, terminated, s_next))
        assert tags["losses/td_loss"].mean().item() == pytest.approx(expected, rel=1e-5)


def test_epsilon_falls_linearly_over_its_share_of_the_whole_run():
    config = replace(SMALL, epsilon_start=1.0, epsilon_end=0.2, exploration_fraction=0.5)
    agent = make(config, total_steps=1000)
    assert [agent.epsilon(step) for step in (0, 125, 250, 500, 999)] == pytest.approx(
        [1.0, 0.8, 0.6, 0.2, 0.2]
    )
    assert make(config, total_steps=2000).epsilon(500) == pytest.approx(0.6)
    assert agent.charts(250) == {"charts/epsilon": agent.epsilon(250)}


def test_epsilon_without_a_schedule_is_its_end():
    epsilon = make(replace(SMALL, exploration_fraction=0.0)).epsilon(0)
    assert epsilon == pytest.approx(SMALL.epsilon_end)


def test_actions_are_random_until_learning_starts():
    config = replace(SMALL, learning_starts=100, epsilon_start=0.0, epsilon_end=0.0)
    agent = make(config)
    obs = torch.ones(1, 3000, 4)
    counts = torch.bincount(explore(agent, obs, 99).flatten(), minlength=3)
    assert len(counts) == 3
    assert (counts - 1000).abs().max() < 5 * (3000 * 2 / 9) ** 0.5
    assert torch.equal(explore(agent, obs, 100), agent.q.act(obs))


def test_a_share_epsilon_of_the_actions_is_random():
    agent = make(replace(SMALL, epsilon_start=0.3, epsilon_end=0.3))
    obs = torch.ones(1, 20_000, 4)
    greedy = agent.q.act(obs)
    # a random action is the greedy one a third of the time
    share = (explore(agent, obs, 0) != greedy).float().mean().item()
    assert share == pytest.approx(0.2, abs=5 * (0.2 * 0.8 / 20_000) ** 0.5)


@pytest.mark.parametrize("epsilon", [0.0, 0.4, 0.7, 1.0])
def test_one_environment_acts_as_one_of_many(epsilon):
    agent, generator = make(SMALL), torch.Generator().manual_seed(0)
    obs = torch.randn(1, 500, 4, generator=generator)
    noise = torch.rand(1, 2, 500, generator=generator)
    noise[0, :, 0] = epsilon  # a coin that falls on the border
    alone = [agent.explore(obs[:, [i]], noise[..., [i]], epsilon) for i in range(500)]
    assert torch.equal(torch.cat(alone, 1), agent.explore(obs, noise, epsilon))


def test_each_seeds_gradient_is_clipped_on_its_own():
    agent = make(replace(SMALL, max_grad_norm=1e-3), seeds=(0, 1))
    calm, wild = batch(1), batch(1)
    wild = wild._replace(reward=wild.reward * 1e4)
    update(agent, Batch(*(torch.cat(fields) for fields in zip(calm, wild, strict=True))))
    norms = torch.linalg.vector_norm(agent.descent.flats["q"].parameters[0].grad, dim=-1)
    torch.testing.assert_close(norms, torch.full((2,), 1e-3), rtol=1e-2, atol=0)


def test_targets_are_frozen_and_in_no_optimizer():
    agent = make()
    assert not any(p.requires_grad for p in agent.q_target.parameters())
    optimized = {
        p.data_ptr()
        for group in agent.descent.optimizers["q"].param_groups
        for p in group["params"]
    }
    assert optimized == {p.data_ptr() for p in agent.descent.flats["q"].parameters}
    assert not optimized & {p.data_ptr() for p in agent.q_target.parameters()}


def test_tags_hold_detached_values_of_each_seed():
    tags = update(
        make(seeds=(0, 1)), Batch(*(field.repeat(2, *[1] * (field.dim() - 1)) for field in batch()))
    )
    assert set(tags) == {"losses/td_loss", "losses/q_values"}
    for value in tags.values():
        assert value.shape[0] == 2
        assert not value.requires_grad


@pytest.mark.parametrize("double", [False, True])
def test_training_beside_other_seeds_changes_no_bit(double):
    config = replace(SMALL, double=double, hidden=(64, 64), target_update_every=7)
    assert_seeds_do_not_feel_each_other(DQN, config, 4, 2, updates=200, discrete=True)


def test_training_beside_other_seeds_changes_no_bit_at_the_presets_size():
    config = DQNConfig(batch_size=64, hidden=(256, 256), target_update_every=7, learning_rate=2e-3)
    assert_seeds_do_not_feel_each_other(DQN, config, 4, 2, updates=40, discrete=True)
