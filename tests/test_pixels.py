import copy
import sys
from collections import deque
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import FrameStackObservation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from agents.checkpoint import Checkpoints, newest, restore
from agents.dqn import DQN, DQNConfig
from agents.environments import interface, make_env
from agents.explorer import explore
from agents.learner import update
from agents.pixels import FrameReplay, PixelQNetwork
from agents.presets import preset
from agents.replay import Replay
from agents.seeding import Purpose, Streams, generators
from agents.training import TrainConfig, Training
from scripts import enjoy, train


class Catch(gym.Env):
    """A ball falls in one of six columns; the paddle below it is to be there in time.

    The picture has 6 x 6 squares of 6 x 6 pixels; the ball is white, the paddle gray.
    """

    observation_space = spaces.Box(0, 255, (36, 36), np.uint8)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.row, self.ball, self.paddle = 0, *self.np_random.integers(6, size=2)
        return self.picture(), {}

    def step(self, action):
        self.row += 1
        self.paddle = min(5, max(0, self.paddle + action - 1))
        ended = self.row == 5
        reward = (1.0 if self.paddle == self.ball else -1.0) if ended else 0.0
        return self.picture(), reward, ended, False, {}

    def picture(self):
        squares = np.zeros((6, 6), np.uint8)
        squares[self.row, self.ball] = 255
        squares[5, self.paddle] = 128
        return squares.repeat(6, axis=0).repeat(6, axis=1)


CONFIG = DQNConfig(
    learning_rate=1e-3,
    batch_size=32,
    buffer_size=2_000,
    learning_starts=200,
    target_update_every=50,
    train_every=2,
    exploration_fraction=0.4,
    hidden=(32,),
)


@pytest.fixture(scope="module", autouse=True)
def _environments():
    gym.register("test/Catch-v0", lambda: FrameStackObservation(Catch(), 2))
    yield
    del gym.registry["test/Catch-v0"]


def random_frames(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def plain(network, member=0):
    """One member as torch.nn layers."""
    head = list(network.net[-1])
    layers = []
    for layer in [*network.net[1:-2], nn.Flatten(), *head]:
        if hasattr(layer, "stride"):
            filters, channels, kernel, _ = layer.weight.shape[1:]
            copy = nn.Conv2d(channels, filters, kernel, layer.stride)
            copy.weight.data = layer.weight[member].detach().clone()
            copy.bias.data = layer.bias[member].detach().clone()
        elif hasattr(layer, "weight"):
            copy = nn.Linear(*layer.weight.shape[1:])
            copy.weight.data = layer.weight[member].detach().T.clone()
            copy.bias.data = layer.bias[member, 0].detach().clone()
        else:
            copy = type(layer)()
        layers.append(copy)
    return nn.Sequential(*layers)


# --- the network ----------------------------------------------------------------------------------


def test_the_network_is_that_of_the_paper():
    network = PixelQNetwork((4, 84, 84), 6, (512,), generators(Purpose.INIT, [0]))
    shapes = [tuple(p.shape[1:]) for name, p in network.named_parameters() if "weight" in name]
    assert shapes == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (3136, 512), (512, 6)]


