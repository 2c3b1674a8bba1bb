import csv
import json
import re
import signal

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from agents.dqn import DQNConfig
from agents.environments import make_env
from agents.presets import describe_preset
from agents.seeding import evaluation_seeds
from agents.training import TrainConfig, Training
from scripts import enjoy, train
from scripts.experiment.finished import read
from scripts.experiment.run_folder import RunFolder, new_run_folder
from scripts.experiment.terminal import stop_signals

QUICK = ["--total-steps", "300", "--eval-every", "100", "--eval-episodes", "3"]
SMALL = ["--hidden", "16", "--learning-starts", "50", "--train-every", "8", "--log-every", "100"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run of DQN on CartPole."""
    runs = tmp_path_factory.mktemp("runs")
    command = ["dqn", "--env-id", "CartPole-v1", "--seed", "3", "--device", "cpu"]
    assert train.main([*command, *QUICK, *SMALL, "--runs-dir", str(runs)]) == 0
    (folder,) = runs.iterdir()
    return folder


def test_the_run_folder_is_named_after_environment_algorithm_seed_and_time(run):
    env_id, algo, seed, when = run.name.split("__")
    assert (env_id, algo, seed) == ("CartPole-v1", "dqn", "3")
    assert len(when) == len("20250131-235959")


def test_two_runs_that_begin_in_one_second_get_folders_of_their_own(tmp_path):
    folders = {new_run_folder(tmp_path, "ALE/Pong-v5", "dqn", 1) for _ in range(3)}
    assert len(folders) == 3
    assert all(folder.name.startswith("ALE%2FPong-v5__dqn__1__") for folder in folders)


def test_evaluations_are_written_as_rows(run):
    with (run / "evaluations.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "scheme", "episode", "return", "length"]
    keys = [(int(step), scheme, int(episode)) for step, scheme, episode, *_ in rows]
    schemes = ("last", "tail50", "ema1")
    assert keys == [(t, name, e) for t in (100, 200, 300) for name in schemes for e in range(3)]
    assert all(float(total) == int(length) for *_, total, length in rows)


def test_tensorboard_shows_the_documented_tags_the_overlay_and_the_hyperparameters(run):
    events = EventAccumulator(str(run)).Reload()
    tags = events.Tags()
    assert {
        "charts/episodic_return",
        "charts/episodic_length",
        "charts/SPS",
        "charts/epsilon",
        "losses/td_loss",
        "losses/q_values",
        "eval/last",
        "target/lag/q",
    } <= set(tags["scalars"])
    averages = EventAccumulator(str(run / "averages")).Reload()
    assert averages.Tags()["scalars"] == ["eval/tail50", "eval/ema1"]
    assert [event.step for event in averages.Scalars("eval/ema1")] == [100, 200, 300]
    assert [event.step for event in events.Scalars("charts/SPS")] == [100, 200, 300]
    assert "hyperparameters/text_summary" in tags["tensors"]


def test_a_chart_of_last_and_average_has_one_curve_of_each_colour(run):
    folders = [EventAccumulator(str(path)).Reload() for path in (run, run / "averages")]
    layout = folders[0].Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    evaluation, weights = Layout.FromString(layout).category

    def curves(chart):
        """The curves of each folder, which TensorBoard gives one colour."""
        (regex,) = chart.multiline.tag
        return [[t for t in f.Tags()["scalars"] if re.match(regex, t)] for f in folders]

    uniform, ema, every = map(curves, evaluation.chart)
    assert uniform == [["eval/last"], ["eval/tail50"]]
    assert ema == [["eval/last"], ["eval/ema1"]]
    assert every == [["eval/last"], ["eval/tail50", "eval/ema1"]]
    assert [[len(own) for own in curves(chart)] for chart in weights.chart] == [[1, 0]] * 3


def test_the_table_of_hyperparameters_opens_with_what_tells_runs_apart_and_the_scores(run):
    events = EventAccumulator(str(run)).Reload()

    def plugin_data(tag):
        content = events.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content
        return HParamsPluginData.FromString(content)

    experiment = plugin_data("experiment").experiment
    first = {info.name for info in experiment.hparam_infos if info.differs}
    assert first == {"algo", "env_id", "learning_rate", "seed", "total_steps"}
    assert [(metric.name.group, metric.name.tag) for metric in experiment.metric_infos] == [
        ("", "eval/last"),
        ("averages", "eval/tail50"),
        ("averages", "eval/ema1"),
    ]
    values = plugin_data("session_start_info").session_start_info.hparams
    assert values["seed"].number_value == 3
    assert values["double"].string_value == "False"  # as a number it would be shown as 0.0000


def test_a_resumed_run_takes_back_later_evaluations_of_averages_too(tmp_path):
    config, agent = TrainConfig("CartPole-v1", 300), DQNConfig()
    returns, lengths = np.ones(2), np.ones(2, dtype=np.int64)
    folder = RunFolder(tmp_path, "dqn", 1, config, agent)
    for step in (100, 200):
        folder.evaluation(step, "ema1", returns, lengths)
    folder.close()
    folder = RunFolder(tmp_path, "dqn", 1, config, agent, resume_at=150)
    folder.evaluation(200, "ema1", 2 * returns, lengths)
    folder.close()
    events = EventAccumulator(str(tmp_path / "averages")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("eval/ema1")] == [(100, 1.0), (200, 2.0)]


def test_config_json_says_what_was_run(run):
    record = json.loads((run / "config.json").read_text())
    assert (record["algo"], record["seed"]) == ("dqn", 3)
    assert record["run"]["total_steps"] == 300
    assert record["run"]["device"] == "cpu"
    assert record["agent"]["hidden"] == [16]
    assert record["versions"]["torch"] == torch.__version__


def test_the_policy_file_is_data_and_belongs_to_one_seed(run):
    weights = torch.load(run / "policy.pt", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {
        "net.0.weight": (1, 4, 16),
        "net.0.bias": (1, 1, 16),
        "net.2.weight": (1, 16, 2),
        "net.2.bias": (1, 1, 2),
    }


def test_enjoy_plays_the_trained_policy(run, capsys):
    assert enjoy.main([str(run), "--episodes", "2", "--seed", "7"]) == 0
    policy, first, second, mean = capsys.readouterr().out.splitlines()
    assert policy == "policy: last"
    assert first.startswith("episode seed 7: return ")
    assert second.startswith("episode seed 8: return ")
    assert mean.endswith("over 2 episodes")


def test_enjoy_reaches_the_returns_that_training_wrote_down(run):
    finished = read(run)
    seeds = evaluation_seeds("CartPole-v1", 3, 3).tolist()
    env, policy = make_env("CartPole-v1"), finished.policy("last")
    played = [total for total, _ in enjoy.play(finished, policy, env, seeds)]
    with (run / "evaluations.csv").open(newline="") as file:
        rows = [
            row for row in csv.DictReader(file) if (row["step"], row["scheme"]) == ("300", "last")
        ]
    assert played == [float(row["return"]) for row in rows]


@pytest.mark.parametrize("algo", ["ddpg", "sac", "td3"])
def test_the_continuous_algorithms_train_and_the_summary_says_what_was_learned(
    algo, tmp_path, capsys
):
    small = ["--hidden", "16", "--learning-starts", "200", "--device", "cpu"]
    assert train.main([algo, *QUICK, *small, "--runs-dir", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    out = capsys.readouterr().out
    assert f"{algo} on Pendulum-v1, seed 1: 300 environment steps, 100 gradient steps" in out
    assert "at step 100: mean return -" in out
    assert "at step 300: mean return -" in out
    assert f"python -m scripts.enjoy {folder}" in out
    assert f"tensorboard --logdir {tmp_path}" in out
    assert enjoy.main([str(folder), "--episodes", "1"]) == 0


def test_the_preset_of_the_environment_gives_the_defaults_and_options_override_them():
    algo, options = train.parse(["dqn", "--env-id", "MountainCar-v0", "--gamma", "0.5"])
    assert algo == "dqn"
    assert options.run.total_steps == 120_000
    assert options.agent.target_update_every == 300
    assert options.agent.gamma == 0.5
    _, options = train.parse(["sac"])
    assert (options.run.env_id, options.agent.learning_rate) == ("Pendulum-v1", 1e-3)
    assert (options.seed, options.threads) == (1, 1)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("dqn --env-id Nope-v1", "cannot make the environment 'Nope-v1'"),
        ("dqn --env-id Pendulum-v1", "dqn needs Discrete actions, got Box"),
        ("sac --env-id CartPole-v1", "sac needs actions in a one-dimensional Box, got Discrete(2)"),
        ("dqn --device gpu", "device must be cpu, cuda or auto, got 'gpu'"),
        ("dqn --lr 1e-3", "there is no --lr: the learning rate is --learning-rate"),
        ("dqn --lr=1e-3", "there is no --lr: the learning rate is --learning-rate"),
        ("ppo", "the algorithm must be one of dqn, ddpg, sac, td3, got 'ppo'"),
        ("dqn --device cuda:99", "device 'cuda:99' cannot be used here"),
        ("dqn --gamma 2", "gamma must be in [0.0, 1.0], got 2.0"),
        ("dqn --learning-rate nan", "learning_rate must be in"),
        ("dqn --total-steps 0", "total_steps must be at least 1, got 0"),
        ("dqn --threads 0", "threads must be at least 1, got 0"),
        ("dqn --seed -1", "seeds must be one or more different integers from 0 up, got (-1,)"),
        ("dqn --hidden 0", "hidden must be in"),
        ("dqn --segments 3", "segments must be even and at least 2, got 3"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2_and_leaves_no_run(
    command, message, tmp_path, capsys
):
    runs = tmp_path / "runs"
    assert train.main([*command.split(), "--runs-dir", str(runs)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not runs.exists()


@pytest.mark.parametrize("command", ["dqn --total-steps many", "dqn --no-such-option 1"])
def test_options_that_do_not_parse_exit_with_code_2(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main(command.split())
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "python -m scripts.train dqn --help" in error
    assert "python dqn" not in error


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train.main(["dqn", *QUICK, *SMALL, "--runs-dir", str(tmp_path / "file" / "runs")]) == 2
    assert capsys.readouterr().err.startswith("error: cannot make a folder in ")


def test_a_run_folder_that_cannot_be_filled_is_taken_away(tmp_path, capsys, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scripts.experiment.run_folder.write_whole", full)
    assert train.main(["dqn", *QUICK, *SMALL, "--runs-dir", str(tmp_path)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_the_run_with_what_there_is(tmp_path, capsys, monkeypatch):
    advance = Training.advance

    def interrupted(self):
        advance(self)
        if self.step == 150:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Training, "advance", interrupted)
    command = ["dqn", *QUICK, *SMALL, "--device", "cpu", "--runs-dir", str(tmp_path)]
    before = signal.getsignal(signal.SIGINT)
    assert train.main(command) == 130
    assert signal.getsignal(signal.SIGINT) is before
    out = capsys.readouterr().out
    assert "150 environment steps" in out
    assert "Stopped before the end (300 steps)." in out
    (folder,) = tmp_path.iterdir()
    evaluated = (folder / "evaluations.csv").read_text().splitlines()[1:]
    assert {row.split(",")[0] for row in evaluated} == {"100"}
    assert enjoy.main([str(folder), "--episodes", "1"]) == 0


def test_a_second_ctrl_c_ends_the_run_at_once():
    with stop_signals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_video_of_a_policy_is_recorded_without_a_word_of_displays(run, capfd, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "XDG_RUNTIME_DIR", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    assert enjoy.main([str(run), "--episodes", "1", "--video"]) == 0
    (video,) = (run / "videos").glob("*.mp4")
    assert video.stat().st_size > 1000
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "policy.pt").unlink(), "it has no policy.pt"),
        (lambda run: (run / "policy.pt").write_bytes(b"junk"), "cannot be read"),
        (lambda run: (run / "config.json").write_text("{}"), "cannot be read"),
        (lambda run: (run / "config.json").write_text("{"), "cannot be read"),
    ],
)
def test_enjoy_refuses_a_folder_without_a_finished_run(damage, message, run, tmp_path, capsys):
    for name in ("config.json", "policy.pt"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    damage(tmp_path)
    assert enjoy.main([str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err


class Faulty(gym.Env):
    """Cannot be reset, or cannot be closed."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, fault):
        self.fault = fault

    def reset(self, *, seed=None, options=None):
        if self.fault == "reset":
            return np.zeros(2, dtype=np.float32)  # the old signature
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action):
        return np.zeros(2, dtype=np.float32), 0.0, True, False, {}

    def close(self):
        if self.fault == "close":
            raise OSError("port in use")


