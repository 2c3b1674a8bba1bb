import csv
import dataclasses
import errno
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.progress import Progress

from agents.evaluation import Evaluator
from agents.seeding import evaluation_seeds
from polyak_rl import Choice, Tail, Timeline
from scripts import enjoy, posthoc, ship, train
from scripts.experiment import shipping
from scripts.experiment.episodes import first_episode, note_call, seeds_of
from scripts.experiment.finished import read
from tests.disk import Disk, Fault, lay_out
from tests.test_resume import killed_at
from tests.test_terminal import ERRORS, Dead

# 200 gradient steps: every candidate is exact.
DQN = "dqn --total-steps 450 --learning-starts 50 --train-every 2 --gradient-steps 1 --hidden 8"
DDPG = (
    "ddpg --env-id Pendulum-v1 --total-steps 300 --learning-starts 100 --hidden 8 8 --segments 20"
)
QUICK = " --eval-every 150 --batch-size 8 --eval-episodes 2 --log-every 100 --device cpu"
WINDOWS = [f"window{p}" for p in range(95, 50, -5)]
NAMES = ["last", "tail5", "tail10", "tail25", "tail50", "ema1", *WINDOWS]


def trained(command, runs):
    """The folders of runs that were trained."""
    assert train.main([*(command + QUICK).split(), "--runs-dir", str(runs)]) == 0
    return sorted(runs.iterdir())


@pytest.fixture(scope="module")
def dqn_run(tmp_path_factory):
    """A finished run of DQN that nothing is changed in."""
    (folder,) = trained(DQN, tmp_path_factory.mktemp("dqn"))
    return folder


@pytest.fixture(scope="module")
def ddpg_run(tmp_path_factory):
    """A finished run of DDPG that nothing is changed in."""
    (folder,) = trained(DDPG, tmp_path_factory.mktemp("ddpg"))
    return folder


@pytest.fixture
def run(dqn_run, tmp_path):
    """A finished run of DQN of the test's own."""
    return Path(shutil.copytree(dqn_run, tmp_path / "run"))


def shipped(folder):
    """What shipped.json says, and the choice in it."""
    record = json.loads((folder / "shipped.json").read_text())
    return record, Choice(**record["choice"])


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


# --- what a run has to choose among ---------------------------------------------------------------


def test_every_candidate_of_the_table_is_there_and_the_target_actor_where_there_is_one(
    dqn_run, ddpg_run
):
    assert [*shipping.candidates(read(dqn_run))[0]] == NAMES
    found, left_out = shipping.candidates(read(ddpg_run))
    assert [*found] == [*NAMES[:6], "target", *WINDOWS]
    assert left_out == {}