@pytest.mark.parametrize("size", [(36, 36), (40, 60), (84, 84)])
def test_values_and_gradients_are_those_of_torchs_layers_on_bytes_over_255(size):
    network = PixelQNetwork((3, *size), 4, (16,), generators(Purpose.INIT, [0, 1]))
    obs = random_frames(2, 5, 3, *size)
    values = network(obs)
    values.square().sum().backward()
    for member in range(2):
        oracle = plain(network, member)
        expected = oracle(obs[member].float() / 255)
        expected.square().sum().backward()
        torch.testing.assert_close(values[member], expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(network.act(obs)[member], expected.argmax(-1))
        pairs = zip(network.parameters(), oracle.parameters(), strict=True)
        for i, (ours, theirs) in enumerate(pairs):
            gradient = ours.grad[member]
            if i >= 6 and i % 2 == 0:  # the head's weights are [in, out]
                gradient = gradient.T
            gradient = gradient.reshape(theirs.shape)
            torch.testing.assert_close(gradient, theirs.grad, rtol=1e-4, atol=1e-5)


def test_first_weights_have_torchs_law_and_a_stream_for_each_seed():
    first, second = (
        PixelQNetwork((4, 84, 84), 6, (512,), generators(Purpose.INIT, seeds))
        for seeds in ([3, 5], [5])
    )
    for together, alone in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(together[1], alone[0])
    for i, fan in ((1, 4 * 8 * 8), (3, 32 * 4 * 4), (5, 64 * 3 * 3)):
        for parameter in first.net[i].parameters():
            assert parameter.abs().max() <= fan**-0.5
        assert first.net[i].weight.abs().max() > 0.99 * fan**-0.5


def test_images_too_small_for_the_filters_are_refused():
    with pytest.raises(ValueError, match=r"at least 36 x 36, got \(4, 36, 35\)"):
        PixelQNetwork((4, 36, 35), 2, (8,), generators(Purpose.INIT, [0]))


def updated(seeds, updates=20):
    """All that DQN on images ends with, from batches that depend on the seed only."""
    agent = DQN((2, 36, 40), 3, replace(CONFIG, target_update_every=7), seeds, "cpu", 1000)
    replay = FrameReplay(100, (2, 36, 40), members=len(seeds))
    frames = torch.cat([random_frames(1, 101, 1, 36, 40, seed=seed) for seed in seeds]).numpy()
    draws = [np.random.default_rng(seed) for seed in seeds]
    obs = np.concatenate((frames[:, :-1], frames[:, 1:]), axis=2)  # [S, 100, 2, H, W]
    for k in range(99):
        action, reward = ([[draw.integers(3)] for draw in draws] for _ in range(2))
        end = np.full((len(seeds), 1), k % 10 == 9)
        next_obs = obs[:, k + 1 : k + 2]
        replay.add(obs[:, k : k + 1], np.array(action), np.array(reward), end, next_obs)
    sampling = Streams(Purpose.REPLAY, seeds)
    for _ in range(updates):
        tags = update(agent, replay.sample(32, sampling))
    actions = explore(agent, torch.from_numpy(obs[:, :9]), 999)
    return [actions, *tags.values(), *agent.q.parameters(), *agent.q_target.module.parameters()]


def test_training_beside_other_seeds_changes_no_bit():
    together = updated((7, 1, 4))
    for member, seed in enumerate((7, 1, 4)):
        for ours, alone in zip(together, updated((seed,)), strict=True):
            assert torch.equal(ours[member], alone[0])


# --- the replay -----------------------------------------------------------------------------------


class Stacks:
    """Random stacks of tiny frames, as FrameStackObservation makes them."""

    def __init__(self, rng, depth, colors, length, zero_padded):
        self.rng, self.depth, self.colors, self.length = rng, depth, colors, length
        self.zero_padded = zero_padded
        self.reset()

    def frame(self):
        return self.rng.integers(0, self.colors, (2, 3), dtype=np.uint8)

    def reset(self):
        first = self.frame()
        padding = np.zeros_like(first) if self.zero_padded else first
        self.frames = deque([padding] * (self.depth - 1) + [first], maxlen=self.depth)

    def step(self):
        """A transition; whether an episode is cut by time or ends by itself is not the same."""
        obs = np.stack(self.frames)
        self.frames.append(self.frame())
        next_obs = np.stack(self.frames)
        ended = self.rng.random() < 1 / self.length
        if ended:
            self.reset()
        terminated = ended and self.rng.random() < 0.5
        return obs, self.rng.integers(4), self.rng.normal(), terminated, next_obs


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    depth=st.integers(1, 4),
    colors=st.sampled_from([1, 2, 256]),
    length=st.sampled_from([1, 2, 7, 50]),
    zero_padded=st.booleans(),
    members=st.integers(1, 2),
    n_envs=st.integers(1, 3),
    spare=st.integers(0, 30),
    pausing=st.booleans(),
)
def test_batches_are_those_of_a_buffer_that_stores_whole_stacks(
    seed, depth, colors, length, zero_padded, members, n_envs, spare, pausing
):
    rng = np.random.default_rng(seed)
    envs = [
        [Stacks(rng, depth, colors, length, zero_padded) for _ in range(n_envs)]
        for _ in range(members)
    ]
    capacity = n_envs + spare
    replay = FrameReplay(capacity, (depth, 2, 3), members=members)
    whole = Replay(capacity, depth * 2 * 3, 1, members)
    for k in range(60):
        # environments that reset on their next step take no part in it
        playing = rng.random(n_envs) < (0.8 if pausing else 1.0)
        if not playing.any():
            continue
        transitions = [[row[i].step() for i in np.flatnonzero(playing)] for row in envs]
        obs, action, reward, terminated, next_obs = (
            np.array([[transition[f] for transition in row] for row in transitions])
            for f in range(5)
        )
        replay.add(obs, action, reward, terminated, next_obs)
        whole.add(
            obs.reshape(members, playing.sum(), -1),
            action,
            reward,
            terminated,
            next_obs.reshape(members, playing.sum(), -1),
        )
        if k % 10 == 9:
            assert_same_batches(replay, whole)
            assert_places_are_counted(replay)


