import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.averaging import evaluate_averages, record_policy
from agents.checkpoint import Checkpoints, newest, restore, training_state
from agents.ddpg import DDPGConfig
from agents.dqn import DQNConfig
from agents.sac import SACConfig
from agents.td3 import TD3Config
from agents.training import TrainConfig, Training
from agents.versions import versions
from polyak_rl import Ema, Uniform
from scripts import train
from scripts.experiment.locks import LOCK, Hold
from scripts.experiment.run_folder import AVERAGES, RunFolder
from tests.test_checkpoint import assert_same
from tests.test_training import Recorder

SMALL = {"hidden": (8,), "batch_size": 8, "learning_starts": 20}
DQN = ("dqn", DQNConfig(**SMALL, train_every=2, target_update_every=7), "CartPole-v1")
DDPG = ("ddpg", DDPGConfig(**SMALL), "Pendulum-v1")
SAC = ("sac", SACConfig(**SMALL), "Pendulum-v1")
TD3 = ("td3", TD3Config(**SMALL, policy_delay=3), "Pendulum-v1")


def new(case, steps, seeds=(1,), n_envs=1, **options):
    """A training with averages that are evaluated, and the logs of its seeds."""
    algo, agent, env_id = case
    run = {"eval_every": 40, "eval_episodes": 1, "log_every": 10} | options
    logs = [Recorder() for _ in seeds]
    training = Training(algo, agent, TrainConfig(env_id, steps, n_envs, **run), seeds, logs)
    rules = {"uniform": Uniform(), "ema": Ema(half_life=9)}
    averages = record_policy(training, rules, capacity=20)
    evaluate_averages(training, averages)
    return training, averages


def advance(training, step):
    while training.step < step:
        training.advance()


def resumed(folder, case, steps, **options):
    """A new training that goes on from the newest checkpoint of a folder."""
    training, averages = new(case, steps, **options)
    checkpoint, damaged = newest(folder)
    notes = restore(checkpoint, training, averages)
    return (
        training,
        averages,
        Checkpoints(folder, training, averages, after=checkpoint),
        (damaged + notes),
    )


def written(log, after=0):
    """What a log was told of steps after one, without speeds."""
    values = [x for x in log.values if x[0] > after and x[1] != "charts/SPS"]
    return repr(values), repr([x for x in log.evaluations if x[0] > after])


def assert_same_run(whole, parts):
    """Two trainings have the same weights, moments, averages, generators, clocks and replay."""
    assert_same(training_state(*whole), training_state(*parts))
    ours, theirs = whole[0].replay, parts[0].replay
    assert (ours.added, ours.size) == (theirs.added, theirs.size)
    assert torch.equal(ours.rows[:, : ours.size], theirs.rows[:, : theirs.size])


@pytest.mark.parametrize("case", [DQN, DDPG, SAC, TD3], ids=["dqn", "ddpg", "sac", "td3"])
@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("seeds", [(1,), (4, 2)], ids=["alone", "together"])
def test_a_resumed_training_is_the_same_to_the_bit(case, n_envs, seeds, tmp_path):
    setting = {"seeds": seeds, "n_envs": n_envs}
    whole = new(case, 120, **setting)
    whole[0].run()

    training, averages = new(case, 120, **setting)
    checkpoints = Checkpoints(tmp_path, training, averages)
    advance(training, 52)
    checkpoints.save()
    advance(training, 100)  # and is killed here
    training, averages, checkpoints, notes = resumed(tmp_path, case, 120, **setting)
    assert (training.step, notes) == (52, [])
    advance(training, 78)
    checkpoints.save()
    training, averages, _, notes = resumed(tmp_path, case, 120, **setting)
    assert (training.step, notes) == (78, [])
    training.run()

    assert_same_run(whole, (training, averages))
    assert_same(whole[1].average("ema"), averages.average("ema"))
    for ours, theirs in zip(whole[0].logs, training.logs, strict=True):
        assert written(ours, after=78) == written(theirs)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ((DQN[0], replace(DQN[1], buffer_size=64), DQN[2]), {}),
        ((DQN[0], replace(DQN[1], double=True), DQN[2]), {"lr_decay": "linear"}),
        ((DDPG[0], DDPG[1], "Reacher-v5"), {}),
        ((SAC[0], SAC[1], "InvertedDoublePendulum-v5"), {}),
        ((SAC[0], replace(SAC[1], target="hard", target_update_every=7), SAC[2]), {}),
        ((TD3[0], replace(TD3[1], target="none"), TD3[2]), {}),
        ((TD3[0], replace(TD3[1], tau=0.5, tau_end=0.01), TD3[2]), {}),
    ],
    ids=[
        "ring that wraps",
        "learning rate",
        "mujoco",
        "mujoco too",
        "hard target",
        "no target",
        "tau's schedule",
    ],
)
def test_any_number_of_resumes_changes_nothing(case, options, tmp_path):
    whole = new(case, 200, **options)
    whole[0].run()
    parts = new(case, 200, **options)
    checkpoints = Checkpoints(tmp_path, *parts)
    for step in (1, 30, 31, 97, 143, 199):
        advance(parts[0], step)
        checkpoints.save()
        *parts, checkpoints, notes = resumed(tmp_path, case, 200, **options)
        assert notes == []
    parts[0].run()
    assert_same_run(whole, parts)


