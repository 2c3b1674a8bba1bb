"""What environments return, and what becomes of it: the odd ones, and those that are at fault."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.ddpg import DDPGConfig
from agents.dqn import DQNConfig
from agents.environments import EnvironmentFault, Interface, interface, make_env
from agents.evaluation import Evaluator
from agents.nonfinite import NonFiniteError
from agents.training import TrainConfig, Training
from agents.vector import flattened

DQN = DQNConfig(batch_size=8, learning_starts=10, train_every=1, hidden=(8,))
DDPG = DDPGConfig(batch_size=8, learning_starts=10, hidden=(8,))
BIG = float(np.finfo(np.float32).max)
ODD = {}  # what `Odd` returns in place of the ordinary: step -> function of it


class Odd(gym.Env):
    """Counts to 5; at a step of ODD it returns what stands there. One array serves all steps."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,))
    action_space = spaces.Discrete(2)

    def __init__(self, **_):
        self.array = np.zeros(2, dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        self.array[:] = 0
        if "reset" in ODD:
            return ODD["reset"](self)
        return self.array, ODD.get("reset info", {})

    def step(self, action):
        self.time += 1
        self.array[:] = self.time
        if self.time in ODD:
            return ODD[self.time](self)
        return self.array, 1.0, self.time == 5, False, ODD.get("info", {})

    def close(self):
        if "close" in ODD:
            raise OSError("port in use")


gym.register("test/Odd-v0", Odd)


@pytest.fixture(autouse=True)
def _ordinary():
    ODD.clear()
    yield
    ODD.clear()


def odd(total_steps=30, agent=DQN, **options):
    return Training("dqn", agent, TrainConfig("test/Odd-v0", total_steps, **options))


def evaluate(policy=None, **options):
    """Two episodes of a policy that always pushes left."""

    class Left(torch.nn.Module):
        def act(self, obs):
            return torch.zeros(obs.shape[:2], dtype=torch.long)

    space = interface(Odd.observation_space, Odd.action_space, "dqn")
    evaluator = Evaluator("test/Odd-v0", space, **options)
    return evaluator.evaluate(policy or Left(), np.array([[3, 4]]))


# --- what is kept of an environment ---------------------------------------------------------------


def test_an_array_that_the_environment_writes_to_again_is_copied():
    training = odd(agent=replace(DQN, gradient_steps=0), eval_every=0)
    training.run()
    rows = training.replay.rows[0, : training.replay.size]
    times = rows[:, 0].long()
    assert times.tolist() == [step % 5 for step in range(30)]
    assert torch.equal(rows[:, -1].long(), times + 1)  # the last observation is that of the end


def test_a_vector_environment_of_ones_own_may_hand_out_the_same_array_again():
    envs = SyncVectorEnv([Odd], autoreset_mode=AutoresetMode.NEXT_STEP, copy=False)
    config = TrainConfig("test/Odd-v0", 30, eval_every=0)
    training = Training("dqn", replace(DQN, gradient_steps=0), config, envs=envs)
    while training.step < 30:
        training.advance()
    rows = training.replay.rows[0, : training.replay.size]
    assert torch.equal(rows[:, -1], rows[:, 0] + 1)
    assert sorted(rows[:, 0].unique().tolist()) == [0, 1, 2, 3, 4]


def test_keys_of_an_environments_own_info_mean_nothing_here():
    wrong = np.full(2, 77.0, dtype=np.float32)
    ODD["reset info"] = ODD["info"] = {"final_obs": wrong, "_final_obs": True, "episode": {"r": 9}}
    training = odd(agent=replace(DQN, gradient_steps=0), eval_every=0)
    training.run()
    assert training.replay.rows[0, : training.replay.size].max() == 5
    assert training.latest_return.tolist() == [5.0]


# --- faults ---------------------------------------------------------------------------------------

FAULTS = {
    "raises": (lambda env: 1 // 0, "raised ZeroDivisionError in step: integer .* by zero"),
    "old step": (lambda env: (env.array, 1.0, True, {}), "returned 4 values from step, not"),
    "kind": (lambda env: (np.full(2, "1"), 1.0, False, False, {}), "not of real numbers"),
    "shape": (lambda env: (np.zeros(3), 1.0, False, False, {}), r"of shape \(3,\), not \(2,\)"),
    "complex": (lambda env: (env.array + 1j, 1.0, False, False, {}), "not of real numbers"),
    "object": (lambda env: ([None, 1], 1.0, False, False, {}), "not of real numbers"),
    "reward": (lambda env: (env.array, 1j, False, False, {}), "reward that is not one real"),
    "rewards": (lambda env: (env.array, [1.0], False, False, {}), r"real number, but \[1.0\]"),
    "no reward": (lambda env: (env.array, None, False, False, {}), "real number, but None"),
    "word": (lambda env: (env.array, 1.0, "no", False, {}), "terminated that is not a bool, .*no"),
    "array": (lambda env: (env.array, 1.0, False, np.zeros(1, bool), {}), "truncated that is not"),
    "info": (lambda env: (env.array, 1.0, False, False, None), "info that is not a dict, but None"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_what_plays_it_again_in_training_and_in_evaluation(fault):
    training = odd(eval_every=0)
    ODD[3], message = FAULTS[fault]
    here = r"step 3 of the episode that reset\(seed=\d+\) begins"
    with pytest.raises(EnvironmentFault, match=f"the environment .*{message}.*{here}"):
        training.run()
    with pytest.raises(EnvironmentFault, match=rf"{message}.*step 3 of .* reset\(seed=3\)"):
        evaluate()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda env: env.array, "an array of float32 .* from reset, not"),
        (lambda env: (env.array, None), "info that is not a dict"),
        (lambda env: (np.zeros(1), {}), r"of shape \(1,\)"),
    ],
)
def test_a_fault_at_the_first_reset_is_named_as_well(returned, message):
    ODD["reset"] = returned
    with pytest.raises(EnvironmentFault, match=message):
        odd()
    with pytest.raises(EnvironmentFault, match=rf"{message}.*reset\(seed=3\)"):
        evaluate()


def test_an_environment_that_cannot_be_made_or_closed_is_named():
    def broken():
        raise OSError("port in use")

    gym.register("test/Broken-v0", broken)
    with pytest.raises(ValueError, match=r"cannot make .*test/Broken-v0.*OSError: port in use"):
        make_env("test/Broken-v0")
    training = odd()
    ODD["close"] = True
    with pytest.raises(EnvironmentFault, match="raised OSError in close: port in use"):
        training.close()


def test_a_vector_environment_without_last_observations_is_refused():
    class Forgetful(SyncVectorEnv):
        def step(self, actions):
            return *super().step(actions)[:4], {}

    envs = Forgetful([Odd], autoreset_mode=AutoresetMode.SAME_STEP)
    training = Training("dqn", DQN, TrainConfig("test/Odd-v0", 30, eval_every=0), envs=envs)
    with pytest.raises(EnvironmentFault, match=r'must return .* in info\["final_obs"\]'):
        training.run()


# --- evaluation -----------------------------------------------------------------------------------


def test_an_episode_that_does_not_end_is_cut_with_a_warning():
    for time in range(1, 10_000):
        ODD[time] = lambda env: (env.array, 1.0, False, False, {})
    with pytest.warns(UserWarning, match="2 of 2 evaluation episodes did not end in 50 steps"):
        result = evaluate(max_steps=50)
    assert result.returns.tolist() == [[50.0, 50.0]]
    assert result.lengths.tolist() == [[50, 50]]


def test_a_stop_is_heard_inside_an_evaluation_which_is_made_up_for_later():
    training = odd(eval_every=10, eval_episodes=2)
    seen = []

    def stop(env):
        if training.step == 20 and not training.stopping:
            training.stopping = True
            seen.append(env.time)
        return env.array, 1.0, False, False, {}

    ODD[2] = stop
    training.run()
    assert (training.step, training.evaluated_at, seen) == (20, 10, [2])
    training.stopping = False
    training.evaluations = {}
    ODD.clear()
    training.run()
    assert (training.step, training.evaluated_at) == (30, 30)
    assert training.evaluations["last"].returns.tolist() == [[5.0, 5.0]]


# --- numbers --------------------------------------------------------------------------------------


def test_bounds_near_the_largest_float_do_not_overflow():
    wide = spaces.Box(-BIG, BIG, (1,), np.float32)
    face = interface(spaces.Box(-1, 1, (2,)), wide, "ddpg")
    actions = np.array([[-1.0], [-0.5], [0.0], [0.5], [1.0]], dtype=np.float32)
    with np.errstate(all="raise"):
        scaled = face.to_env(actions)
    np.testing.assert_allclose(scaled[:, 0] / BIG, [-1, -0.5, 0, 0.5, 1], rtol=1e-6)


@settings(max_examples=200, deadline=None)
@given(
    st.floats(-BIG, BIG, width=32),
    st.floats(-BIG, BIG, width=32),
    st.floats(-1, 1, width=32),
)
def test_actions_are_scaled_into_their_bounds_whatever_these_are(a, b, action):
    low, high = np.array([min(a, b)], np.float32), np.array([max(a, b)], np.float32)
    with np.errstate(over="raise", invalid="raise"):
        (scaled,) = Interface(2, 1, False, low, high).to_env(np.array([action], np.float32))
    exact = float(low[0]) + (float(action) + 1) * 0.5 * (float(high[0]) - float(low[0]))
    size = max(abs(float(low[0])), abs(float(high[0])))
    assert low[0] <= scaled <= high[0]
    assert abs(float(scaled) - exact) <= 4e-7 * size + 1e-37


@pytest.mark.parametrize("reward", [1e39, -1e39, float("inf"), float("nan")])
def test_a_reward_is_looked_at_as_it_is_stored(reward):
    ODD[3] = lambda env: (env.array, reward, False, False, {})
    with pytest.raises(NonFiniteError, match=r"a reward of \S+ is not finite in float32 after"):
        odd(eval_every=0).run()
    skipping = odd(eval_every=0, on_nonfinite="skip")
    skipping.run()
    assert skipping.skipped > 0
    assert skipping.replay.rows[0, : skipping.replay.size].isfinite().all()


def test_an_observation_that_overflows_float32_is_not_taken_in():
    ODD[3] = lambda env: (np.full(2, 1e39), 1.0, False, False, {})
    with pytest.raises(NonFiniteError, match="an observation is not finite in float32"):
        odd(eval_every=0).run()


def test_an_observation_that_its_space_would_cut_to_whole_numbers_is_refused():
    gym.register("test/Of-v0", lambda: Halves(spaces.Box(0, 9, (2,), np.int64)))
    try:
        with pytest.raises(EnvironmentFault, match="an observation of float64, not int64"):
            Training("ddpg", DDPG, TrainConfig("test/Of-v0", 20))
    finally:
        gym.registry.pop("test/Of-v0")


def test_integer_actions_are_refused():
    box = spaces.Box(0, 9, (2,), np.int64)
    with pytest.raises(ValueError, match="ddpg needs actions in a Box of floats, got Box"):
        interface(spaces.Box(-1, 1, (2,)), box, "ddpg")


def test_a_run_in_which_nothing_would_be_learnt_is_refused():
    with pytest.raises(ValueError, match="no gradient step falls due in total_steps = 30: learn"):
        odd(agent=replace(DQN, learning_starts=30))
    odd(agent=replace(DQN, learning_starts=30, gradient_steps=0)).run()  # it was asked for


# --- spaces and wrappers --------------------------------------------------------------------------

SPACES = {
    "discrete": (spaces.Discrete(3, start=2), 3),
    "multi discrete": (spaces.MultiDiscrete([2, 3]), 5),
    "multi binary": (spaces.MultiBinary(4), 4),
    "two dimensions": (spaces.Box(-1, 1, (2, 3)), 6),
    "tuple": (spaces.Tuple((spaces.Discrete(2), spaces.Box(-1, 1, (2,)))), 4),
    "dict": (spaces.Dict(a=spaces.Box(-1, 1, (2,)), b=spaces.Discrete(3)), 5),
}


class Of(gym.Env):
    """Draws observations from a space, three a piece."""

    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, space):
        self.observation_space = space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.time += 1
        return self.observation_space.sample(), float(action[0]), self.time == 3, False, {}