def assert_same_batches(replay, whole):
    members = len(replay.rows)
    ours = replay.sample(50, Streams(Purpose.REPLAY, range(members)))
    theirs = whole.sample(50, Streams(Purpose.REPLAY, range(members)))
    assert ours.obs.dtype == ours.next_obs.dtype == torch.uint8
    for ours_field, theirs_field in zip(ours, theirs, strict=True):
        assert torch.equal(ours_field.float().view(theirs_field.shape), theirs_field)


def assert_places_are_counted(replay):
    for rows, uses, free in zip(replay.rows, replay.uses, replay.free, strict=True):
        shown = rows[:, replay.columns].long().flatten()
        places = range(replay.frames.shape[1])
        counted = torch.bincount(shown, minlength=len(places)).tolist()
        assert counted == [uses[place] for place in places]
        assert sorted(free) == [place for place in places if not uses[place]]


class Film:
    """One environment whose frames are numbered, in episodes of a length; stacks have 4."""

    def __init__(self, length):
        self.length, self.time, self.number = length, 0, -1

    def frame(self):
        self.number += 1
        return np.array([self.number], np.uint32).view(np.uint8).reshape(1, 2, 2)

    def play(self, replay, steps):
        """The reward of a transition is the number of its last frame."""
        for _ in range(steps):
            if self.time % self.length == 0:
                self.stack = self.frame().repeat(4, axis=0)
            self.time += 1
            obs, self.stack = self.stack, np.concatenate((self.stack[1:], self.frame()))
            zero = np.zeros((1, 1))
            replay.add(obs[None, None], zero, zero + self.number, zero, self.stack[None, None])


def test_each_frame_is_kept_once_and_as_long_as_a_transition_shows_it():
    replay, film = FrameReplay(50, (4, 2, 2)), Film(length=10)
    for steps, shown in (
        (10, 11),  # an episode has one frame more than transitions
        (20, 22),
        (50, 55),
        (150, 55),
        (153, 55 + 4),  # the oldest stack reaches back to the first frame of its episode
        (155, 55 - 2 + 6),
    ):
        film.play(replay, steps - replay.added)
        kept = replay.frames.shape[1] - len(replay.free[0])
        assert kept - (steps < 50) == shown  # rows without a transition show one frame
    assert replay.frames.shape[1] == 50 + 50 // 16 + 8


def test_places_are_made_where_episodes_are_short():
    replay = FrameReplay(64, (4, 2, 2))
    assert replay.frames.shape[1] == 64 + 4 + 8
    Film(length=1).play(replay, 200)
    assert 2 * 64 <= replay.frames.shape[1] <= 2 * 64 + 4 + 8
    assert_places_are_counted(replay)
    batch = replay.sample(100, Streams(Purpose.REPLAY, [0]))
    for stacks, number in ((batch.obs, batch.reward - 1), (batch.next_obs, batch.reward)):
        numbers = stacks[0, :, -1].flatten(1).contiguous().view(torch.int32)[:, 0]
        assert torch.equal(numbers.float(), number[0])


@pytest.mark.parametrize("ends", [[20], [70], [20, 50, 51, 70], [3, 70, 100, 101]])
def test_what_was_dumped_in_pieces_is_loaded_as_it_was(ends):
    replay, film = FrameReplay(32, (4, 2, 2)), Film(length=7)
    pieces = []
    for end in ends:
        n = min(32, end - replay.added)
        film.play(replay, end - replay.added)
        pieces.append((end, n, replay.dump(n)))
    loaded = FrameReplay(32, (4, 2, 2))
    for end, n, data in pieces:
        if end > ends[-1] - 32:
            loaded.added = end - n
            loaded.load(data, n)
    for _ in range(3):
        assert loaded.added == replay.added
        pair = (r.sample(99, Streams(Purpose.REPLAY, [0])) for r in (loaded, replay))
        for ours, theirs in zip(*pair, strict=True):
            assert torch.equal(ours, theirs)
        assert_places_are_counted(loaded)
        copy.deepcopy(film).play(loaded, 13)
        film.play(replay, 13)