def test_candidates_are_the_weights_that_training_evaluated(dqn_run):
    """The last evaluation of the run has the returns of its last iterate and its averages."""
    with (dqn_run / "evaluations.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["step"] == "450"]
    finished = read(dqn_run)
    seeds = evaluation_seeds("CartPole-v1", 1, 2).tolist()
    for name in ("last", "tail50", "ema1"):
        env = enjoy.make_env("CartPole-v1")
        played = [total for total, _ in enjoy.play(finished, finished.policy(name), env, seeds)]
        assert played == [float(row["return"]) for row in rows if row["scheme"] == name]


def test_a_window_is_the_difference_of_two_tails(dqn_run):
    finished = read(dqn_run)
    timeline = Timeline.load(dqn_run / "timeline.pt", finished.network)
    window = finished.weights("window80")
    for name, x in window.items():
        long, short = (timeline.average(Tail(share))[name] for share in (0.25, 0.2))
        torch.testing.assert_close(x, (25 * long - 20 * short) / 5, rtol=1e-6, atol=1e-6)


def test_the_target_actor_that_is_kept_is_that_of_the_end(tmp_path, ddpg_run):
    (folder,) = trained(f"{DDPG} --target hard --target-update-every 1", tmp_path)
    run = read(folder)
    assert same(run.weights("target"), run.weights("last"))
    run = read(ddpg_run)
    assert not same(run.weights("target"), run.weights("last"))


def test_a_run_without_what_no_timeline_gives_ships_among_the_others_and_says_so(
    ddpg_run, tmp_path, capsys
):
    folder = Path(shutil.copytree(ddpg_run, tmp_path / "run"))
    (folder / "candidates.pt").unlink()
    assert ship.main([str(folder), "--episodes", "28"]) == 0
    record, choice = shipped(folder)
    assert [*choice.choosing] == [name for name in NAMES if name != "ema1"]
    assert [*record["left_out"]] == ["ema1", "target"]
    err = capsys.readouterr().err
    assert "note: target is no candidate: the target actor was not kept in " in err
    assert "note: ema1 is no candidate: the timeline is too coarse for Ema(" in err
    # Training's last checkpoint has them still.
    assert train.main(["--resume", str(folder)]) == 0
    assert same(read(folder).weights("target"), read(ddpg_run).weights("target"))
    assert train.main(["--resume", str(folder)]) == 0
    assert "has finished: there is nothing to resume" in capsys.readouterr().out


# --- the choice -----------------------------------------------------------------------------------


def test_what_is_shipped_is_the_winner_and_the_record_says_how(run, capsys):
    assert ship.main([str(run), "--episodes", "40"]) == 0
    out = capsys.readouterr().out
    record, choice = shipped(run)
    finished = read(run)
    winner = {n: x.float() for n, x in finished.weights(choice.winner).items()}
    assert same(torch.load(run / "shipped.pt", weights_only=True), winner)
    assert str(choice) in out
    assert all(name in out for name in NAMES)
    assert (choice.prior, choice.last, choice.worst, choice.start) == ("tail25", "last", 1.0, 0)
    assert record["criterion"] == "mean"
    assert record["left_out"] == {}
    seeds = record["seeds"]
    assert len(seeds["valuing"]) == 40 == len(choice.valuing["last"])
    # The numbers can be had again from the record alone, one episode after another.
    env = enjoy.make_env("CartPole-v1")
    for block in ("choosing", "valuing"):
        for name, returns in getattr(choice, block).items():
            policy = finished.policy(name)
            again = enjoy.play(finished, policy, env, seeds[block][: len(returns)])
            assert tuple(total for total, _ in again) == returns


def test_all_policies_of_a_round_are_members_of_one_network(dqn_run, monkeypatch):
    run, calls = read(dqn_run), []
    evaluate = Evaluator.evaluate

    def counted(self, policy, episode_seeds, *others):
        calls.append(episode_seeds.shape)
        return evaluate(self, policy, episode_seeds, *others)

    monkeypatch.setattr(Evaluator, "evaluate", counted)
    weights = {name: run.weights(name) for name in NAMES}
    with Progress(disable=True) as progress:
        evaluator = run.evaluator()
        returns = shipping.play(run, evaluator, weights, range(3, 13), progress)
    assert calls == [(15, 4), (15, 4), (15, 2)]  # no more than 64 environments
    assert {len(row) for row in returns.values()} == {10}


def test_no_call_plays_an_episode_of_another_and_one_is_played_again_when_asked(run, capsys):
    records = []
    for extra in ([], [], ["--again", "1"]):
        assert ship.main([str(run), "--episodes", "29", *extra]) == 0
        records.append(shipped(run)[0])
    first, second, third = ({*r["seeds"]["choosing"], *r["seeds"]["valuing"]} for r in records)
    assert not first & second
    assert third == first
    assert records[2]["choice"] == records[0]["choice"]
    assert [record["call"] for record in records] == [1, 2, 3]
    assert posthoc.main([str(run), "--episodes", "3"]) == 0
    begins = sum(len(s) for s in records[0]["seeds"].values())
    begins += sum(len(s) for s in records[1]["seeds"].values())
    rows = [line.split(",") for line in (run / "posthoc.csv").read_text().splitlines()[1:]]
    assert [(rule, int(number) - begins) for rule, number, _ in rows] == [
        (rule, i) for rule in ("last", "tail:0.25") for i in range(3)
    ]
    before = (run / "posthoc.csv").read_bytes()
    assert posthoc.main([str(run), "--episodes", "3", "--again", "4"]) == 0
    assert (run / "posthoc.csv").read_bytes() == before
    assert posthoc.main([str(run), "--episodes", "3"]) == 0
    assert (run / "posthoc.csv").read_bytes() != before
    capsys.readouterr()
    assert ship.main([str(run), "--again", "7"]) == 2
    assert capsys.readouterr().err == f"error: {run} has had 6 calls, got --again 7\n"


def test_episodes_are_the_same_whoever_counts_them(tmp_path):
    assert first_episode(tmp_path) == 0
    assert [note_call(tmp_path, "ship", 0, 5), note_call(tmp_path, "posthoc", 5, 2)] == [1, 2]
    assert (first_episode(tmp_path), first_episode(tmp_path, again=2)) == (7, 5)
    assert note_call(tmp_path, "ship", 0, 9) == 3  # again, with a larger budget
    assert first_episode(tmp_path) == 9
    whole = seeds_of("CartPole-v1", 4, range(20))
    assert seeds_of("CartPole-v1", 4, range(7, 20)).tolist() == whole[7:].tolist()
    assert not {*whole} & {*evaluation_seeds("CartPole-v1", 4, 100)}


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", "[{}]", '[{"first": -1, "episodes": 2}]', '[{"first": true}]', "[[["]
)
def test_a_count_of_episodes_that_is_damaged_is_not_begun_anew_in_silence(text, run, capsys):
    (run / "episodes.json").write_text(text)
    if text == "{}":  # no calls, in another form
        (run / "episodes.json").write_text('{"a": 1}')
    assert ship.main([str(run)]) == 2
    assert (
        "episodes.json is damaged: delete it if episodes may be played" in capsys.readouterr().err
    )


def test_the_criterion_can_be_the_mean_of_the_worst_quarter(run, monkeypatch):
    """tail50 is the best on average and fails in a quarter of the episodes; tail5 never fails."""

    def played(run, evaluator, group, episodes, progress):
        rows = {name: [50.0 for _ in episodes] for name in group}
        if "tail5" in rows:
            rows["tail5"] = [60.0 for _ in episodes]
        if "tail50" in rows:
            rows["tail50"] = [0.0 if number % 4 == 0 else 100.0 for number in episodes]
        return rows

    monkeypatch.setattr(shipping, "play", played)
    note_call(run, "ship", 0, 1)  # begin with an episode in which tail50 is good
    assert ship.main([str(run), "--episodes", "200"]) == 0
    assert shipped(run)[1].winner == "tail50"
    assert ship.main([str(run), "--episodes", "200", "--criterion", "cvar"]) == 0
    record, choice = shipped(run)
    assert (choice.winner, choice.worst, record["criterion"]) == ("tail5", 0.25, "cvar")
    assert choice.gain().estimate == pytest.approx(10)


def test_without_episodes_the_prior_is_shipped_unseen(run):
    assert ship.main([str(run), "--episodes", "0"]) == 0
    record, choice = shipped(run)
    assert (choice.winner, choice.choosing, choice.valuing) == ("tail25", {}, {})
    assert record["rule"] == {"rule": "tail", "fraction": 0.25}
    assert record["seeds"] == {"choosing": [], "valuing": []}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "timeline.pt").unlink(), "has no timeline.pt: it was trained without"),
        (lambda run: (run / "timeline.pt").write_bytes(b"x"), "timeline.pt cannot be read"),
        (lambda run: (run / "policy.pt").unlink(), "is not the folder of a finished run"),
        (lambda run: flip(run / "policy.pt"), "policy.pt is damaged"),
        (lambda run: flip(run / "candidates.pt"), "candidates.pt is damaged"),
        (lambda run: torch.save({"ema1": {}}, run / "candidates.pt"), "weights of another policy"),
        (lambda run: torch.save([1], run / "candidates.pt"), "weights of another policy"),
        (lambda run: (run / "config.json").unlink(), "is not the folder of a finished run"),
    ],
)
def test_a_run_that_has_not_ended_or_is_damaged_is_refused_in_one_sentence(
    damage, message, run, capsys
):
    damage(run)
    assert ship.main([str(run)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not {"shipped.pt", "shipped.json", "episodes.json"} & {p.name for p in run.iterdir()}


def flip(path):
    """Change a byte in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--episodes", "12"], "budget must be 0 or at least 29 episodes for 15 candidates"),
        (["--episodes", "-1"], "budget must be 0 or at least 29"),
        (["--again", "1"], "has had 0 calls, got --again 1"),
    ],
)
def test_what_cannot_be_chosen_with_is_refused(arguments, message, run, capsys):
    assert ship.main([str(run), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (run / "shipped.json").exists()


def test_posthoc_refuses_a_rule_that_there_is_not(run, capsys):
    assert posthoc.main([str(run), "--rule", "median"]) == 2
    assert "there is no rule 'median'" in capsys.readouterr().err
    assert not (run / "episodes.json").exists()


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_output_that_cannot_be_shown_is_not_in_the_way_of_shipping(error, run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Dead(error))
    monkeypatch.setattr(sys, "stderr", Dead(error))
    assert ship.main([str(run), "--episodes", "29"]) == 0
    assert read(run).default == "shipped"


def test_one_process_at_a_time_takes_episodes(run, capsys):
    with ship.closing(ship.Hold()) as held:
        held.take(run)
        assert ship.main([str(run)]) == 2
        assert posthoc.main([str(run)]) == 2
    assert capsys.readouterr().err.count("by another process") == 2


# --- what is shipped is played --------------------------------------------------------------------


def test_enjoy_plays_what_was_shipped_says_so_and_plays_another_when_asked(run, capsys):
    def played(*extra):
        assert enjoy.main([str(run), "--episodes", "2", *extra]) == 0
        return capsys.readouterr().out.splitlines()

    last = played()
    assert last[0] == "policy: last"
    assert ship.main([str(run), "--episodes", "29"]) == 0
    winner = shipped(run)[1].winner
    capsys.readouterr()
    assert played()[0] == f"policy: shipped, {winner}"
    assert played()[1:] == played("--policy", winner)[1:]
    assert played("--policy", "last") == last
    assert played("--policy", "tail:0.25")[1:] == played("--policy", "tail25")[1:]
    assert played("--policy", "window80")[0] == "policy: window80"


def test_weights_that_are_not_those_of_the_record_are_not_played(run, capsys):
    assert ship.main([str(run), "--episodes", "0"]) == 0
    capsys.readouterr()
    shutil.copy(run / "policy.pt", run / "shipped.pt")
    assert enjoy.main([str(run), "--episodes", "1"]) == 2
    assert "shipped.pt is not what shipped.json is about: ship once more" in capsys.readouterr().err
    assert enjoy.main([str(run), "--episodes", "1", "--policy", "last"]) == 0
    (run / "shipped.json").write_text("{")
    assert enjoy.main([str(run), "--episodes", "1"]) == 2
    assert "shipped.json cannot be read" in capsys.readouterr().err
    assert enjoy.main([str(run), "--policy", "target"]) == 2
    assert "the target actor was not kept" in capsys.readouterr().err


def choosing_last(monkeypatch):
    """Let the next call ship other weights than the one before."""
    choose = shipping.choose

    def chosen(*args, **options):
        return dataclasses.replace(choose(*args, **options), winner="last")

    monkeypatch.setattr(shipping, "choose", chosen)


@pytest.mark.parametrize("how", ["killed", "lost"])
def test_shipping_that_ends_at_any_call_leaves_the_earlier_choice_or_the_new_one(
    how, run, tmp_path, monkeypatch
):
    assert ship.main([str(run), "--episodes", "0"]) == 0
    trained = {name: (run / name).read_bytes() for name in ("policy.pt", "timeline.pt")}
    before = read(run).weights("shipped")
    with monkeypatch.context() as patch, Disk(run).mounted() as disk:
        choosing_last(patch)
        assert ship.main([str(run), "--episodes", "0"]) == 0
        disk.remember()
    seen = set()
    for number, state in enumerate(getattr(disk, how).values()):
        folder = tmp_path / str(number)
        lay_out(state, folder)
        found = read(folder)
        assert found.default == "shipped"
        try:
            winner = found.choice["choice"]["winner"]
            expected = found.weights("last") if winner == "last" else before
            assert same(found.weights("shipped"), expected)
        except ValueError as error:
            winner = str(error).rpartition("/")[2]
        seen.add(winner)
        assert {name: (folder / name).read_bytes() for name in trained} == trained
        if number % 4:
            continue
        assert posthoc.main([str(folder), "--episodes", "2"]) == 0
        assert not [*folder.glob("*.partial")]
        assert ship.main([str(folder), "--episodes", "0"]) == 0
        assert read(folder).choice["choice"]["winner"] == "tail25"
    neither = "shipped.pt is not what shipped.json is about: ship once more"
    assert seen == {"tail25", "last", neither}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_what_was_shipped_stays_where_no_other_can_be_written(number, run, monkeypatch, capsys):
    assert ship.main([str(run), "--episodes", "0"]) == 0
    with Disk(run).mounted() as disk:
        assert ship.main([str(run), "--episodes", "0"]) == 0
    choosing_last(monkeypatch)
    last = len(disk.calls) - disk.calls[::-1].index("write")  # of shipped.pt
    for at in range(1, last + 1):
        with Disk(run, Fault(at, number, stays=True)).mounted():
            assert ship.main([str(run), "--episodes", "0"]) == 2
        assert os.strerror(number) in capsys.readouterr().err
        assert read(run).choice["choice"]["winner"] == "tail25"


@pytest.mark.parametrize("script", [ship, posthoc])
def test_a_folder_that_is_another_by_the_end_of_the_playing_is_left_alone(
    script, run, tmp_path, monkeypatch, capsys
):
    evaluate = Evaluator.evaluate

    def exchange(self, *args):
        if not (tmp_path / "away").exists():
            run.rename(tmp_path / "away")
            shutil.copytree(tmp_path / "away", run)
        return evaluate(self, *args)

    monkeypatch.setattr(Evaluator, "evaluate", exchange)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert script.main([str(run), "--episodes", "29"]) == 2
    assert "the folder was deleted, moved or replaced" in capsys.readouterr().err
    del before["lock"]
    after = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    del after["lock"]
    assert after == before


def test_the_end_of_a_longer_run_removes_what_was_shipped_of_an_earlier_one(tmp_path, monkeypatch):
    command = [*(DQN + QUICK).split(), "--runs-dir", str(tmp_path), "--checkpoint-every", "100"]
    killed_at(350, monkeypatch, command)
    (folder,) = tmp_path.iterdir()
    for name in ("shipped.json", "shipped.pt"):
        (folder / name).write_text("of before")
    assert train.main(["--resume", str(folder)]) == 0
    assert read(folder).default == "last"
    assert not (folder / "shipped.pt").exists()


def test_training_ships_each_seed_at_its_end(tmp_path, capsys):
    folders = trained(f"{DQN} --seeds 1,2 --together --ship 29", tmp_path)
    out = capsys.readouterr().out
    choices = [shipped(folder)[1] for folder in folders]
    assert all(str(choice) in out for choice in choices)
    assert choices[0].valuing != choices[1].valuing
    assert len({tuple(shipped(folder)[0]["seeds"]["valuing"]) for folder in folders}) == 2
    for folder, choice in zip(folders, choices, strict=True):  # as afterwards, by its own command
        assert ship.main([str(folder), "--episodes", "29", "--again", "1"]) == 0
        assert shipped(folder)[1] == choice


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--ship", "12"], "budget must be 0 or at least 29 episodes for 15 candidates, got 12"),
        (["--ship", "60", "--no-averages"], "ship chooses among averages"),
    ],
)
def test_training_refuses_before_its_first_step_what_it_could_not_ship(
    extra, message, tmp_path, capsys
):
    runs = tmp_path / "runs"
    assert train.main([*(DQN + QUICK).split(), *extra, "--runs-dir", str(runs)]) == 2
    assert message in capsys.readouterr().err
    assert not runs.exists()


# --- a folder for others --------------------------------------------------------------------------


def test_a_folder_for_others_plays_alone_and_its_card_says_what_the_record_says(
    ddpg_run, tmp_path, capsys, monkeypatch
):
    run, folder = Path(shutil.copytree(ddpg_run, tmp_path / "run")), tmp_path / "out" / "hand over"
    assert ship.main([str(run), "--episodes", "30", "--folder", str(folder)]) == 0
    choice = shipped(run)[1]
    shutil.rmtree(run)
    files = {path.name for path in folder.iterdir()}
    assert files == {"shipped.pt", "shipped.json", "config.json", "README.md"}
    capsys.readouterr()
    assert enjoy.main([str(folder), "--episodes", "1"]) == 0
    assert capsys.readouterr().out.startswith(f"policy: shipped, {choice.winner}\n")

    text = (folder / "README.md").read_text()
    _, header, card = text.split("---\n", 2)
    (result,) = yaml.safe_load(header)["model-index"][0]["results"]
    fresh = np.array(choice.valuing[choice.winner])
    expected = f"{fresh.mean():.2f} +/- {fresh.std(ddof=1):.2f}"
    assert result["metrics"][0]["value"] == expected
    assert result["dataset"]["name"] == "Pendulum-v1"
    assert "# DDPG on Pendulum-v1" in card
    assert f"| mean return | {fresh.mean():.1f}, standard deviation" in card
    for name in {"last", "tail25"} - {choice.winner}:
        assert f"| difference from {name}, 95 % interval | {choice.gain(name)} |" in card
    assert f"{choice.promised():.1f}; choosing flatters" in card
    assert "http" not in text
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {}
    exec(code.replace('"DIR"', repr(str(folder))), names)
    assert -2 <= names["action"].item() <= 2
    shapes = dict(re.findall(r"- `(.*?)` (\[.*\])", card))
    weights = torch.load(folder / "shipped.pt", weights_only=True)
    assert shapes == {name: str(list(x.shape)) for name, x in weights.items()}


def test_a_folder_with_something_in_it_is_refused_before_anything_is_played(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    assert ship.main([str(run), "--folder", str(tmp_path / "out")]) == 2
    assert "must be new or empty: it has files in it" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(tmp_path)
    assert ship.main([str(run), "--folder", str(tmp_path / "link")]) == 2
    assert "is a symbolic link" in capsys.readouterr().err
    assert not (run / "shipped.json").exists()


def test_a_card_of_a_policy_that_nobody_evaluated_says_so(run, tmp_path):
    folder = tmp_path / "out"
    assert ship.main([str(run), "--episodes", "0", "--folder", str(folder)]) == 0
    text = (folder / "README.md").read_text()
    assert "It was not evaluated: the average was taken unseen." in text
    assert "model-index" not in text
