import shutil
from types import SimpleNamespace

import pytest

from agents.averaging import evaluate_averages, record_policy
from agents.presets import preset
from agents.training import TrainConfig, Training
from polyak_rl import Ema
from scripts import compare, train
from scripts.experiment import room
from scripts.experiment.jobs import Job
from tests.test_resume import COMMAND

MIB = 2**20


@pytest.fixture
def free(monkeypatch):
    """Says how much room there is on the disk, and of which folder that was asked."""
    asked = []

    def disk_usage(path):
        asked.append(path)
        return SimpleNamespace(free=free.bytes)

    free = SimpleNamespace(bytes=0, asked=asked)
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    return free


@pytest.mark.parametrize("algo", ["dqn", "sac"])
def test_the_estimate_is_what_a_run_leaves(algo, tmp_path):
    env_id = {"dqn": "CartPole-v1", "sac": "Pendulum-v1"}[algo]
    words = "--total-steps 1200 --checkpoint-every 600 --learning-starts 100 --hidden 64 64 "
    words += "--train-every 5 --gradient-steps 5 --eval-every 400 --device cpu --segments 256"
    estimate = room.size(*train.build(*train.parse([algo, *words.split()])))
    command = [algo, "--env-id", env_id, *words.split(), "--runs-dir", str(tmp_path)]
    assert train.main(command) == 0
    (run,) = tmp_path.iterdir()

    def found(*patterns):
        return sum(p.stat().st_size for pattern in patterns for p in run.rglob(pattern))

    assert found("checkpoint/replay*") == pytest.approx(estimate.replay, rel=0.01)
    # the timeline of the checkpoint before the last is not full yet
    assert 0.6 * estimate.state < found("checkpoint/*.pt") < 1.05 * estimate.state
    assert 0.8 * estimate.end < found("timeline.pt", "*tfevents*", "*.csv") < 1.2 * estimate.end


def test_a_run_without_averages_keeps_no_timeline():
    config, total = preset("dqn", "CartPole-v1")
    training = Training("dqn", config, TrainConfig("CartPole-v1", total))
    plain = room.size(training, None)
    averages = record_policy(training, {"ema": Ema(half_life=9)}, 100)
    evaluate_averages(training, averages)
    weights = sum(p.numel() for p in training.agent.policy.parameters())
    more = room.size(training, averages)
    assert more.state - plain.state >= 2 * 8 * 101 * weights  # its mean and the segments, float64
    assert more.end - plain.end >= 4 * 100 * weights


def test_too_little_room_is_one_sentence_with_the_numbers_before_anything_is_made(
    free, tmp_path, capsys
):
    free.bytes = MIB
    runs = tmp_path / "not" / "there"
    assert train.main(["dqn", "--device", "cpu", "--runs-dir", str(runs)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {runs} has room for 1 MiB, and about ")
    assert said.endswith(
        " MiB would come there: give another --runs-dir, fewer --segments or "
        "--no-checkpoint-replay (2 MiB)\n"
    )
    assert not [*tmp_path.iterdir()]
    assert free.asked == [tmp_path]


def test_a_replay_buffer_that_is_not_kept_takes_no_room(free, tmp_path, capsys):
    options = train.parse(COMMAND)
    replay, state, end = room.size(*train.build(*options))
    free.bytes = state + end
    command = [*COMMAND, "--runs-dir", str(tmp_path)]
    assert replay
    assert train.main(command) == 2
    assert "--no-checkpoint-replay" in capsys.readouterr().err
    assert train.main([*command, "--no-checkpoint-replay"]) == 0


def test_a_comparison_needs_room_for_as_many_jobs_as_run_side_by_side(tmp_path):
    small = [Job("dqn", "CartPole-v1", (seed,), total_steps=2000) for seed in (1, 2, 3)]
    three = Job("dqn", "CartPole-v1", (4, 5, 6), total_steps=2000)
    one = room.size_of_jobs(small[:1], 2, tmp_path)
    assert one > MIB
    assert room.size_of_jobs(small, 2, tmp_path) == 2 * one
    assert room.size_of_jobs([*small, three], 2, tmp_path) == 4 * one
    (tmp_path / small[0].run_names()[0] / "checkpoint").mkdir(parents=True)
    (tmp_path / small[0].run_names()[0] / "checkpoint" / "x.pt").write_bytes(b"x" * 1000)
    there = room.size_of_jobs(small, 2, tmp_path)
    assert there == 2 * one - 1000


def test_a_comparison_is_refused_before_anything_is_made(free, tmp_path, capsys):
    free.bytes = MIB
    assert compare.main(["--tier", "s", "--out", str(tmp_path / "out")]) == 2
    assert "has room for 1 MiB, and about " in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