def test_images_that_are_no_stack_of_frames_come_back_too():
    replay, rng = FrameReplay(20, (3, 2, 2)), np.random.default_rng(0)
    images = rng.integers(0, 256, (61, 3, 2, 2), dtype=np.uint8)
    for k in range(60):
        zero = np.zeros((1, 1))
        replay.add(images[None, None, k], zero, zero + k, zero, images[None, None, k + 1])
    batch = replay.sample(100, Streams(Purpose.REPLAY, [0]))
    k = batch.reward[0].int().numpy()
    assert np.array_equal(batch.obs[0], images[k])
    assert np.array_equal(batch.next_obs[0], images[k + 1])
    assert_places_are_counted(replay)


def test_more_than_the_capacity_at_once_and_more_than_the_places_that_rows_can_name_are_refused():
    replay = FrameReplay(2, (4, 2, 2))
    obs, rest = np.zeros((1, 3, 4, 2, 2), np.uint8), np.zeros((1, 3))
    with pytest.raises(ValueError, match="cannot add 3 transitions at once to a capacity of 2"):
        replay.add(obs, rest, rest, rest, obs)
    with pytest.raises(ValueError, match="at most 16777216 places, got"):
        FrameReplay(2**24, (4, 2, 2))


# --- training -------------------------------------------------------------------------------------


def balls(stacks):
    """In which row the ball is in each frame, [..., K]; on the paddle it is not seen."""
    seen = stacks[..., ::6, ::6] == 255
    return torch.where(seen.any(-1).any(-1), seen.any(-1).int().argmax(-1), 5)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_transitions_of_vector_environments_end_where_their_episodes_do(mode):
    config = TrainConfig("test/Catch-v0", 300, n_envs=3)
    envs = SyncVectorEnv([lambda: make_env("test/Catch-v0")] * 3, autoreset_mode=mode)
    training = Training("dqn", replace(CONFIG, buffer_size=100), config, envs=envs)
    while training.step < 200:
        training.advance()
    batch = training.replay.sample(500, Streams(Purpose.REPLAY, [0]))
    before, after = balls(batch.obs), balls(batch.next_obs)
    assert torch.equal(after[..., 1], before[..., 1] + 1)
    assert torch.equal(after[..., 0], before[..., 1])
    assert torch.equal(before[..., 0], (before[..., 1] - 1).clamp(min=0))
    assert torch.equal(batch.terminated == 1, after[..., 1] == 5)
    assert torch.equal(batch.reward != 0, after[..., 1] == 5)


def test_images_cannot_be_compiled():
    config = TrainConfig("test/Catch-v0", 300, compile=True)
    with pytest.raises(ValueError, match="compile is for vectors of observations, got images"):
        Training("dqn", CONFIG, config)


def test_dqn_learns_to_catch():
    config = TrainConfig("test/Catch-v0", 2_000, eval_every=2_000, eval_episodes=100)
    training = Training("dqn", CONFIG, config)
    training.evaluate()
    assert training.evaluations["last"].returns.mean() < 0
    training.run()
    assert training.evaluations["last"].returns.mean() > 0.9


def resumed(folder, agent, config, seeds, at):
    """A training saved at several steps and the one restored from there, both a little later."""
    training = Training("dqn", agent, config, seeds)
    checkpoints = Checkpoints(folder, training)
    for step in at:
        while training.step < step:
            training.advance()
        checkpoints.save()
    again = Training("dqn", agent, config, seeds)
    checkpoint, damaged = newest(folder)
    assert (checkpoint.step, damaged) == (at[-1], [])
    assert restore(checkpoint, again) == []
    for each in (training, again):
        while each.step < at[-1] + 40:
            each.advance()
    return training, again


def assert_same_training(ours, theirs):
    assert ours.updates == theirs.updates > 10
    assert np.array_equal(ours.obs, theirs.obs)
    assert np.array_equal(ours.episode_return, theirs.episode_return)
    for pair in zip(ours.agent.policy.parameters(), theirs.agent.policy.parameters(), strict=True):
        assert torch.equal(*pair)
    batches = (t.replay.sample(99, Streams(Purpose.REPLAY, t.seeds)) for t in (ours, theirs))
    for pair in zip(*batches, strict=True):
        assert torch.equal(*pair)


@pytest.mark.parametrize("at", [(30,), (20, 70, 90, 150)])
def test_a_training_on_images_goes_on_from_its_checkpoint_to_the_bit(tmp_path, at):
    agent = replace(CONFIG, learning_starts=10, buffer_size=64)
    config = TrainConfig("test/Catch-v0", 200, n_envs=2, eval_every=0)
    assert_same_training(*resumed(tmp_path / "c", agent, config, (2, 5), at))


