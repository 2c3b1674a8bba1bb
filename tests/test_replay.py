import numpy as np
import pytest
import torch

from agents.replay import Replay
from agents.seeding import Purpose, Streams


def transitions(first, n, members=1):
    """Transition number t of seed s has the value 100 s + t in every field."""
    t = first + np.arange(n)[None] + 100 * np.arange(members)[:, None]
    wide = np.repeat(t[..., None], 2, axis=-1).astype(np.float32)
    return wide, t[..., None].astype(np.float32), t.astype(float), t % 2 == 1, wide + 0.5


def stored(replay):
    return replay.rows[:, : replay.size, 0].tolist()


def test_a_transition_comes_back_as_it_was_stored():
    replay = Replay(4, obs_dim=2, action_dim=1)
    obs = np.array([[[1.0, 2.0]]], dtype=np.float32)
    next_obs = np.array([[[3.0, 4.0]]], dtype=np.float32)
    replay.add(obs, np.array([[[0.25]]]), np.array([[7.0]]), np.array([[True]]), next_obs)
    batch = replay.sample(3, Streams(Purpose.REPLAY, [0]))
    assert batch.obs.tolist() == [[[1.0, 2.0]] * 3]
    assert batch.action.tolist() == [[[0.25]] * 3]
    assert batch.reward.tolist() == [[7.0] * 3]
    assert batch.terminated.tolist() == [[1.0] * 3]
    assert batch.next_obs.tolist() == [[[3.0, 4.0]] * 3]


def test_rewards_and_ends_have_no_trailing_dimension_that_could_broadcast():
    replay = Replay(4, obs_dim=2, action_dim=1, members=3)
    replay.add(*transitions(0, 4, members=3))
    batch = replay.sample(5, Streams(Purpose.REPLAY, [0, 1, 2]))
    assert [tuple(field.shape) for field in batch] == [
        (3, 5, 2),
        (3, 5, 1),
        (3, 5),
        (3, 5),
        (3, 5, 2),
    ]


def test_the_oldest_transitions_make_room_also_across_the_end_of_the_ring():
    replay = Replay(5, obs_dim=2, action_dim=1)
    replay.add(*transitions(0, 3))
    assert stored(replay) == [[0, 1, 2]]
    replay.add(*transitions(3, 3))
    assert (stored(replay), replay.position, replay.size) == ([[5, 1, 2, 3, 4]], 1, 5)
    replay.add(*transitions(6, 5))
    assert (stored(replay), replay.position) == ([[10, 6, 7, 8, 9]], 1)


def test_adding_nothing_changes_nothing():
    replay = Replay(5, obs_dim=2, action_dim=1)
    replay.add(*transitions(0, 2))
    replay.add(*transitions(9, 0))
    assert (stored(replay), replay.position) == ([[0, 1]], 2)


def test_discrete_actions_need_no_last_dimension():
    replay = Replay(5, obs_dim=2, action_dim=1)
    obs, action, reward, terminated, next_obs = transitions(0, 3)
    replay.add(obs, action[..., 0].astype(np.int64), reward, terminated, next_obs)
    assert replay.rows[0, :3, 2].tolist() == [0, 1, 2]


def test_seeds_never_see_each_others_transitions():
    replay = Replay(10, obs_dim=2, action_dim=1, members=3)
    replay.add(*transitions(0, 10, members=3))
    batch = replay.sample(200, Streams(Purpose.REPLAY, [0, 1, 2]))
    for seed in range(3):
        assert set(batch.reward[seed].tolist()) == {100.0 * seed + t for t in range(10)}
        assert torch.equal(batch.next_obs[seed, :, 0], batch.reward[seed] + 0.5)


def test_sampling_is_uniform_over_what_is_stored_and_nothing_else():
    replay = Replay(100, obs_dim=2, action_dim=1)
    replay.add(*transitions(0, 4))
    reward = replay.sample(40_000, Streams(Purpose.REPLAY, [0])).reward
    counts = torch.bincount(reward[0].long(), minlength=4)
    assert len(counts) == 4
    # five standard deviations of a binomial count
    assert (counts - 10_000).abs().max() < 5 * (40_000 * 0.25 * 0.75) ** 0.5


def test_a_seeds_draws_do_not_depend_on_the_other_seeds():
    together = Replay(10, obs_dim=2, action_dim=1, members=2)
    together.add(*transitions(0, 10, members=2))
    alone = Replay(10, obs_dim=2, action_dim=1)
    alone.add(*(field[1:] for field in transitions(0, 10, members=2)))
    ours = together.sample(50, Streams(Purpose.REPLAY, [3, 8]))
    theirs = alone.sample(50, Streams(Purpose.REPLAY, [8]))
    for field, expected in zip(ours, theirs, strict=True):
        assert torch.equal(field[1], expected[0])


@pytest.mark.parametrize("at_once", [1, 2 * 5 * 7 * 3, 10**6])
def test_many_batches_drawn_at_once_are_those_drawn_one_by_one(monkeypatch, at_once):
    monkeypatch.setattr("agents.replay.DRAWN_AT_ONCE", at_once)
    replay = Replay(10, obs_dim=2, action_dim=1, members=2)
    replay.add(*transitions(0, 10, members=2))
    ours, theirs = (Streams(Purpose.REPLAY, [3, 8]) for _ in range(2))
    batches = list(replay.batches(5, ours, 8))
    assert len(batches) == 8
    for batch in batches:
        for field, expected in zip(batch, replay.sample(5, theirs), strict=True):
            assert torch.equal(field, expected)
            assert field.stride() == expected.stride()


def test_a_batch_does_not_change_when_the_buffer_does():
    replay = Replay(2, obs_dim=2, action_dim=1)
    replay.add(*transitions(0, 2))
    batch = replay.sample(8, Streams(Purpose.REPLAY, [0]))
    before = batch.obs.clone()
    replay.add(*transitions(50, 2))
    assert torch.equal(batch.obs, before)


def test_an_empty_buffer_cannot_be_sampled():
    with pytest.raises(ValueError, match="empty replay buffer"):
        Replay(4, obs_dim=2, action_dim=1).sample(1, Streams(Purpose.REPLAY, [0]))


def test_a_capacity_below_one_or_below_an_addition_is_refused():
    with pytest.raises(ValueError, match="capacity must be at least 1 transition, got 0"):
        Replay(0, obs_dim=2, action_dim=1)
    with pytest.raises(ValueError, match="cannot add 5 transitions at once to a capacity of 4"):
        Replay(4, obs_dim=2, action_dim=1).add(*transitions(0, 5))
