import hashlib
import json
import os
import pickle
import random
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agents.averaging import record_policy
from agents.checkpoint import Checkpoints, newest, restore, training_state
from agents.dqn import DQNConfig
from agents.training import TrainConfig, Training
from polyak_rl import Uniform

AGENT = DQNConfig(hidden=(8,), batch_size=8, learning_starts=10, buffer_size=64)
CONFIG = TrainConfig("CartPole-v1", 400, eval_every=0)


def new(agent=AGENT, config=CONFIG, seeds=(1,)):
    training = Training("dqn", agent, config, seeds)
    return training, record_policy(training, {"uniform": Uniform()}, capacity=20)


def advance(training, step):
    while training.step < step:
        training.advance()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with a checkpoint at step 30 and one at step 50."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    training, averages = new()
    checkpoints = Checkpoints(folder, training, averages, {"who": "test"})
    for step in (30, 50):
        advance(training, step)
        checkpoints.save()
    return folder


@pytest.fixture
def folder(two, tmp_path):
    return Path(shutil.copytree(two, tmp_path / "checkpoint"))


def sign(folder, number=2, **changes):
    """Make a checkpoint's checksums fit what is there now, as an attacker would."""
    path = folder / f"{number:06d}.json"
    record = json.loads(path.read_bytes().partition(b"\n")[2]) | changes
    for name in record["sha256"]:
        record["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    body = json.dumps(record).encode()
    path.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_newest_checkpoint_is_read_with_what_was_said_about_the_run(folder):
    checkpoint, damaged = newest(folder)
    assert (checkpoint.number, checkpoint.step, damaged) == (2, 50, [])
    assert checkpoint.about == {"who": "test"}
    assert checkpoint.pieces == [(0, 30), (30, 50)]
    torch.load(folder / "000002.pt", weights_only=True)


def test_the_last_two_are_kept_and_transitions_are_written_once_and_dropped_when_overwritten(
    tmp_path,
):
    training, averages = new()
    checkpoints = Checkpoints(tmp_path / "c", training, averages)
    seen = {}
    for step in (30, 50, 90, 110):
        advance(training, step)
        checkpoints.save()
        for path in (tmp_path / "c").glob("replay*"):
            stat = path.stat()
            assert seen.setdefault(path.name, (stat.st_ino, stat.st_mtime_ns)) == (
                stat.st_ino,
                stat.st_mtime_ns,
            )
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "000003.json",
        "000003.pt",
        "000004.json",
        "000004.pt",
        "replay-0-30.f32",  # the ring of 64 at step 90 begins at 26
        "replay-30-50.f32",
        "replay-50-90.f32",
        "replay-90-110.f32",
    ]
    assert newest(tmp_path / "c")[0].pieces == [(30, 50), (50, 90), (90, 110)]
    advance(training, 300)
    checkpoints.save()  # more than the ring holds came since
    checkpoint, _ = newest(tmp_path / "c")
    assert checkpoint.pieces == [(236, 300)]
    again, same = new()
    restore(checkpoint, again, same)
    assert torch.equal(again.replay.rows, training.replay.rows)
    assert again.replay.position == training.replay.position


def test_saving_changes_nothing_that_is_saved(tmp_path):
    """Not even the last bits of an average that has iterates waiting to be taken in."""
    plain, saved = new(), new()
    checkpoints = Checkpoints(tmp_path, *saved)
    for training, _ in (plain, saved):
        advance(training, 390)
        if training is saved[0]:
            for step in (391, 392, 395):
                advance(training, step)
                checkpoints.save()
        advance(training, 400)
    assert plain[0].updates > 64
    assert_same(training_state(*plain), training_state(*saved))


def assert_same(ours, theirs, where="state"):
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs) or torch.allclose(
            ours, theirs, rtol=0, atol=0, equal_nan=True
        ), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}.{i}")
    else:
        assert ours == theirs, where