def test_a_checkpoint_holds_each_frame_once_as_bytes(tmp_path):
    agent = replace(CONFIG, gradient_steps=0)
    training = Training("dqn", agent, TrainConfig("test/Catch-v0", 200, eval_every=0))
    while training.step < 100:
        training.advance()
    Checkpoints(tmp_path, training).save()
    size = (tmp_path / "replay-0-100.f32").stat().st_size
    rows, frames = 100 * 4 * (2 + 1 + 1 + 1 + 2), 100 + 20
    assert rows + 100 * 36 * 36 < size <= rows + frames * 36 * 36


@pytest.mark.parametrize(
    ("algo", "space", "message"),
    [
        ("dqn", spaces.Box(0, 1, (4, 36, 36), np.float32), "dqn also takes images, a uint8 Box"),
        ("dqn", spaces.Box(0, 255, (36, 36), np.uint8), r"\(frames, height, width\)"),
        ("sac", spaces.Box(0, 255, (4, 36, 36), np.uint8), r"Box, got .*uint8\): --wrap a wrapper"),
        ("dqn", spaces.Box(0, 255, (64, 96, 48), np.uint8), r"fewer frames .* got \(64, 96, 48\)"),
    ],
)
def test_other_images_are_refused_with_a_sentence(algo, space, message):
    with pytest.raises(ValueError, match=message):
        interface(space, spaces.Discrete(2), algo)


def test_the_command_line_trains_resumes_and_plays_on_images(tmp_path, capsys):
    command = "dqn --env-id test/Catch-v0 --total-steps 60 --learning-starts 20 --eval-episodes 2"
    assert train.main([*command.split(), "--segments", "2", "--runs-dir", str(tmp_path)]) == 0
    (run,) = tmp_path.iterdir()
    assert enjoy.main([str(run), "--episodes", "2"]) == 0
    assert "over 2 episodes" in capsys.readouterr().out
    assert train.main(["--resume", str(run)]) == 0
    assert "has finished" in capsys.readouterr().out


def test_a_large_network_gets_fewer_segments_by_default():
    _, options = train.parse(["dqn", "--env-id", "test/Catch-v0", "--hidden", "16384"])
    training, averages = train.build("dqn", options)
    size = sum(p.numel() for p in training.agent.policy.parameters())
    assert averages.timeline.nbytes <= 1 << 29 < averages.timeline.nbytes + 16 * size
    training.close()


# --- Atari ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _atari():
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")


@pytest.mark.usefixtures("_atari")
def test_a_game_is_seen_as_four_gray_frames_and_its_seed_says_all():
    env = make_env("ALE/Pong-v5")
    assert env.observation_space == spaces.Box(0, 255, (4, 84, 84), np.uint8)
    assert env.unwrapped.spec.kwargs["repeat_action_probability"] == 0.25
    films = []
    for seed in (1, 1, 2):
        frames = [env.reset(seed=seed)[0]]
        frames += [env.step(k // 5 % 6)[0] for k in range(60)]
        films.append(np.stack(frames))
    assert np.array_equal(films[0], films[1])
    assert not np.array_equal(films[0], films[2])
    assert np.array_equal(films[0][1:, :-1], films[0][:-1, 1:])
    env.close()


@pytest.mark.usefixtures("_atari")
def test_a_game_ends_with_its_last_life():
    env = make_env("ALE/Breakout-v5")
    env.reset(seed=1)
    lives, ended = [], False
    while not ended:
        _, _, ended, _, info = env.step(1)
        lives.append(info["lives"])
    assert sorted({*lives}) == [0, 1, 2, 3, 4, 5]
    env.close()


@pytest.mark.usefixtures("_atari")
def test_pong_trains_and_goes_on_from_its_checkpoint_to_the_bit(tmp_path):
    agent = replace(preset("dqn", "ALE/Pong-v5")[0], learning_starts=40, buffer_size=100)
    config = TrainConfig("ALE/Pong-v5", 300, eval_every=0)
    assert_same_training(*resumed(tmp_path / "c", agent, config, (1,), (30, 80)))


def test_an_atari_game_without_its_package_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(ValueError, match=r"ALE/Pong-v5.*pip install .*--group atari"):
        make_env("ALE/Pong-v5")


def test_pongs_preset_is_that_of_the_zoo_in_gradient_steps():
    config, total_steps = preset("dqn", "ALE/Pong-v5")
    assert total_steps == 10_000_000
    assert config.target_update_every * config.train_every == 1000
    assert (config.buffer_size, config.hidden, config.epsilon_end) == (100_000, (512,), 0.01)
