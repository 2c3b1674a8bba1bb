"""Every agent with a soft target, a hard one and none, and with a tau that changes."""

from dataclasses import replace

import pytest
import torch
from agent_cases import random_batch, train_on_noise

from agents import targets
from agents.learner import update
from agents.presets import ALGORITHMS
from agents.training import TrainConfig, Training
from scripts import train
from tests.test_training import Recorder

ONLINE = {
    "dqn": {"q": "q"},
    "ddpg": {"actor": "actor", "critic": "critic"},
    "sac": {"critic": "critic"},
    "td3": {"actor": "actor", "critic": "critic"},
}
ALGOS = pytest.mark.parametrize("algo", ONLINE)


def config(algo, **changes):
    return ALGORITHMS[algo][1](batch_size=16, learning_starts=0, hidden=(16, 16), **changes)


def make(algo, **changes):
    return ALGORITHMS[algo][0](3, 2, config(algo, **changes), (0,), "cpu", 1000)


def step(agent, k):
    update(agent, random_batch(16, 3, 2, discrete=hasattr(agent, "q"), seed=k))


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@ALGOS
def test_a_hard_target_is_a_copy_at_every_nth_gradient_step_and_stays_in_between(algo):
    agent = make(algo, target="hard", target_update_every=3)
    assert agent.targets.keys() == ONLINE[algo].keys()
    for k in range(1, 10):
        before = {name: weights(target.module) for name, target in agent.targets.items()}
        step(agent, k)
        for name, attribute in ONLINE[algo].items():
            expected = weights(getattr(agent, attribute)) if k % 3 == 0 else before[name]
            assert torch.equal(weights(agent.targets[name].module), expected)


@ALGOS
def test_a_soft_target_moves_by_tau_at_every_update(algo):
    agent = make(algo, target="soft", tau=0.1)
    delay = 2 if algo == "td3" else 1
    for k in range(1, 7):
        before = {name: weights(target.module) for name, target in agent.targets.items()}
        step(agent, k)
        for name, attribute in ONLINE[algo].items():
            moved = torch.lerp(before[name], weights(getattr(agent, attribute)), 0.1)
            expected = before[name] if k % delay else moved
            torch.testing.assert_close(weights(agent.targets[name].module), expected)


def trained(algo, **changes):
    """What two seeds end with after updates on noise."""
    sizes = {"obs_dim": 3, "action_dim": 2, "updates": 30, "discrete": algo == "dqn"}
    return train_on_noise(ALGORITHMS[algo][0], config(algo, **changes), (3, 1), **sizes)


@ALGOS
def test_without_a_target_no_copy_is_made_and_values_are_those_of_the_online_network(
    algo, monkeypatch
):
    """Which is what a hard target does that is copied at every gradient step, to the bit."""
    followed = trained(algo)
    copied = trained(algo, target="hard", target_update_every=1)

    def refuse(*args, **kwargs):
        raise AssertionError("a target network was made")

    monkeypatch.setattr(targets, "TargetNetwork", refuse)
    bare = trained(algo, target="none")
    for name, tensor in bare.items():
        assert torch.equal(tensor, copied[name]), name
    assert not torch.equal(bare["losses/q_values"], followed["losses/q_values"])


def training(algo, steps, logs=(), **changes):
    agent = replace(config(algo, **changes), learning_starts=20)
    env_id = "CartPole-v1" if algo == "dqn" else "Pendulum-v1"
    run = TrainConfig(env_id, steps, eval_every=10 * steps, log_every=10)
    return Training(algo, agent, run, logs=logs)


@ALGOS
def test_tau_goes_to_its_end_on_a_straight_line_over_the_gradient_steps(algo):
    log = Recorder()
    run = training(algo, 120, [log], target="soft", tau=0.5, tau_end=0.1, train_every=2)
    total = run.total_updates
    assert total == 50
    used = []
    for target in run.agent.targets.values():
        update = target.update

        def spy(target=target, update=update):
            used.append(target.tau)
            update()

        target.update = spy
    while run.step < 120:
        run.advance()
    every = getattr(run.agent.config, "policy_delay", 1)
    steps = range(every - 1, total, every)
    line = [0.5 - 0.4 * k / total for k in steps for _ in run.agent.targets]
    assert used == pytest.approx(line)
    shown = [(step, value) for step, tag, value in log.values if tag == "charts/tau"]
    assert shown == [
        (step, pytest.approx(0.5 - 0.4 * max(0, step - 20) / 100)) for step in range(10, 121, 10)
    ]


@ALGOS
def test_a_tau_that_stays_is_in_no_chart_and_a_run_without_a_target_shows_no_lag(algo):
    log = Recorder()
    run = training(algo, 60, [log], target="none")
    run.run()
    tags = {tag for _, tag, _ in log.values}
    assert "charts/tau" not in tags
    assert not [tag for tag in tags if tag.startswith("target/")]


@pytest.mark.parametrize("kind", ["soft", "hard", "none"])
@ALGOS
def test_the_command_line_chooses_the_target(algo, kind):
    tau = ["--tau", "0.005"] if (algo, kind) == ("dqn", "soft") else []
    _, options = train.parse([algo, "--target", kind, *tau])
    assert options.agent.target == kind
    agent_class = ALGORITHMS[algo][0]
    agent = agent_class(4, 2, replace(options.agent, hidden=(8,)), (0,), "cpu", 100)
    assert agent.targets.keys() == ({} if kind == "none" else ONLINE[algo]).keys()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("dqn --target soft", "a soft target needs tau below 1, got 1.0"),
        (
            "dqn --tau 0.01",
            "tau and tau_end are for a soft target, got tau 0.01 and tau_end None with target "
            "'hard'",
        ),
        (
            "sac --target none --tau-end 0.1",
            "tau and tau_end are for a soft target, got tau 0.005 and tau_end 0.1 with target "
            "'none'",
        ),
        ("td3 --tau-end 2", "tau_end must be in [0.0, 1.0], got 2.0"),
        ("ddpg --target hard --target-update-every 0", "target_update_every must be at least 1"),
    ],
)
def test_a_target_that_contradicts_itself_is_one_sentence(command, message, tmp_path, capsys):
    assert train.main([*command.split(), "--runs-dir", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@ALGOS
def test_another_kind_of_target_is_refused(algo):
    with pytest.raises(ValueError, match="target must be soft, hard or none, got 'firm'"):
        make(algo, target="firm")