class Forgetful(gym.Env):
    """Observes a number that grows over episodes: a seed does not bring it back."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,))
    action_space = spaces.Discrete(2)

    def __init__(self):
        self.steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 7
        return np.float32([self.steps]), {}

    def step(self, action):
        self.steps += 1
        self.left -= 1
        return np.float32([self.steps]), 1.0, self.left == 0, False, {}


@pytest.fixture
def forgetful():
    gym.register("test/Forgetful-v0", Forgetful)
    yield (DQN[0], DQN[1], "test/Forgetful-v0")
    del gym.registry["test/Forgetful-v0"]


def test_an_environment_that_does_not_come_back_is_reported_and_begins_its_next_episode(
    forgetful, tmp_path
):
    parts = new(forgetful, 40, n_envs=2)
    checkpoints = Checkpoints(tmp_path, *parts)
    advance(parts[0], 24)  # each has taken 12 steps: an episode of 7, then 5
    checkpoints.save()
    training, *_, notes = resumed(tmp_path, forgetful, 40, n_envs=2)
    assert notes == [
        f"environment {i} of seed 1 begins its next episode: "
        "played again, its episode is another one after 5 steps"
        for i in (0, 1)
    ]
    assert training.episode_length.tolist() == [0, 0]
    assert [env.episode for env in training.envs.envs] == [3, 3]
    training.run()
    assert training.step == 40


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Box2D's import
def test_box2d_is_labelled_not_exact(tmp_path):
    case = (DQN[0], DQN[1], "LunarLander-v3")
    parts = new(case, 40)
    advance(parts[0], 10)
    Checkpoints(tmp_path, *parts).save()
    *_, notes = resumed(tmp_path, case, 40)
    assert notes[-1].startswith("LunarLander-v3 carries state from one episode to the next (Box2D)")


def test_without_the_replay_buffer_a_run_goes_on_and_says_that_it_is_another_one(tmp_path):
    parts = new(DDPG, 80)
    advance(parts[0], 50)
    Checkpoints(tmp_path, *parts, replay=False).save()
    assert not [*tmp_path.glob("replay*")]
    training, *_, notes = resumed(tmp_path, DDPG, 80)
    assert notes[0] == "the replay buffer was not saved: training goes on with an empty one"
    assert "the replay buffer does not hold the 50 actions of its episode" in notes[1]
    training.run()
    assert (training.step, training.replay.size) == (80, 30)


def test_other_versions_of_what_decides_the_bits_are_reported(tmp_path):
    parts = new(DQN, 40)
    Checkpoints(tmp_path, *parts).save()
    checkpoint, _ = newest(tmp_path)
    older = replace(checkpoint, versions=checkpoint.versions | {"numpy": "0.1"})
    assert restore(older, *new(DQN, 40)) == [f"numpy was 0.1, now it is {np.__version__}"]


def test_environments_of_ones_own_have_no_checkpoints(tmp_path):
    envs = SyncVectorEnv([lambda: gym.make("CartPole-v1")])
    training = Training("dqn", DQN[1], TrainConfig("CartPole-v1", 40), envs=envs)
    with pytest.raises(ValueError, match="environments of your own has no checkpoints"):
        Checkpoints(tmp_path, training)


# The command line

QUICK = "--total-steps 300 --eval-every 100 --eval-episodes 2 --log-every 50 --device cpu"
TINY = "--hidden 8 --learning-starts 50 --batch-size 8"
DQN_TINY = "dqn --train-every 2 --gradient-steps 1 --target-update-every 7"
COMMAND = f"{DQN_TINY} {QUICK} {TINY} --checkpoint-every 70".split()


def scalars(folder):
    """The scalars of a run as TensorBoard shows them, speeds and wall times aside."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = set(events.Tags()["scalars"]) - {"charts/SPS"}
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in sorted(tags)}