class Halves(Of):
    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return obs / 2, info


@pytest.mark.parametrize("name", SPACES)
def test_observations_that_are_no_vector_are_flattened(name):
    space, size = SPACES[name]
    gym.register("test/Of-v0", lambda: Of(space))
    try:
        training = Training("ddpg", DDPG, TrainConfig("test/Of-v0", 20, eval_episodes=2))
        training.run()
    finally:
        gym.registry.pop("test/Of-v0")
    assert training.interface.obs_dim == size
    line = flattened(training.envs)
    assert line == f"observations flattened: {space} to ({size},)"
    assert training.replay.rows[0, : training.replay.size].isfinite().all()
    env = Of(space)
    obs, _ = env.reset(seed=1)
    gym.register("test/Of-v0", lambda: Of(space))
    flat, _ = make_env("test/Of-v0").reset(seed=1)
    gym.registry.pop("test/Of-v0")
    np.testing.assert_array_equal(flat, spaces.flatten(space, obs))


def test_what_cannot_be_flattened_is_refused_with_what_would_help():
    gym.register("test/Of-v0", lambda: Of(spaces.Sequence(spaces.Discrete(2))))
    try:
        with pytest.raises(ValueError, match=r"got Sequence.*--wrap a wrapper that makes them one"):
            Training("ddpg", DDPG, TrainConfig("test/Of-v0", 20))
    finally:
        gym.registry.pop("test/Of-v0")


