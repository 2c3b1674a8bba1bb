import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import closing

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import players
from agents.ddpg import DDPGConfig
from agents.environments import EnvironmentFault, interface
from agents.evaluation import Evaluator, Stopped
from agents.networks import DeterministicActor, QNetwork, stack_members
from agents.seeding import Purpose, evaluation_seeds, generators
from agents.training import TrainConfig, Training
from tests.lengthy import Awkward, Lengthy

ENV = "test/Lengthy-v0"


@pytest.fixture(scope="module", autouse=True)
def _environment():
    gym.register(ENV, Lengthy)
    yield
    del gym.registry[ENV]


def evaluator(env_id, **options):
    env = gym.make(env_id)
    face = interface(env.observation_space, env.action_space, "dqn")
    return Evaluator(env_id, face, **options)


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


# --- in several processes -------------------------------------------------------------------------


@pytest.fixture(params=[Lengthy, Awkward])
def kind(request):
    gym.register("test/Kind-v0", request.param)
    yield request.param
    del gym.registry["test/Kind-v0"]


def helpers_of(judge):
    return [helper.process for helper in judge.players.helpers]


def test_what_other_processes_play_is_the_same_to_the_bit():
    net = policy(4, 0, 1)
    seeds = np.arange(14).reshape(2, 7)
    expected = evaluator("CartPole-v1").evaluate(net, seeds)
    assert len(set(expected.returns.ravel())) > 1
    with closing(evaluator("CartPole-v1", processes=3)) as judge:
        for part in (seeds, seeds[:, :1], seeds[:, ::-1]):  # fewer episodes than processes, too
            result = judge.evaluate(net, part)
            columns = part[0]
            assert np.array_equal(result.returns, expected.returns[:, columns])
            assert np.array_equal(result.lengths, expected.lengths[:, columns])
        assert len(helpers_of(judge)) == 2
        ended = helpers_of(judge)
    assert [process.poll() for process in ended] == [0, 0]


def test_an_environment_that_carries_state_between_episodes_stays_with_its_slot(monkeypatch):
    pytest.importorskip("Box2D")
    net = DeterministicActor(24, 4, (16,), generators(Purpose.INIT, [0]))
    env = gym.make("BipedalWalker-v3")
    face = interface(env.observation_space, env.action_space, "ddpg")
    orders = [np.array([row]) for row in ([1, 2, 3, 4, 5], [5, 4, 3], [4, 3, 2, 1, 5])]
    results = []
    monkeypatch.setattr(players, "PAYS_AFTER", 0.0)
    for processes in (1, 3, None):
        with closing(Evaluator("BipedalWalker-v3", face, processes=processes)) as judge:
            played = [judge.evaluate(net, order).returns.tolist() for order in orders]
            assert len(helpers_of(judge)) == (2 if processes == 3 else 0)
        results.append(played)
    assert results[0] == results[1] == results[2]
    assert sorted(results[0][0][0]) != sorted(results[0][2][0])  # it does carry state


def test_a_run_that_is_evaluated_in_several_processes_is_the_same_run():
    agent = DDPGConfig(batch_size=8, learning_starts=10, hidden=(8,))
    runs = []
    for processes in (1, 2):
        config = TrainConfig(
            "Pendulum-v1", 30, eval_every=0, eval_episodes=3, eval_processes=processes
        )
        with closing(Training("ddpg", agent, config, seeds=(1, 2))) as training:
            training.run()
            training.evaluate()
            runs.append((training.evaluations["last"].returns, training.replay.last(30)))
    assert np.array_equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_an_environment_registered_here_plays_elsewhere_whatever_it_prints(kind):
    seeds = np.arange(12).reshape(2, 6) * 3
    with closing(evaluator("test/Kind-v0", processes=3)) as judge:
        assert np.array_equal(judge.evaluate(policy(2, 0, 1), seeds).lengths, 1 + seeds % 50)


def test_a_fault_in_another_process_is_named_and_does_not_outlast_its_evaluation():
    gym.register("test/Awkward-v0", Awkward)
    try:
        with closing(evaluator("test/Awkward-v0", processes=2)) as judge:
            here = r"raised OSError in step: port in use \(step 2 of .* reset\(seed=40\)\)"
            with pytest.raises(EnvironmentFault, match=here) as caught:
                judge.evaluate(policy(2, 0), np.array([[7, 40]]))
            assert "in step\n    raise OSError" in caught.value.__notes__[0]  # where it happened
            with pytest.raises(EnvironmentFault, match="ended its process with code 3"):
                judge.evaluate(policy(2, 0), np.array([[7, 41]]))
            assert judge.evaluate(policy(2, 0), np.array([[7, 9]])).lengths.tolist() == [[8, 10]]
    finally:
        del gym.registry["test/Awkward-v0"]


