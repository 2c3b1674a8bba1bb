import itertools
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from agents.checkpoint import newest
from agents.ddpg import DDPGConfig
from agents.dqn import DQNConfig
from agents.environments import EnvironmentFault
from agents.nonfinite import BadGradient, GradientWatch, NonFiniteError
from agents.sac import SACConfig
from agents.td3 import TD3Config
from agents.training import TrainConfig, Training
from scripts.train import main

CONFIGS = {
    "dqn": DQNConfig(batch_size=8, learning_starts=5, train_every=1, hidden=(8,)),
    "ddpg": DDPGConfig(batch_size=8, learning_starts=5, hidden=(8,)),
    "sac": SACConfig(batch_size=8, learning_starts=5, hidden=(8,)),
    "td3": TD3Config(batch_size=8, learning_starts=5, hidden=(8,), policy_delay=1),
}
FAULTS = {}  # (episode, step in it) -> what goes wrong there; step 0 is the reset


class Faulty(gym.Env):
    """Episodes of 10 steps, in which something goes wrong where `FAULTS` says so."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,))

    def __init__(self, discrete):
        self.action_space = spaces.Discrete(2) if discrete else spaces.Box(-1, 1, (1,))
        self.episode, self.time = -1, 0

    def reset(self, *, seed=None, options=None):
        self.episode, self.time = self.episode + 1, 0
        return self.observe(), {}

    def step(self, action):
        assert np.isfinite(action).all()
        self.time += 1
        fault = FAULTS.get((self.episode, self.time))
        if fault == "raise":
            raise ZeroDivisionError("the wheel came off")
        reward = math.nan if fault == "reward" else [1.0] if fault == "reward shape" else 1.0
        return self.observe(), reward, False, self.time == 10, {}

    def observe(self):
        fault = FAULTS.get((self.episode, self.time))
        if fault == "shape":
            return np.zeros(3, dtype=np.float32)
        bad = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}.get(fault, 0.0)
        return np.array([self.time / 10 + bad, 1.0], dtype=np.float32)


@pytest.fixture(autouse=True)
def _environments():
    FAULTS.clear()
    gym.register("test/Faulty-v0", lambda: Faulty(discrete=True))
    gym.register("test/FaultyBox-v0", lambda: Faulty(discrete=False))
    yield
    gym.registry.pop("test/Faulty-v0")
    gym.registry.pop("test/FaultyBox-v0")


def make(algo, steps=60, seeds=(3,), n_envs=1, **options):
    env_id = "test/Faulty-v0" if algo == "dqn" else "test/FaultyBox-v0"
    config = TrainConfig(env_id, steps, n_envs=n_envs, eval_every=0, **options)
    return Training(algo, CONFIGS[algo], config, seeds)


def weights(training):
    agent = training.agent
    modules = [agent.policy, *agent.targets.values()]
    return torch.cat(
        [
            p.detach().flatten()
            for m in modules
            for p in m.state_dict().values()
            if isinstance(p, torch.Tensor)
        ]
    )


def trained(training):
    """The flat parameters of each network."""
    return [p for flat in training.agent.descent.flats.values() for p in flat.parameters]


def poison(training, network, at, value=math.nan):
    """The gradient of one network is bad at some gradient steps."""
    watch, calls = training.agent.descent.watch, itertools.count(1)
    inner = watch.found_inf

    def found_inf(name, norm):
        if name == network and next(calls) in at:
            flat = training.agent.descent.flats[name]
            flat.parameters[0].gradient.view(-1)[0] = value
            norm = flat.grad_norm()
        return inner(name, norm)

    watch.found_inf = found_inf


class Huge(gym.Env):
    """Ends with an observation that float32 does not hold."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros(2), {}

    def step(self, action):
        return np.array([1e300, 0.0]), 1.0, True, False, {}


def test_a_last_observation_that_float32_does_not_hold_stops_the_run_without_a_warning():
    envs = SyncVectorEnv([Huge], autoreset_mode=AutoresetMode.SAME_STEP)
    training = Training("dqn", CONFIGS["dqn"], TrainConfig("unused", 60, eval_every=0), envs=envs)
    with pytest.raises(NonFiniteError, match="an observation is not finite in float32"):
        training.run()