def assert_same_folders(whole, parts):
    """Two runs left the same files, wall times aside."""
    for name in ("evaluations.csv", "config.json"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    for name in ("policy.pt", "timeline.pt"):
        assert_same(*(torch.load(run / name, weights_only=True) for run in (whole, parts)))
    assert scalars(whole) == scalars(parts)
    assert (whole / AVERAGES).exists() == (parts / AVERAGES).exists()
    if (whole / AVERAGES).exists():
        assert scalars(whole / AVERAGES) == scalars(parts / AVERAGES)
    if (whole / "checkpoint").exists():
        ours, theirs = (newest(run / "checkpoint")[0] for run in (whole, parts))
        assert_same(ours.state, theirs.state)
        members = len(ours.about["folders"])
        assert torch.equal(*(ring(checkpoint, members) for checkpoint in (ours, theirs)))


def ring(checkpoint, members):
    rows = [
        np.frombuffer(checkpoint.transitions((m, n)), np.float32).reshape(members, n - m, -1)
        for m, n in checkpoint.pieces
    ]
    return torch.from_numpy(np.concatenate(rows, axis=1))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing happened to."""
    runs = tmp_path_factory.mktemp("whole")
    assert train.main([*COMMAND, "--runs-dir", str(runs)]) == 0
    (folder,) = runs.iterdir()
    return folder


def contents(root):
    """What is there, but for who holds it."""
    files = [path for path in root.rglob("*") if path.is_file() and path.name != LOCK]
    return {path: path.read_bytes() for path in files}


class Killed(BaseException):
    pass


def killed_at(step, monkeypatch, command):
    """Run the command line until its training breaks off at a step, with nothing tidied up."""

    def broken(self):
        advance_(self)
        if self.step >= step:
            raise Killed

    advance_ = Training.advance
    with monkeypatch.context() as patch:
        patch.setattr(Training, "advance", broken)
        with pytest.raises(Killed):
            train.main(command)


def test_a_run_that_breaks_off_twice_leaves_what_one_does_that_nothing_happened_to(
    whole, tmp_path, monkeypatch, capsys
):
    killed_at(60, monkeypatch, [*COMMAND, "--runs-dir", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    again = ["--resume", str(folder)]
    killed_at(239, monkeypatch, again)  # from step 0
    with (folder / "evaluations.csv").open("a") as file:
        file.write("300,last,0,12")  # torn
    assert train.main(again) == 0  # from step 210
    out = capsys.readouterr().out
    assert "Resumed at step 0." in out
    assert "Resumed at step 210." in out
    lines = (folder / "resumed.txt").read_text().splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines] == ["step 0: exact", "step 210: exact"]
    assert_same_folders(whole, folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_a_signal_stopped_goes_on_from_that_very_step(
    number, whole, tmp_path, monkeypatch, capsys
):
    """SIGTERM, or the end of its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    advance_ = Training.advance

    def asked_to_stop(self):
        advance_(self)
        if self.step == 133:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "advance", asked_to_stop)
        assert train.main([*COMMAND, "--runs-dir", str(tmp_path)]) == 128 + number
    signal.signal(signal.SIGHUP, before)
    (folder,) = tmp_path.iterdir()
    assert f"Go on: python -m scripts.train --resume {folder}" in capsys.readouterr().out
    assert newest(folder / "checkpoint")[0].step == 133
    assert train.main(["--resume", str(folder)]) == 0
    assert_same_folders(whole, folder)


def test_a_finished_run_has_nothing_to_resume_and_stays_as_it_is(whole, capsys):
    before = contents(whole)
    assert train.main(["--resume", str(whole)]) == 0
    assert "has finished: there is nothing to resume." in capsys.readouterr().out
    assert contents(whole) == before


def test_a_run_that_still_goes_on_is_not_resumed_beside_itself(tmp_path, monkeypatch, capsys):
    advance, refused = Training.advance, []

    def resume_meanwhile(self):
        advance(self)
        if self.step == 133:
            (folder,) = tmp_path.iterdir()
            refused.append(train.main(["--resume", str(folder)]))

    with monkeypatch.context() as patch:
        patch.setattr(Training, "advance", resume_meanwhile)
        assert train.main([*COMMAND, "--runs-dir", str(tmp_path)]) == 0
    assert refused == [2]
    assert "is in use by another process" in capsys.readouterr().err