@pytest.fixture(params=["reset", "close"])
def faulty(request):
    gym.register("test/Faulty-v1", lambda: Faulty(request.param))
    yield request.param
    gym.registry.pop("test/Faulty-v1")


def test_a_fault_before_the_run_exits_with_2_and_one_after_it_loses_nothing(
    faulty, tmp_path, capsys
):
    argv = ["dqn", "--env-id", "test/Faulty-v1", *QUICK, *SMALL, "--runs-dir", str(tmp_path)]
    code = train.main(argv)
    printed = capsys.readouterr()
    if faulty == "reset":
        assert code == 2
        assert printed.err.startswith("error: the environment returned an array of float32 (2,)")
        assert list(tmp_path.iterdir()) == []
    else:
        assert code == 0
        assert printed.err.startswith("warning: the environment raised OSError in close: port")
        assert printed.out.startswith("no preset for test/Faulty-v1: defaults of DQN\n")
        assert len([*tmp_path.glob("*/policy.pt")]) == 1


@pytest.mark.parametrize(
    ("env_id", "line"),
    [
        ("CartPole-v1", "preset: CartPole-v1"),
        ("Acrobot-v1", "preset: Acrobot-v1"),
        ("MountainCar-v0", "preset: MountainCar-v0"),
        ("CartPole-v0", "no preset for CartPole-v0: defaults of DQN"),
    ],
)
def test_the_first_line_says_where_the_settings_come_from(env_id, line):
    assert describe_preset("dqn", env_id) == line