class Doubled(gym.ObservationWrapper):
    def observation(self, observation):
        return 2 * observation


class Shifted(gym.ObservationWrapper):
    def observation(self, observation):
        return observation + 1


def test_wrappers_are_put_around_the_environment_in_order_in_training_and_evaluation():
    wrap = (f"{__name__}:Doubled", f"{__name__}:Shifted")
    training = odd(eval_every=0, wrap=wrap, agent=replace(DQN, gradient_steps=0))
    training.run()
    times = training.replay.rows[0, :5, 0]
    assert times.tolist() == [1, 3, 5, 7, 9]
    seen = []

    class Seeing(torch.nn.Module):
        def act(self, obs):
            seen.append(obs.tolist())
            return torch.zeros(obs.shape[:2], dtype=torch.long)

    training.evaluator.evaluate(Seeing(), np.array([[1]]))
    assert seen == [[[[2 * time + 1] * 2]] for time in range(5)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Doubled", "must be given as package.module:Wrapper, got 'Doubled'"),
        (
            "gymnasium.wrappers:Missing",
            "cannot wrap .*Missing': AttributeError",
        ),
        ("missing_module:Wrapper", "cannot wrap .*ModuleNotFoundError"),
        ("builtins:str", "must return an environment, got str"),
    ],
)
def test_a_wrapper_that_cannot_be_had_is_one_sentence(name, message):
    with pytest.raises(ValueError, match=message):
        make_env("CartPole-v1", [name])


def test_mujoco_says_nothing_of_gymnasiums_own_models_and_all_else(capfd, monkeypatch):
    import mujoco

    make_env("HalfCheetah-v5").close()
    assert capfd.readouterr() == ("", "")
    assert mujoco.get_mju_user_warning() is None
    made = gym.make

    def make(*args, **kwargs):
        mujoco.get_mju_user_warning()("the mass is below 0")
        return made(*args, **kwargs)

    monkeypatch.setattr(gym, "make", make)
    make_env("HalfCheetah-v5").close()
    assert capfd.readouterr() == ("", "WARNING: the mass is below 0\n")