def test_seeds_together_are_resumed_together(tmp_path, monkeypatch):
    command = f"ddpg {QUICK} {TINY} --checkpoint-every 70 --seeds 1,4 --together".split()
    assert train.main([*command, "--runs-dir", str(tmp_path / "whole")]) == 0
    killed_at(180, monkeypatch, [*command, "--runs-dir", str(tmp_path / "parts")])
    first, second = sorted((tmp_path / "parts").iterdir())
    assert train.main(["--resume", str(second)]) == 2
    assert train.main(["--resume", str(first)]) == 0
    for whole, parts in zip(sorted((tmp_path / "whole").iterdir()), (first, second), strict=True):
        assert_same_folders(whole, parts)


def test_a_checkpoint_that_cannot_be_written_is_a_warning_and_training_goes_on(
    whole, tmp_path, monkeypatch, capsys
):
    save = Checkpoints.save

    def full(self, extra):
        if self.training.step == 140:
            raise OSError(28, "No space left on device")
        save(self, extra)

    monkeypatch.setattr(Checkpoints, "save", full)
    assert train.main([*COMMAND, "--runs-dir", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    warning = f"warning: the checkpoint at step 140 of {folder / 'checkpoint'} was not written: "
    assert capsys.readouterr().err == f"{warning}[Errno 28] No space left on device\n"
    assert_same_folders(whole, folder)


def test_a_disk_that_is_full_for_the_results_is_one_sentence_and_how_to_go_on(
    tmp_path, monkeypatch, capsys
):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunFolder, "evaluation", full)
    assert train.main([*COMMAND, "--runs-dir", str(tmp_path)]) == 1
    (folder,) = tmp_path.iterdir()
    error, advice = capsys.readouterr().err.splitlines()
    assert error == "error: [Errno 28] No space left on device"
    assert advice == f"Go on: python -m scripts.train --resume {folder}"
    monkeypatch.undo()
    assert newest(folder / "checkpoint")[0].step == 70


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume takes the folder of a run"),
        (["--resume", "nowhere"], "nowhere is not the folder of a run"),
        (["--resume", "."], "there is no checkpoint in checkpoint"),
        (["dqn", "--resume", "."], "--resume goes on as the run began: dqn cannot be changed"),
        (["dqn", "--checkpoint-every", "-1"], "checkpoint_every must be at least 0, got -1"),
    ],
)
def test_what_cannot_be_resumed_is_refused_in_one_sentence(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not [*tmp_path.iterdir()]


TOGETHER = f"ddpg {QUICK} {TINY} --checkpoint-every 70 --seeds 1,4 --together".split()


@pytest.fixture
def together(tmp_path, monkeypatch):
    """The folders of two seeds that were trained together until they were killed."""
    killed_at(180, monkeypatch, [*TOGETHER, "--runs-dir", str(tmp_path / "runs")])
    return sorted((tmp_path / "runs").iterdir())


def test_of_seeds_together_one_whose_folder_is_gone_is_begun_anew_and_that_is_said(
    together, capsys
):
    first, second = together
    shutil.rmtree(second)
    assert train.main(["--resume", str(first)]) == 0
    assert "note: the evaluations up to step 140 are lost: " in capsys.readouterr().err
    assert "evaluations up to step 140 are lost" in (first / "resumed.txt").read_text()
    tables = [(run / "evaluations.csv").read_text().splitlines() for run in together]
    steps = [{row.partition(",")[0] for row in table} for table in tables]
    assert steps == [{"step", "100", "200", "300"}, {"step", "200", "300"}]
    assert (second / "policy.pt").exists()


def test_nothing_is_written_before_all_of_seeds_together_was_read(together, capsys):
    first, second = together
    with (second / "evaluations.csv").open("r+b") as file:
        file.write(b"damage")
    before = contents(first.parent)
    assert train.main(["--resume", str(first)]) == 2
    assert f"{second} is not of this run" in capsys.readouterr().err
    assert contents(first.parent) == before
    second.rename(second.with_name("away"))
    assert train.main(["--resume", str(first)]) == 0


def test_a_table_that_was_damaged_keeps_its_whole_rows_and_that_is_said(
    tmp_path, monkeypatch, capsys
):
    killed_at(239, monkeypatch, [*COMMAND, "--runs-dir", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    table = folder / "evaluations.csv"
    rows = table.read_bytes().splitlines(keepends=True)
    table.write_bytes(b"".join([rows[0], b"100,last,0,e,3\r\n", *rows[2:-1], rows[-1][:4]]))
    assert train.main(["--resume", str(folder)]) == 0
    assert f"{table} is not as it was at step 210: some rows are lost" in capsys.readouterr().err
    assert table.read_bytes().splitlines(keepends=True)[1:5] == rows[2:6]
    assert table.read_bytes().count(b"\n") == len(rows) - 2 + 6


def test_a_config_that_was_damaged_is_written_anew(whole, tmp_path, monkeypatch):
    killed_at(180, monkeypatch, [*COMMAND, "--runs-dir", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    (folder / "config.json").write_bytes(b"")
    assert train.main(["--resume", str(folder)]) == 0
    assert_same_folders(whole, folder)


def test_a_run_that_another_process_finishes_before_it_can_be_had_is_not_trained_again(
    whole, tmp_path, monkeypatch, capsys
):
    killed_at(180, monkeypatch, [*COMMAND, "--runs-dir", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    take = Hold.take

    def take_after_the_other(self, path, **options):
        monkeypatch.setattr(Hold, "take", take)
        assert train.main(["--resume", str(folder)]) == 0
        take(self, path, **options)

    monkeypatch.setattr(Hold, "take", take_after_the_other)
    assert train.main(["--resume", str(folder)]) == 0
    assert capsys.readouterr().out.endswith("has finished: there is nothing to resume.\n")
    assert len((folder / "resumed.txt").read_text().splitlines()) == 1
    assert_same_folders(whole, folder)


def test_a_run_whose_folder_is_deleted_ends_at_its_next_file_and_says_so(
    tmp_path, monkeypatch, capsys
):
    advance_ = Training.advance

    def deleted(self):
        advance_(self)
        if self.step == 133:
            shutil.rmtree(next(tmp_path.iterdir()))

    monkeypatch.setattr(Training, "advance", deleted)
    assert train.main([*COMMAND, "--runs-dir", str(tmp_path)]) == 1
    err = capsys.readouterr().err.splitlines()
    assert "was not written: [Errno 2] the folder was deleted, moved or replaced" in err[0]
    assert err[-2].startswith("error: [Errno 2] No such file or directory")
    assert err[-1].endswith("is gone: there is nothing to go on from.")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["CPU capability", "threads", "this program", "mujoco", "ale-py"])
def test_whatever_decides_bits_is_recorded_and_what_differs_is_said(name, tmp_path):
    parts = new(DQN, 40)
    Checkpoints(tmp_path, *parts).save()
    checkpoint, _ = newest(tmp_path)
    assert checkpoint.versions == versions()
    other = replace(checkpoint, versions=checkpoint.versions | {name: "another"})
    now = versions()[name]
    assert restore(other, *new(DQN, 40)) == [f"{name} was another, now it is {now}"]


def test_the_cpu_capability_is_the_one_that_is_used():
    program = "from agents.versions import versions; print(versions()['CPU capability'])"
    out = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout == "DEFAULT\n"


# Real kills

KILLS = {
    "dqn": f"{DQN_TINY} --n-envs 2",
    "ddpg": "ddpg --env-id Reacher-v5",
    "sac": "sac --env-id Pendulum-v1 --seeds 1,3 --together",
    "td3": "td3 --env-id Reacher-v5 --tau 0.05 --tau-end 0.001",
}
LONGER = "--total-steps 3000 --eval-every 500 --eval-episodes 2 --log-every 100 --device cpu"
LONGER += " --checkpoint-every 150"


@pytest.mark.full
@pytest.mark.parametrize("algo", KILLS)
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(algo, tmp_path):
    """SIGKILL, several times, from the first seconds of the interpreter to the last file."""
    command = f"{KILLS[algo]} {TINY} {LONGER}".split()
    assert start([*command, "--runs-dir", str(tmp_path / "whole")]).wait() == 0

    rng = random.Random(algo)
    parts, at = tmp_path / "parts", []
    process = start([*command, "--runs-dir", str(parts)])
    while len(at) < 8:
        reached = checkpoints_in(parts)
        until = max(reached, 1) + rng.randrange(4)
        while checkpoints_in(parts) < until and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3) if until > reached else rng.uniform(0, 3))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        first = min(parts.iterdir())
        at.append(newest(first / "checkpoint")[0].step)
        process = start(["--resume", str(first)])
    assert process.wait() == 0
    assert len(at) >= 4
    assert len({*at}) > 1
    assert at == sorted(at)
    print(f"{algo}: killed {len(at)} times, after the checkpoints at steps {at}")
    for one, other in zip(
        sorted((tmp_path / "whole").iterdir()), sorted(parts.iterdir()), strict=True
    ):
        assert_same_folders(one, other)
        with (other / "evaluations.csv").open(newline="") as file:
            assert len([*csv.reader(file)]) == 1 + 6 * 3 * 2


def checkpoints_in(runs):
    """How many checkpoints the run in a folder has written."""
    return max((int(path.stem) for path in runs.glob("*/checkpoint/*.json")), default=0)


def start(arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.train", *arguments],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
