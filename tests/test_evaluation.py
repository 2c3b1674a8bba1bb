import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents.environments import interface
from agents.evaluation import Evaluator
from agents.networks import QNetwork, stack_members
from agents.seeding import Purpose, evaluation_seeds, generators

ENV = "test/Lengthy-v0"


class Lengthy(gym.Env):
    """An episode lasts as many steps as its seed says, from 1 to 50; each is worth 1."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.length, self.time = 1 + seed % 50, 0
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action):
        assert self.time < self.length, "stepped after its end"
        self.time += 1
        return np.zeros(2, dtype=np.float32), 1.0, self.time == self.length, False, {}


@pytest.fixture(scope="module", autouse=True)
def _environment():
    gym.register(ENV, Lengthy)
    yield
    del gym.registry[ENV]


def evaluator(env_id):
    env = gym.make(env_id)
    return Evaluator(env_id, interface(env.observation_space, env.action_space, "dqn"))


def policy(obs_dim, *seeds):
    return QNetwork(obs_dim, 2, (16,), generators(Purpose.INIT, seeds))


def test_every_slot_plays_its_own_episode_so_short_ones_are_not_favoured():
    seeds = np.arange(60).reshape(2, 30) * 7
    result = evaluator(ENV).evaluate(policy(2, 0, 1), seeds)
    assert np.array_equal(result.lengths, 1 + seeds % 50)
    assert np.array_equal(result.returns, result.lengths)


def test_a_members_returns_do_not_depend_on_the_members_beside_it():
    states = [policy(4, seed).state_dict() for seed in range(4)]
    seeds = np.arange(20).reshape(4, 5)
    judge = evaluator("CartPole-v1")
    together = judge.evaluate(stack_members(policy(4, 0), states), seeds)
    assert len(set(together.returns.ravel())) > 1
    for member, state in enumerate(states):
        alone = judge.evaluate(stack_members(policy(4, 0), [state]), seeds[member : member + 1])
        assert np.array_equal(alone.returns[0], together.returns[member])


def test_the_result_is_that_of_playing_the_episodes_one_by_one():
    net = policy(4, 3)
    seeds = np.array([[11, 12, 13]])
    expected = []
    for seed in seeds[0]:
        env = gym.make("CartPole-v1")
        obs, _ = env.reset(seed=int(seed))
        total, ended = 0.0, False
        while not ended:
            action = net(torch.from_numpy(obs).view(1, 1, 4)).argmax().item()
            obs, reward, terminated, truncated, _ = env.step(action)
            total += reward
            ended = terminated or truncated
        expected.append(total)
    assert evaluator("CartPole-v1").evaluate(net, seeds).returns.tolist() == [expected]


def test_playing_again_gives_the_same_result():
    judge, seeds = evaluator("CartPole-v1"), np.array([[1, 2, 3]])
    first = judge.evaluate(policy(4, 0), seeds)
    judge.evaluate(policy(4, 5), seeds + 9)
    again = judge.evaluate(policy(4, 0), seeds)
    assert np.array_equal(first.returns, again.returns)


def test_evaluation_draws_no_random_numbers_and_leaves_the_policy_as_it_was():
    net = policy(4, 0)
    net.train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    evaluator("CartPole-v1").evaluate(net, np.array([[1, 2]]))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert net.training
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_each_run_and_environment_has_evaluation_episodes_of_its_own():
    first = evaluation_seeds("CartPole-v1", 1, 20)
    assert len(set(first.tolist())) == 20
    for other in (
        evaluation_seeds("CartPole-v1", 2, 20),
        evaluation_seeds("Acrobot-v1", 1, 20),
    ):
        assert not set(first.tolist()) & set(other.tolist())


def test_a_longer_set_of_evaluation_episodes_begins_with_the_shorter_one():
    short, long = evaluation_seeds("CartPole-v1", 1, 20), evaluation_seeds("CartPole-v1", 1, 100)
    assert np.array_equal(long[:20], short)


def test_evaluation_episodes_are_the_same_in_every_process():
    assert evaluation_seeds("CartPole-v1", 1, 3).tolist() == [2405375013, 3887398582, 3039564242]
