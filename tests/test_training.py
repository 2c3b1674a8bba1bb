import warnings
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from agents.ddpg import DDPGConfig
from agents.dqn import DQNConfig
from agents.presets import ALGORITHMS, PRESETS, preset
from agents.sac import SACConfig
from agents.seeding import episode_seed
from agents.td3 import TD3Config
from agents.training import TrainConfig, Training, crossings
from agents.vector import EpisodeSeeds
from tests.agent_cases import after_each_step

DQN_SMALL = DQNConfig(
    learning_rate=1e-2, batch_size=16, learning_starts=10, target_update_every=5, hidden=(16,)
)
SAC_SMALL = SACConfig(batch_size=16, learning_starts=10, hidden=(16,))
DDPG_SMALL = DDPGConfig(batch_size=16, learning_starts=10, hidden=(16,))
TD3_SMALL = TD3Config(batch_size=16, learning_starts=10, hidden=(16,))


class Counting(gym.Env):
    """Observes (its number, the episode, the time); ends after 3 steps, in odd episodes after 2.

    Odd episodes are cut by time, even ones end by their own rules.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (3,))
    action_space = spaces.Discrete(2)

    def __init__(self, number=0):
        self.number, self.episode, self.time = number, -1, 0

    def reset(self, *, seed=None, options=None):
        self.episode, self.time = self.episode + 1, 0
        return self.observation(), {}

    def step(self, action):
        self.time += 1
        odd = self.episode % 2 == 1
        ended = self.time == (2 if odd else 3)
        return self.observation(), float(self.time), ended and not odd, ended and odd, {}

    def observation(self):
        return np.array([self.number, self.episode, self.time], dtype=np.float32)


class Reward(gym.Env):
    """One step an episode; the reward says how good the action was, whatever the observation."""

    observation_space = spaces.Box(-1, 1, (2,))

    def __init__(self, discrete=True):
        self.action_space = spaces.Discrete(3) if discrete else spaces.Box(-2.0, 6.0, (1,))
        self.taken = []

    def reset(self, *, seed=None, options=None):
        return np.ones(2, dtype=np.float32), {}

    def step(self, action):
        self.taken.append(action)
        good = action == 1 if self.action_space.shape == () else -(((action[0] - 4.0) / 4) ** 2)
        return np.ones(2, dtype=np.float32), float(good), True, False, {}


@pytest.fixture(scope="module", autouse=True)
def _environments():
    gym.register("test/Counting-v0", Counting)
    gym.register("test/Discrete-v0", Reward)
    gym.register("test/Continuous-v0", lambda: Reward(discrete=False))
    yield
    for name in ("Counting", "Discrete", "Continuous"):
        del gym.registry[f"test/{name}-v0"]


class Recorder:
    """A log that keeps what it is told."""

    def __init__(self):
        self.values, self.evaluations = [], []

    def scalars(self, step, values):
        self.values += [(step, tag, value) for tag, value in values.items()]

    def evaluation(self, step, scheme, returns, lengths):
        self.evaluations.append((step, scheme, returns.copy()))

    def steps(self, tag):
        return [step for step, name, _ in self.values if name == tag]


def counting(total_steps, *, agent=DQN_SMALL, envs=None, **kwargs):
    config = TrainConfig("test/Counting-v0", total_steps, eval_every=0, **kwargs)
    if total_steps <= agent.learning_starts:
        agent = replace(agent, gradient_steps=0)
    return Training("dqn", agent, config, envs=envs)


def transitions(training):
    """(number, episode, time, reward, terminated, next episode, next time) of each stored row."""
    size = training.replay.size
    rows = training.replay.rows[0, :size, [0, 1, 2, 4, 5, 7, 8]]
    return [tuple(int(x) for x in row) for row in rows]


EPISODES = [  # the first two episodes of one environment, as they have to be stored
    (0, 0, 0, 1, 0, 0, 1),
    (0, 0, 1, 2, 0, 0, 2),
    (0, 0, 2, 3, 1, 0, 3),  # terminated, with the real last observation
    (0, 1, 0, 1, 0, 1, 1),
    (0, 1, 1, 2, 0, 1, 2),  # truncated: not terminated, and the real last observation
]


def test_the_buffer_holds_the_real_last_observation_and_tells_terminated_from_truncated():
    training = counting(5)
    training.run()
    assert transitions(training) == EPISODES


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_both_ways_of_resetting_give_the_same_buffer(mode, n_envs):
    envs = SyncVectorEnv(
        [lambda number=i: Counting(number) for i in range(n_envs)], autoreset_mode=mode
    )
    training = counting(5 * n_envs, envs=envs, n_envs=n_envs)
    training.run()
    for i in range(n_envs):
        expected = [(i, *row[1:]) for row in EPISODES]
        assert [row for row in transitions(training) if row[0] == i][:5] == expected


def test_a_step_that_only_resets_counts_as_no_step():
    envs = SyncVectorEnv([Counting], autoreset_mode=AutoresetMode.NEXT_STEP)
    training = counting(9, envs=envs)
    steps = []
    for _ in range(8):
        training.advance()
        steps.append(training.step)
    assert steps == [1, 2, 3, 3, 4, 5, 5, 6]
    assert training.replay.size == 6


def test_episodes_are_counted_alike_in_both_ways_of_resetting():
    for mode in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP):
        log = Recorder()
        training = counting(8, envs=SyncVectorEnv([Counting], autoreset_mode=mode))
        training.logs = (log,)
        training.run()
        returns = [(s, v) for s, tag, v in log.values if tag == "charts/episodic_return"]
        lengths = [(s, v) for s, tag, v in log.values if tag == "charts/episodic_length"]
        assert returns == [(3, 6.0), (5, 3.0), (8, 6.0)]
        assert lengths == [(3, 3.0), (5, 2.0), (8, 3.0)]


def test_crossings_counts_the_multiples_passed():
    for every in (1, 3, 7):
        for jump in (1, 2, 10):
            before = range(0, 100, jump)
            fired = [k for b in before for k in range(b + 1, b + jump + 1) if k % every == 0]
            assert sum(crossings(b, b + jump, every) for b in before) == len(fired)


@pytest.mark.parametrize("n_envs", [1, 2, 5])
def test_gradient_steps_fire_every_k_environment_steps_after_learning_starts(n_envs):
    agent = replace(DQN_SMALL, learning_starts=10, train_every=4, gradient_steps=3)
    training = counting(40, agent=agent, n_envs=n_envs)
    seen = {}
    while training.step < 40:
        training.advance()
        seen[training.step] = training.updates
    for step, updates in seen.items():
        rounds = len([k for k in range(11, step + 1) if k % 4 == 0])  # 12, 16, 20, ...
        assert updates == 3 * rounds
    assert training.updates == 24


def test_evaluation_comes_every_k_steps_and_at_the_end():
    log = Recorder()
    config = TrainConfig("test/Counting-v0", 25, eval_every=10, eval_episodes=2)
    Training("dqn", DQN_SMALL, config, logs=(log,)).run()
    assert [(step, scheme) for step, scheme, _ in log.evaluations] == [
        (10, "last"),
        (20, "last"),
        (25, "last"),
    ]
    config = replace(config, total_steps=60, eval_every=None)
    log = Recorder()
    Training("dqn", DQN_SMALL, config, logs=(log,)).run()
    assert [step for step, _, _ in log.evaluations] == list(range(3, 61, 3))


@pytest.mark.parametrize(("algo", "agent"), [("dqn", DQN_SMALL), ("sac", SAC_SMALL)])
def test_evaluation_leaves_training_as_it_would_be_without(algo, agent):
    env_id = "CartPole-v1" if algo == "dqn" else "Pendulum-v1"
    ends = []
    for eval_every in (7, 0):
        config = TrainConfig(env_id, 60, eval_every=eval_every, eval_episodes=1)
        training = Training(algo, agent, config)
        while training.step < 60:
            training.advance()
        assert training.agent.policy.training
        ends.append([training.replay.rows[:, :60], *training.agent.policy.parameters()])
    for with_evaluation, without in zip(*ends, strict=True):
        assert torch.equal(with_evaluation, without)


def test_every_scheme_is_evaluated_on_the_same_episodes():
    log = Recorder()
    config = TrainConfig("CartPole-v1", 30, eval_every=30, eval_episodes=3)
    training = Training("dqn", DQN_SMALL, config, logs=(log,))
    training.schemes["copy"] = lambda: training.agent.policy.state_dict()
    training.schemes["zero"] = lambda: {
        name: torch.zeros_like(p) for name, p in training.agent.policy.named_parameters()
    }
    training.run()
    (_, _, last), (_, _, copied), (_, _, zero) = log.evaluations
    assert [scheme for _, scheme, _ in log.evaluations] == ["last", "copy", "zero"]
    assert np.array_equal(last, copied)
    assert zero.max() < 12  # always pushing to one side


@pytest.mark.parametrize(
    ("algo", "agent", "env_id", "steps"),
    [
        ("dqn", replace(DQN_SMALL, train_every=1), "CartPole-v1", 120),
        ("ddpg", DDPG_SMALL, "Pendulum-v1", 60),
        ("sac", SAC_SMALL, "Pendulum-v1", 60),
        ("td3", TD3_SMALL, "Pendulum-v1", 60),
    ],
)
@pytest.mark.parametrize("n_envs", [1, 2])
def test_a_seeds_whole_run_is_the_same_alone_and_beside_others(algo, agent, env_id, steps, n_envs):
    config = TrainConfig(env_id, steps, n_envs=n_envs, eval_every=steps, eval_episodes=2)
    together = Training(algo, agent, config, seeds=(3, 0, 8))
    together.run()
    for member, seed in enumerate((3, 0, 8)):
        alone = Training(algo, agent, config, seeds=(seed,))
        alone.run()
        for ours, theirs in zip(
            [together.replay.rows, *together.agent.policy.parameters()],
            [alone.replay.rows, *alone.agent.policy.parameters()],
            strict=True,
        ):
            assert torch.equal(ours[member], theirs[0])
        returns = together.evaluations["last"].returns[member]
        assert np.array_equal(returns, alone.evaluations["last"].returns[0])


def test_every_episode_has_a_seed_of_its_own_by_which_it_can_be_played_again():
    env = EpisodeSeeds(gym.make("CartPole-v1"), seed=5, env_index=2)
    starts = [env.reset()[0] for _ in range(4)]
    assert len({start.tobytes() for start in starts}) == 4
    again = gym.make("CartPole-v1").reset(seed=episode_seed(5, 2, 3))[0]
    assert np.array_equal(starts[3], again)
    seeds = {episode_seed(s, i, e) for s in range(5) for i in range(5) for e in range(5)}
    assert len(seeds) == 125


def test_the_buffer_holds_actions_in_minus_one_to_one_and_the_environment_gets_its_own_range():
    config = TrainConfig("test/Continuous-v0", 200, eval_every=0)
    training = Training("ddpg", replace(DDPG_SMALL, learning_starts=200, gradient_steps=0), config)
    training.run()
    stored = training.replay.rows[0, :, 2].numpy()
    taken = np.concatenate(training.envs.envs[0].unwrapped.taken)
    assert stored.min() < -0.9
    assert stored.max() > 0.9
    np.testing.assert_allclose(taken, 2 + 4 * stored, atol=1e-5)


@pytest.mark.parametrize("algo", ["dqn", "ddpg", "sac", "td3"])
def test_the_better_action_is_learned(algo):
    quick = {"learning_rate": 3e-3, "batch_size": 64, "learning_starts": 200, "hidden": (32, 32)}
    agent = {
        "dqn": replace(DQN_SMALL, train_every=1),
        "ddpg": replace(DDPG_SMALL, **quick),
        "sac": replace(SAC_SMALL, **quick, alpha_init=0.05),
        "td3": replace(TD3_SMALL, **quick),
    }[algo]
    env_id = "test/Discrete-v0" if algo == "dqn" else "test/Continuous-v0"
    training = Training(algo, agent, TrainConfig(env_id, 800, eval_every=800, eval_episodes=1))
    training.run()
    # the best return is 1 of 0 or 1, and 0 of -2.25 to 0 for actions from -2 to 6
    best = 1.0 if algo == "dqn" else 0.0
    assert training.evaluations["last"].returns[0, 0] == pytest.approx(best, abs=0.02)


def test_logs_get_the_documented_tags_at_log_lines_and_at_ends_of_episodes():
    tags = {
        "dqn": {"charts/epsilon", "losses/td_loss", "losses/q_values", "target/lag/q"},
        "ddpg": {
            "losses/qf_loss",
            "losses/q_values",
            "losses/actor_loss",
            "target/lag/actor",
            "target/lag/critic",
        },
        "sac": {
            "losses/qf_loss",
            "losses/q_values",
            "losses/actor_loss",
            "losses/alpha",
            "losses/alpha_loss",
            "target/lag/critic",
        },
    }
    tags["td3"] = tags["ddpg"]
    always = {"charts/episodic_return", "charts/episodic_length", "charts/SPS"}
    agents = {"dqn": DQN_SMALL, "ddpg": DDPG_SMALL, "sac": SAC_SMALL, "td3": TD3_SMALL}
    for algo, agent in agents.items():
        env_id = "test/Discrete-v0" if algo == "dqn" else "test/Continuous-v0"
        logs = Recorder(), Recorder()
        config = TrainConfig(env_id, 60, log_every=25, eval_every=0)
        Training(algo, agent, config, seeds=(0, 1), logs=logs).run()
        for log in logs:
            assert {tag for _, tag, _ in log.values} == tags[algo] | always
            assert log.steps("charts/SPS") == [25, 50]
            assert log.steps("charts/episodic_return") == list(range(1, 61))
        assert logs[0].values != logs[1].values


def test_losses_are_read_from_the_device_only_when_a_log_line_is_due(monkeypatch):
    training = counting(30, log_every=1000)
    training.logs = (Recorder(),)

    def refuse(self):
        raise AssertionError("a tensor was read back")

    for name in ("item", "tolist", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    while training.step < 30:
        training.advance()
    assert training.updates > 0


def test_stopping_ends_the_run_after_the_step_under_way():
    training = counting(100)

    def stop():
        training.stopping = training.step == 7

    training.run(stop)
    assert training.step == 7
    assert training.evaluations == {}


class Matrix(gym.Env):
    observation_space = spaces.Box(-1, 1, (2, 2))
    action_space = spaces.Discrete(2)


class Unbounded(Counting):
    action_space = spaces.Box(-np.inf, np.inf, (1,))


@pytest.mark.parametrize(
    ("algo", "field", "value", "message"),
    [
        ("dqn", "gamma", 1.5, r"gamma must be in \[0.0, 1.0\], got 1.5"),
        ("dqn", "learning_rate", np.nan, "learning_rate must be in .*, got nan"),
        ("dqn", "batch_size", 0, "batch_size must be at least 1, got 0"),
        ("dqn", "hidden", (64, 0), r"hidden must be in \[1, .*\], got \(64, 0\)"),
        ("sac", "alpha_init", 0, r"alpha_init must be in .*, got 0"),
        *(
            ("td3", field, -1, f"{field} must be .*, got -1")
            for field in (
                "tau",
                "noise_std",
                "policy_delay",
                "target_noise_std",
                "target_noise_clip",
            )
        ),
        (None, "max_episode_steps", 0, "max_episode_steps must be at least 1, got 0"),
        (None, "n_envs", 0, r"n_envs must be in \[1, .*\], got 0"),
    ],
)
def test_a_setting_outside_its_limits_is_refused(algo, field, value, message):
    run = TrainConfig("CartPole-v1", 100)
    config = ALGORITHMS[algo or "dqn"][1]()
    if algo is None:
        run = replace(run, **{field: value})
    else:
        config = replace(config, **{field: value})
    with pytest.raises(ValueError, match=message):
        Training(algo or "dqn", config, run)


@pytest.mark.parametrize(
    ("algo", "env_class", "message"),
    [
        ("dqn", Matrix, "observations must be a one-dimensional Box, got Box"),
        ("sac", Counting, r"sac needs actions in a one-dimensional Box, got Discrete\(2\)"),
        ("ddpg", Unbounded, "ddpg needs actions with finite bounds, got Box"),
        ("dqn", Unbounded, "dqn needs Discrete actions, got Box"),
    ],
)
def test_other_spaces_are_refused_with_a_sentence(algo, env_class, message):
    envs = SyncVectorEnv([env_class], autoreset_mode=AutoresetMode.SAME_STEP)
    agent = ALGORITHMS[algo][1]()
    with pytest.raises(ValueError, match=message):
        Training(algo, agent, TrainConfig("unused", 10), envs=envs)


def test_arguments_that_cannot_be_trained_on_are_refused():
    config = TrainConfig("test/Counting-v0", 10)
    with pytest.raises(ValueError, match=r"seeds must be .* got \(1, 1\)"):
        Training("dqn", DQN_SMALL, config, seeds=(1, 1))
    with pytest.raises(ValueError, match=r"seeds must be .* got \(-1,\)"):
        Training("dqn", DQN_SMALL, config, seeds=(-1,))
    with pytest.raises(ValueError, match="cannot make the environment 'Missing-v0'"):
        Training("dqn", DQN_SMALL, replace(config, env_id="Missing-v0"))
    with pytest.raises(ValueError, match="total_steps must be at least 1, got 0"):
        Training("dqn", DQN_SMALL, replace(config, total_steps=0))
    with pytest.raises(ValueError, match="buffer_size must be at least n_envs = 5, got 4"):
        Training("dqn", replace(DQN_SMALL, buffer_size=4), replace(config, n_envs=5))
    envs = SyncVectorEnv([Counting], autoreset_mode=AutoresetMode.DISABLED)
    with pytest.raises(ValueError, match="must reset by itself"):
        Training("dqn", DQN_SMALL, config, envs=envs)
    with pytest.raises(ValueError, match="must hold 2, got 1"):
        Training("dqn", DQN_SMALL, replace(config, n_envs=2), envs=SyncVectorEnv([Counting]))


def test_discrete_actions_that_do_not_start_at_zero_reach_the_environment():
    class Shifted(Reward):
        def __init__(self):
            super().__init__()
            self.action_space = spaces.Discrete(3, start=5)

    envs = SyncVectorEnv([Shifted], autoreset_mode=AutoresetMode.SAME_STEP)
    agent = replace(DQN_SMALL, learning_starts=100, gradient_steps=0)
    config = TrainConfig("test/Discrete-v0", 100, eval_every=0)
    training = Training("dqn", agent, config, envs=envs)
    training.run()
    assert set(envs.envs[0].taken) == {5, 6, 7}
    assert set(training.replay.rows[0, :100, 2].tolist()) == {0.0, 1.0, 2.0}


def test_every_preset_is_a_valid_config_for_an_environment_that_exists():
    for algo, environments in PRESETS.items():
        for env_id in environments:
            agent, total_steps = preset(algo, env_id)
            assert isinstance(agent, ALGORITHMS[algo][1])
            assert total_steps > agent.learning_starts
            if env_id.startswith("ALE/"):  # of a package of its own; test_pixels.py plays it
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                assert gym.spec(env_id).id == env_id


def test_an_environment_without_a_preset_gets_the_algorithms_defaults():
    assert preset("sac", "Unheard-v0")[0] == SACConfig()
    with pytest.raises(ValueError, match="must be one of dqn, ddpg, sac, td3, got 'ppo'"):
        preset("ppo", "CartPole-v1")


@pytest.mark.parametrize(
    ("until", "floor", "expected"),
    [
        (1.0, 0.0, [1.0, 0.75, 0.5, 0.25]),
        (0.5, 0.1, [1.0, 0.5, 0.1, 0.1]),
    ],
)
def test_a_linear_decay_falls_to_its_floor_and_stays(until, floor, expected):
    agent = replace(DQN_SMALL, train_every=10, gradient_steps=1)
    config = TrainConfig("CartPole-v1", 50, lr_decay="linear", lr_decay_until=until, lr_floor=floor)
    training = Training("dqn", agent, config)
    rates = []
    group = training.agent.descent.optimizers["q"].param_groups[0]
    after_each_step(training, lambda: rates.append(group["lr"] / agent.learning_rate))
    training.run()
    training.close()
    assert rates == pytest.approx(expected)


def test_without_an_evaluation_schedule_there_are_no_evaluations():
    log = Recorder()
    training = counting(25)
    training.logs = (log,)
    training.run()
    assert (training.step, log.evaluations, training.evaluations) == (25, [], {})