@pytest.mark.parametrize("fault", ["nan", "inf", "-inf"])
def test_a_bad_observation_stops_the_run_and_says_what_reproduces_it(fault):
    FAULTS[2, 4] = fault
    training = make("dqn")
    with pytest.raises(NonFiniteError) as stopped:
        training.run()
    seed = training.envs.envs[0].reset_seed
    assert str(stopped.value) == (
        "an observation is not finite in float32 after 23 environment steps: environment 0 of "
        f"seed 3, step 4 of the episode that reset(seed={seed}) begins"
    )
    assert weights(training).isfinite().all()
    assert training.replay.added == 23


def test_a_bad_observation_at_the_end_of_an_episode_is_of_that_episode():
    FAULTS[1, 10] = "nan"
    training = make("dqn")
    with pytest.raises(NonFiniteError, match=r"an observation .* step 10 of the episode"):
        training.run()


def test_a_bad_reset_is_named():
    FAULTS[1, 0] = "inf"
    training = make("dqn")
    with pytest.raises(NonFiniteError, match=r"the first observation of an episode .* step 0 of"):
        training.run()


def test_a_bad_first_reset_is_noticed_before_anybody_acts_on_it():
    FAULTS[0, 0] = "nan"
    training = make("ddpg")
    with pytest.raises(NonFiniteError, match=r"after 0 environment steps: .* step 0 of"):
        training.run()
    assert training.replay.added == 0


def test_a_bad_reward_of_one_of_several_seeds_names_the_seed():
    training = make("dqn", seeds=(3, 4), n_envs=2)
    training.envs.envs[3].env.unwrapped.step = lambda action: (
        np.zeros(2, dtype=np.float32),
        math.inf,
        False,
        False,
        {},
    )
    with pytest.raises(NonFiniteError, match=r"a reward .* environment 1 of seed 4, step 1"):
        training.run()


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("raise", "raised ZeroDivisionError in step: the wheel came off"),
        ("shape", r"returned an observation of shape \(3,\), not \(2,\)"),
        ("reward shape", r"returned a reward that is not one real number, but \[1.0\]"),
    ],
)
def test_an_environment_that_breaks_is_named_with_what_reproduces_it(fault, text):
    FAULTS[1, 7] = fault
    training = make("dqn")
    with pytest.raises(EnvironmentFault, match=text) as stopped:
        training.run()
    seed = training.envs.envs[0].reset_seed
    assert f"environment 0 of seed 3, step 7 of the episode that reset(seed={seed})" in str(
        stopped.value
    )


def test_skipping_leaves_out_the_transitions_that_touch_a_bad_number_and_no_others():
    FAULTS.update({(1, 4): "nan", (2, 10): "inf", (3, 0): "nan", (4, 2): "reward"})
    training = make("dqn", on_nonfinite="skip")
    training.run()
    # into and out of (1, 4), into (2, 10), out of the reset of 3, and one reward
    assert training.skipped == 5
    assert training.step == 60
    assert training.replay.added == 55
    assert training.replay.last(55).isfinite().all()
    assert weights(training).isfinite().all()


def test_skipping_is_refused_for_several_seeds_together():
    with pytest.raises(ValueError, match="on_nonfinite skip trains one seed"):
        make("dqn", seeds=(1, 2), on_nonfinite="skip")


NETWORKS = [
    ("dqn", "q"), ("ddpg", "critic"), ("ddpg", "actor"),
    ("sac", "critic"), ("sac", "actor"), ("sac", "temperature"),
    ("td3", "critic"), ("td3", "actor"),
]  # fmt: skip