NAMES = ["000002.json", "000002.pt", "replay-30-50.f32"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_cut_short_anywhere_gives_way_to_the_checkpoint_before(folder, name):
    data = (folder / name).read_bytes()
    for offset in {0, 1, 63, 64, 65, 66, len(data) // 3, len(data) // 2, len(data) - 1}:
        (folder / name).write_bytes(data[:offset])
        checkpoint, damaged = newest(folder)
        assert checkpoint.step == 30
        assert len(damaged) == 1
        assert "000002.json cannot be used: " in damaged[0]
        assert "does not fit" in damaged[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_gives_way_to_the_checkpoint_before(folder, name):
    data = (folder / name).read_bytes()
    for offset in range(0, len(data), max(1, len(data) // 40)):
        flipped = bytearray(data)
        flipped[offset] ^= 1 << offset % 8
        (folder / name).write_bytes(flipped)
        checkpoint, damaged = newest(folder)
        assert (checkpoint.step, len(damaged)) == (30, 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_gone_or_a_directory_gives_way_to_the_checkpoint_before(folder, name):
    (folder / name).unlink()
    if name.endswith("json"):
        assert newest(folder)[0].step == 30
    else:
        checkpoint, (damage,) = newest(folder)
        assert checkpoint.step == 30
        assert "No such file" in damage
    (folder / name).mkdir()
    checkpoint, (damage,) = newest(folder)
    assert checkpoint.step == 30
    assert "Is a directory" in damage


def test_where_nothing_is_whole_the_error_names_every_checkpoint_and_nothing_is_written(folder):
    (folder / "replay-0-30.f32").write_bytes(b"")  # both need it
    before = contents(folder)
    with pytest.raises(ValueError, match=r"000002.json cannot be used.*; .*000001.json cannot"):
        newest(folder)
    assert contents(folder) == before
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        newest(folder / "elsewhere")


def test_damage_is_found_before_anything_is_parsed(folder, monkeypatch):
    data = bytearray((folder / "000001.pt").read_bytes())
    data[len(data) // 2] ^= 4
    (folder / "000001.pt").write_bytes(data)
    (folder / "000002.json").write_bytes((folder / "000002.json").read_bytes() + b" ")

    def parse(*args, **kwargs):
        raise AssertionError("parsed")

    monkeypatch.setattr(torch, "load", parse)
    with pytest.raises(ValueError, match=r"the checksum of 000001\.pt does not fit"):
        newest(folder)
    monkeypatch.setattr(json, "loads", parse)
    (folder / "000001.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match="its checksum does not fit"):
        newest(folder)


def test_an_unknown_schema_is_refused_and_no_older_checkpoint_taken_instead(folder):
    sign(folder, schema=9)
    with pytest.raises(ValueError, match="has schema 9; this program reads schema 5"):
        newest(folder)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_that_runs_code_is_never_run(folder, tmp_path, writer):
    trace = tmp_path / "trace"
    with (folder / "000002.pt").open("wb") as file:
        if writer == "torch":
            torch.save({"clocks": {"step": 50}, "agent": Attack(trace)}, file)
        else:
            pickle.dump(Attack(trace), file)
    sign(folder)  # even where the checksums are made to fit
    checkpoint, (damage,) = newest(folder)
    assert checkpoint.step == 30
    assert "000002.pt is not a state" in damage
    assert not trace.exists()


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"null", b"\xff", b"{", b'{"schema": 5}', b"[" * 9999]
)
def test_a_manifest_that_was_made_up_gives_way_to_the_checkpoint_before(folder, body):
    line = hashlib.sha256(body).hexdigest().encode()
    (folder / "000002.json").write_bytes(line + b"\n" + body)
    checkpoint, (damage,) = newest(folder)
    assert checkpoint.step == 30
    assert "000002.json cannot be used: " in damage


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agent": replace(AGENT, hidden=(9,))}, r"its agent is \{.*\[8\].*here it is.*\[9\]"),
        ({"config": replace(CONFIG, total_steps=401)}, "its run is"),
        ({"seeds": (2,)}, r"its seeds is \[1\], here it is \[2\]"),
        ({"seeds": (1, 2)}, "its seeds is"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused_and_nothing_changes(folder, changes, message):
    training, averages = new(**changes)
    before = training_state(training, averages)
    with pytest.raises(ValueError, match=message):
        restore(newest(folder)[0], training, averages)
    assert_same(before, training_state(training, averages))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s["agent"]["q"].update({"net.0.weight": torch.zeros(1, 4, 9)}),
            r"agent.q.net.0.weight: torch.float32 \(1, 4, 9\) there, torch.float32 \(1, 4, 8\)",
        ),
        (lambda s: s["agent"].pop("q_target"), "does not fit this training at agent"),
        (lambda s: s["clocks"].update(updates="many"), "at clocks.updates: a str there"),
        (lambda s: s["sampling"]["generators"].pop(), "at sampling"),
        (lambda s: s.pop("environments"), "at environments"),
        (lambda s: s["averages"]["timeline"].update(capacity=22), "capacity = 22"),
        (lambda s: s.pop("losses"), "losses"),
        (lambda s: s["averages"].update(iterates=torch.zeros(2, 3)), "out of bounds"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_half_loaded(folder, change, message):
    state = torch.load(folder / "000002.pt", weights_only=True)
    change(state)
    torch.save(state, folder / "000002.pt")
    sign(folder)
    training, averages = new()
    before = training_state(training, averages)
    with pytest.raises(ValueError, match=message):
        restore(newest(folder)[0], training, averages)
    assert_same(before, training_state(training, averages))
    assert training.replay.added == 0


def test_a_checkpoint_is_restored_into_a_new_training_only(folder):
    training, averages = new()
    training.advance()
    with pytest.raises(ValueError, match="restored into a new training, got step 1"):
        restore(newest(folder)[0], training, averages)


@pytest.mark.parametrize("limit", [10, 1000, 4000])
def test_a_full_disk_leaves_the_checkpoints_that_were_there(folder, limit):
    """The limit of a file's size stands for a disk that fills while a file is written."""
    training, averages = new()
    checkpoint, _ = newest(folder)
    restore(checkpoint, training, averages)
    advance(training, 100)
    checkpoints = Checkpoints(folder, training, averages, after=checkpoint)
    before = contents(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoints.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    assert not any(name.endswith(".partial") for name in after)
    assert newest(folder)[0].step == 50
    advance(training, 110)
    checkpoints.save()  # there is room again
    assert newest(folder)[0].step == 110


@pytest.mark.parametrize("file", ["replay", ".pt", ".json"])
def test_a_writer_that_dies_at_any_file_leaves_the_checkpoints_that_were_there(
    folder, file, monkeypatch
):
    training, averages = new()
    checkpoint, _ = newest(folder)
    restore(checkpoint, training, averages)
    advance(training, 100)
    rename = Path.replace

    def die(self, target):
        if file in target.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        Checkpoints(folder, training, averages, after=checkpoint).save()
    monkeypatch.undo()
    checkpoint, damaged = newest(folder)
    assert (checkpoint.step, damaged) == (50, [])
    again, same = new()
    assert restore(checkpoint, again, same) == []


def test_a_damaged_checkpoint_is_written_over_by_the_run_that_goes_on_from_the_one_before(folder):
    (folder / "000002.pt").write_bytes(b"")
    checkpoint, damaged = newest(folder)
    training, averages = new()
    restore(checkpoint, training, averages)
    advance(training, 40)
    Checkpoints(folder, training, averages, after=checkpoint).save()
    assert len(damaged) == 1
    assert newest(folder)[1] == []
    assert newest(folder)[0].step == 40


@pytest.mark.full
def test_three_thousand_mutations_each_fall_back_or_are_refused(folder):
    """Nothing that was damaged is loaded, and no other kind of error comes out."""
    rng = random.Random(0)
    names = sorted(path.name for path in folder.iterdir())
    pristine = contents(folder)
    good = {n: training_state_of(folder, n) for n in (1, 2)}
    outcomes = {"before": 0, "refused": 0}
    for _ in range(3000):
        victim = rng.choice(names)
        data = mutated(pristine[victim], rng)
        if data == pristine[victim]:
            continue
        (folder / victim).write_bytes(data)
        if victim == "replay-0-30.f32":  # both need it
            with pytest.raises(ValueError, match="cannot be used"):
                newest(folder)
            outcomes["refused"] += 1
        else:
            checkpoint, damaged = newest(folder)
            whole = 1 if victim.startswith(("000002", "replay-30")) else 2
            assert (checkpoint.number, len(damaged)) == (whole, 2 - whole)
            assert_same(checkpoint.state, good[whole])
            outcomes["before"] += whole == 1
        (folder / victim).write_bytes(pristine[victim])
    assert min(outcomes.values()) > 300
    assert contents(folder) == pristine


def training_state_of(folder, number):
    return torch.load(folder / f"{number:06d}.pt", weights_only=True)


def mutated(data, rng):
    kind = rng.randrange(5)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        return data + rng.randbytes(rng.randrange(1, 100))
    at = rng.randrange(len(data))
    if kind == 2:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    size = rng.randrange(1, 600)
    if kind == 3:
        return data[:at] + bytes(len(data[at : at + size])) + data[at + size :]
    return data[:at] + data[at + size :]