def test_signals_to_all_processes_reach_the_first_alone():
    seeds = np.array([[1, 2, 3]])
    with closing(evaluator("CartPole-v1", processes=2)) as judge:
        first = judge.evaluate(policy(4, 0), seeds)
        (process,) = helpers_of(judge)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            process.send_signal(number)
        again = judge.evaluate(policy(4, 0), seeds)
        assert helpers_of(judge) == [process]
    assert np.array_equal(first.returns, again.returns)


def test_an_evaluation_that_was_broken_off_leaves_nothing_to_the_next():
    seeds, net = np.array([[1, 2, 3]]), policy(4, 0)
    with closing(evaluator("CartPole-v1", processes=2)) as judge:
        expected = judge.evaluate(net, seeds)
        asked = iter([False] * 5 + [True])
        with pytest.raises(Stopped):
            judge.evaluate(net, seeds, lambda: next(asked))
        assert np.array_equal(judge.evaluate(net, seeds).returns, expected.returns)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(players.Helper, "answer", lambda self: 1 // 0)  # before it is read
            with pytest.raises(ZeroDivisionError):
                judge.evaluate(net, seeds)
        assert np.array_equal(judge.evaluate(net, seeds).returns, expected.returns)


def test_helpers_are_begun_once_evaluations_take_long_and_only_where_cores_are_idle(monkeypatch):
    monkeypatch.setattr(players, "MESSAGE", 1e-9)
    monkeypatch.setattr(players, "idle_cores", lambda: 2)
    seeds = np.arange(10).reshape(1, 10)
    with closing(evaluator("CartPole-v1", processes=None)) as judge:
        first = judge.evaluate(policy(4, 0), seeds)
        assert helpers_of(judge) == []
        monkeypatch.setattr(players, "PAYS_AFTER", 0.0)
        second = judge.evaluate(policy(4, 0), seeds)
        assert len(helpers_of(judge)) == 1
    assert np.array_equal(first.returns, second.returns)


def test_no_core_is_idle_where_others_use_them_all(monkeypatch, tmp_path):
    monkeypatch.setattr(players, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for load, expected in ((0.0, 8), (1.0, 8), (12.2, 5), (15.6, 1), (40.0, 1)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0), raising=False)
        assert players.idle_cores() == expected
    monkeypatch.setattr(os, "getloadavg", lambda: (2.0, 0.0, 0.0), raising=False)
    for quota, expected in (("max", 8), ("350000", 3), ("50000", 1)):
        players.QUOTA.write_text(f"{quota} 100000\n")
        assert players.idle_cores() == expected


def test_an_environment_that_only_this_process_can_make_is_played_here_or_refused(monkeypatch):
    monkeypatch.setattr(players, "MESSAGE", 1e-9)
    monkeypatch.setattr(players, "PAYS_AFTER", 0.0)
    monkeypatch.setattr(players, "idle_cores", lambda: 2)
    gym.register("test/Local-v0", lambda: Lengthy())
    seeds = np.array([[3, 4]])
    try:
        with closing(evaluator("test/Local-v0", processes=None)) as judge:
            for _ in range(3):
                assert judge.evaluate(policy(2, 0), seeds).lengths.tolist() == [[4, 5]]
            assert helpers_of(judge) == []
        with (
            closing(evaluator("test/Local-v0", processes=2)) as judge,
            pytest.raises(ValueError, match="'test/Local-v0' cannot be made in another process"),
        ):
            judge.evaluate(policy(2, 0), seeds)
    finally:
        del gym.registry["test/Local-v0"]
    with pytest.raises(ValueError, match="processes must be at least 1, or None, got 0"):
        evaluator("CartPole-v1", processes=0)


def python(program, **options):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], text=True, **options)


def test_a_helper_does_not_import_torch():
    program = "import sys, agents.players; sys.exit('torch' in sys.modules)"
    assert python(program).wait() == 0


BEGUN = """
    import os, sys
    import numpy as np
    from agents.environments import make_env, interface
    from agents.evaluation import Evaluator
    from agents.networks import QNetwork
    from agents.seeding import Purpose, generators

    env = make_env("CartPole-v1")
    face = interface(env.observation_space, env.action_space, "dqn")
    judge, seeds = Evaluator("CartPole-v1", face, processes=2), np.array([[1, 2, 3]])
    net = QNetwork(4, 2, (16,), generators(Purpose.INIT, [0]))
    first = judge.evaluate(net, seeds).returns.tolist()
"""


def test_helpers_end_with_the_process_that_began_them_even_if_it_is_killed():
    kill = """
    print(judge.players.helpers[0].process.pid, flush=True)
    os.kill(os.getpid(), 9)
    """
    with python(BEGUN + kill, stdout=subprocess.PIPE) as process:
        pid = int(process.stdout.readline())
        assert process.stdout.read() == ""
        assert process.wait() == -9
    for _ in range(1000):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    pytest.fail("the helper lives on")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_has_helpers_of_its_own():
    fork = """
    pid = os.fork()
    same = judge.evaluate(net, seeds).returns.tolist() == first
    if not pid:
        os._exit(10 + same)
    assert same
    judge.close()
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) - 11)
    """
    with python(BEGUN + fork) as process:
        assert process.wait() == 0