@pytest.mark.parametrize(("algo", "network"), NETWORKS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_gradient_stops_the_run_before_any_weight_has_it(algo, network, value):
    training = make(algo)
    poison(training, network, at={12}, value=value)
    with pytest.raises(NonFiniteError) as stopped:
        training.run()
    # gradient steps begin at environment step 6
    assert str(stopped.value) == (
        f"the gradient of {network} of seed 3 was not finite at gradient step 12, "
        "environment step 17"
    )
    assert weights(training).isfinite().all()


@pytest.mark.parametrize(("algo", "network"), NETWORKS)
def test_skipping_a_bad_gradient_moves_nothing_of_that_network(algo, network):
    training, seen = make(algo, on_nonfinite="skip"), []
    poison(training, network, at={12, 20})
    inner = training.agent.learn

    def learn(*given):
        before = [p.clone() for p in trained(training)]
        tags = inner(*given)
        after = trained(training)
        seen.append([not torch.equal(x, y) for x, y in zip(before, after, strict=True)])
        return tags

    training.agent.learn = learn
    training.run()
    assert training.skipped == 2
    networks = len(training.agent.descent.optimizers)
    for step, moved in enumerate(seen, 1):
        assert sum(moved) == networks - (step in {12, 20}), step
    assert weights(training).isfinite().all()


def test_a_bad_gradient_is_found_at_the_next_log_line_not_only_at_the_end():
    class Log:
        def scalars(self, step, values):
            pass

        def evaluation(self, *args):
            pass

    config = TrainConfig("test/Faulty-v0", 60, eval_every=0, log_every=20)
    training = Training("dqn", CONFIGS["dqn"], config, (3,), logs=[Log()])
    poison(training, "q", at={3})
    with pytest.raises(NonFiniteError, match="gradient step 3,"):
        training.run()
    assert training.step == 20


def test_the_guard_folds_twins_and_names_members_and_steps():
    watch = GradientWatch(["critic", "actor"], members=2, device="cpu", capacity=3)
    good, bad = torch.ones(4), torch.tensor([1.0, 1.0, math.nan, 1.0])
    for step, norm in ((10, good), (11, bad), (12, good)):
        flag = watch.found_inf("critic", norm)
        assert flag.shape == ()
        assert flag.item() == float(norm is bad)
        assert watch.found_inf("actor", norm[:2]).item() == 0
        watch.count(step)
    assert watch.full
    assert watch.read() == [BadGradient("critic", 1, 11, 1)]
    assert not watch.full
    assert watch.read() == []


def test_flags_are_read_before_they_run_out():
    training = make("dqn", steps=300)
    training.agent.descent.watch = GradientWatch(["q"], 1, "cpu", capacity=16)
    poison(training, "q", at={20})
    with pytest.raises(NonFiniteError, match="gradient step 20,"):
        training.run()
    assert training.updates == 32


@pytest.mark.parametrize("noted", [3, 20])  # of 16 rows
def test_flags_of_steps_that_were_not_counted_are_not_given_to_others(noted):
    watch = GradientWatch(["q"], 1, "cpu", capacity=16)
    for _ in range(noted):
        watch.note()
    watch.count(7, noted=True)
    with pytest.raises(RuntimeError, match=f"noted {noted} gradient steps and 1 were counted"):
        watch.read()


def test_the_command_line_names_the_fault_and_the_last_good_checkpoint(tmp_path, capsys):
    FAULTS[4, 5] = "nan"
    argv = ["dqn", "--env-id", "test/Faulty-v0", "--total-steps", "100", "--runs-dir"]
    argv += [str(tmp_path), "--checkpoint-every", "20", "--hidden", "8", "--eval-every", "100"]
    argv += ["--learning-starts", "90"]
    assert main(argv) == 1
    printed = capsys.readouterr().err
    assert "an observation is not finite in float32 after 44 environment steps" in printed
    assert "The last good checkpoint is of step 40." in printed
    (run,) = tmp_path.iterdir()
    assert f"--resume {run}" in printed
    checkpoint, notes = newest(run / "checkpoint")
    assert (checkpoint.step, notes) == (40, [])


def test_no_checkpoint_is_written_after_a_bad_gradient(tmp_path, monkeypatch, capsys):
    inner = GradientWatch.found_inf

    def found_inf(self, network, norm):
        return inner(self, network, norm * (math.nan if self.env_steps[-1:] == [50] else 1))

    monkeypatch.setattr(GradientWatch, "found_inf", found_inf)
    argv = ["dqn", "--env-id", "test/Faulty-v0", "--total-steps", "100", "--runs-dir"]
    argv += [str(tmp_path), "--checkpoint-every", "20", "--learning-starts", "5", "--hidden", "8"]
    argv += ["--train-every", "1", "--eval-every", "100"]
    assert main(argv) == 1
    printed = capsys.readouterr().err
    assert "the gradient of q of seed 1 was not finite" in printed
    assert "The last good checkpoint is of step 40." in printed
