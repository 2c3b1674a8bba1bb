import numpy as np
import pytest
import torch

from agents.averaging import evaluate_averages, record_policy
from agents.ddpg import DDPGConfig
from agents.dqn import DQNConfig
from agents.sac import SACConfig
from agents.training import TrainConfig, Training
from polyak_rl import Tail, Uniform
from scripts import posthoc, train
from scripts.experiment.finished import read
from scripts.experiment.schemes import SHOWN, rules_of
from tests.agent_cases import after_each_step

DQN = ("dqn", DQNConfig(hidden=(16, 16), learning_starts=50, batch_size=16), "CartPole-v1")
DDPG = ("ddpg", DDPGConfig(hidden=(16, 16), learning_starts=50, batch_size=16), "Pendulum-v1")
SAC = ("sac", SACConfig(hidden=(16, 16), learning_starts=50, batch_size=16), "Pendulum-v1")
AGENTS = pytest.mark.parametrize("agent", [DQN, DDPG, SAC], ids=["dqn", "ddpg", "sac"])


def training(agent, steps=400, seeds=(1,)):
    algo, config, env_id = agent
    run = TrainConfig(env_id, steps, eval_episodes=2, eval_every=200)
    return Training(algo, config, run, seeds)


@AGENTS
def test_training_with_averages_is_the_same_bit_for_bit(agent):
    plain, averaged = training(agent), training(agent)
    averages = record_policy(averaged, rules_of(SHOWN, averaged.total_updates))
    evaluate_averages(averaged, averages)
    for each in (plain, averaged):
        each.run()
    assert averages.clock == averaged.updates > 0
    for ours, theirs in zip(
        plain.agent.policy.parameters(), averaged.agent.policy.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert torch.equal(
        plain.replay.rows[:, : plain.replay.size], averaged.replay.rows[:, : plain.replay.size]
    )
    np.testing.assert_array_equal(
        plain.evaluations["last"].returns, averaged.evaluations["last"].returns
    )


@AGENTS
def test_it_averages_what_acts(agent):
    """DQN: the Q network; DDPG and SAC: the actor. Not the critic, not the temperature."""
    run = training(agent)
    averages = record_policy(run, rules_of(SHOWN, run.total_updates))
    acts = {"dqn": "q", "ddpg": "actor", "sac": "actor"}[agent[0]]
    expected = {name for name, _ in getattr(run.agent, acts).named_parameters()}
    assert averages.average("tail50").keys() == expected


@AGENTS
def test_an_average_of_a_real_run_equals_the_mean_of_its_iterates(agent):
    run = training(agent)
    averages = record_policy(run, rules_of(SHOWN, run.total_updates))
    iterates = []
    after_each_step(run, lambda: iterates.append(averages.last()))
    run.run()
    assert len(iterates) == run.total_updates
    half = iterates[-(-len(iterates) // 2) :]
    for name, tensor in averages.average("tail50").items():
        mean = torch.stack([iterate[name].double() for iterate in half]).mean(0)
        torch.testing.assert_close(tensor, mean, rtol=1e-12, atol=1e-14)
    everything = averages.average(Uniform())
    for name, tensor in everything.items():
        mean = torch.stack([iterate[name].double() for iterate in iterates]).mean(0)
        torch.testing.assert_close(tensor, mean, rtol=1e-12, atol=1e-14)


def test_averages_are_of_nothing_but_trained_iterates():
    """Before learning starts an average is the policy as it is; then the old weights are out."""
    run = training(DQN)
    averages = record_policy(run, {"all": Uniform()})
    before = averages.last()
    for name, tensor in averages.average("all").items():
        assert torch.equal(tensor, before[name])
    while not run.updates:
        run.advance()
    first = averages.last()
    for name, tensor in averages.average("all").items():
        assert torch.equal(tensor.float(), first[name])


def test_a_seed_has_the_same_averages_alone_and_beside_others():
    together = training(DDPG, seeds=(1, 2, 3))
    both = record_policy(together, rules_of(SHOWN, together.total_updates))
    together.run()
    alone = training(DDPG, seeds=(2,))
    single = record_policy(alone, rules_of(SHOWN, alone.total_updates))
    alone.run()
    for which in ("ema1", Tail(0.25)):
        ours, theirs = both.average(which), single.average(which)
        for name in ours:
            torch.testing.assert_close(ours[name][1:2], theirs[name], rtol=1e-12, atol=1e-14)
    timeline = both.timeline.member(1, like=alone.agent.policy)
    assert timeline.weights(Tail(0.25)) == single.timeline.weights(Tail(0.25))
    for name, tensor in timeline.average(Tail(0.25)).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-12, atol=1e-14)
    for name, value in both.distances(members=3).items():
        torch.testing.assert_close(value[1:2], single.distances()[name])


def test_posthoc_evaluates_rules_on_common_episodes(tmp_path, capsys):
    command = "dqn --env-id CartPole-v1 --total-steps 600 --eval-every 300 --eval-episodes 2"
    command += " --learning-starts 50 --train-every 4 --gradient-steps 4 --hidden 16 16"
    assert train.main([*command.split(), "--runs-dir", str(tmp_path)]) == 0
    (run,) = tmp_path.iterdir()
    asked = ["--rule", "tail:0.5", "--rule", "ema:half_life=100", "--rule", "uniform"]
    assert posthoc.main([str(run), *asked, "--episodes", "4"]) == 0
    assert "ema:half_life=100" in capsys.readouterr().out
    rows = (run / "posthoc.csv").read_text().splitlines()
    assert len(rows) == 1 + 4 * 4  # last and three rules, four episodes each
    again = posthoc.evaluate(read(run), ["tail:0.5"], range(4))
    assert [f"last,{i},{value}" for i, value in enumerate(again["last"])] == rows[1:5]


def test_seeds_trained_together_leave_the_folders_of_seeds_trained_alone(tmp_path):
    command = "ddpg --env-id Pendulum-v1 --total-steps 500 --eval-every 250 --eval-episodes 2"
    command += " --learning-starts 50 --hidden 16 16 --batch-size 16"
    together, alone = tmp_path / "together", tmp_path / "alone"
    several = ["--seeds", "1..3", "--together", "--runs-dir", str(together)]
    assert train.main([*command.split(), *several]) == 0
    assert train.main([*command.split(), "--seed", "2", "--runs-dir", str(alone)]) == 0
    (single,) = alone.iterdir()
    assert len([*together.iterdir()]) == 3
    (same,) = together.glob("*__2__*")
    for name in ("evaluations.csv", "config.json"):
        assert (same / name).read_bytes() == (single / name).read_bytes()
    ours, theirs = (torch.load(run / "policy.pt", weights_only=True) for run in (same, single))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (posthoc.evaluate(read(r), ["tail:0.5"], range(2)) for r in (same, single))
    assert ours["tail:0.5"].tolist() == theirs["tail:0.5"].tolist()


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        (["--seeds", "1..3"], "need --together"),
        (["--seeds", "a..b", "--together"], "must be like 1..20 or 1,5,7, got 'a..b'"),
        (["--seeds", "5..1", "--together"], "must be like 1..20 or 1,5,7, got '5..1'"),
        (["--together"], "--together needs several seeds, such as --seeds 1..20"),
    ],
)
def test_seeds_are_asked_for_plainly(seeds, message, tmp_path, capsys):
    assert train.main(["dqn", *seeds, "--runs-dir", str(tmp_path / "runs")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--episodes", "1"], "episodes must be at least 2"),
        ([], "is not the folder of a finished run"),
    ],
)
def test_posthoc_refuses_in_one_sentence(arguments, message, tmp_path, capsys):
    assert posthoc.main([str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
