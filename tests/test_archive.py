"""What torch.save wrote is read back as it was, or not at all."""

import random
import shutil

import pytest
import torch
from torch import nn

from polyak_rl import Tail, Timeline
from polyak_rl.files import verify_archive
from scripts import posthoc, train
from tests.disk import Disk
from tests.test_checkpoint import assert_same, mutated
from tests.test_resume import COMMAND


def timeline_of(policy):
    timeline = Timeline(policy, capacity=20, expected=40)
    for step in range(40):
        nn.init.constant_(policy.weight, step)
        timeline.record()
    return timeline


@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.full)])
def test_a_mutated_timeline_is_refused_or_has_the_numbers_that_were_written(count, tmp_path):
    policy, path = nn.Linear(5, 3, bias=False), tmp_path / "timeline.pt"
    timeline_of(policy).save(path)
    written, whole = Timeline.load(path, policy), path.read_bytes()
    rng, refused = random.Random(0), 0
    for _ in range(count):
        path.write_bytes(mutated(whole, rng))
        try:
            found = Timeline.load(path, policy)
        except ValueError:
            refused += 1
            continue
        assert (found.clock, found.capacity) == (written.clock, written.capacity)
        assert torch.equal(found.vector(Tail(0.5)), written.vector(Tail(0.5)))
    assert 0.6 * count < refused < count  # others change what lies between the files


def test_the_damaged_file_in_the_archive_is_named(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.full((1000,), 1.5)}, path)
    verify_archive(path)
    data = bytearray(path.read_bytes())
    data[data.index(b"\x00\x00\xc0\x3f" * 9)] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["weight"].unique().numel() == 2  # torch says nothing
    with pytest.raises(ValueError, match=r"weights.pt is damaged: the checksum of '.*data/0'"):
        verify_archive(path)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="is damaged, or no file of torch"):
        verify_archive(path)
    with pytest.raises(FileNotFoundError):
        verify_archive(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    assert train.main([*COMMAND, "--runs-dir", str(runs)]) == 0
    (folder,) = runs.iterdir()
    return folder


def test_a_small_file_that_declares_a_large_timeline_takes_no_memory(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    state = torch.load(folder / "timeline.pt", weights_only=True)
    torch.save(state | {"capacity": 2**25}, folder / "timeline.pt")
    assert posthoc.main([str(folder), "--episodes", "2"]) == 2
    assert "33554432 segments of" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["policy.pt", "timeline.pt"])
def test_a_finished_run_whose_files_were_damaged_is_repaired_from_its_checkpoint(
    name, finished, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    assert train.main(["--resume", str(folder)]) == 0
    assert "Resumed at step 300." in capsys.readouterr().out
    assert_same(*(torch.load(run / name, weights_only=True) for run in (folder, finished)))
    assert train.main(["--resume", str(folder)]) == 0
    assert "has finished" in capsys.readouterr().out


class Full:
    """A disk that is full from a call on."""

    def __init__(self, at):
        self.at = at

    def __call__(self, call, name):
        if call >= self.at and name != "unlink":
            raise OSError(28, "No space left on device")


def test_a_full_disk_is_an_error_of_the_disk_wherever_tensors_are_written(tmp_path):
    """torch's writer hides it behind a RuntimeError of its own."""
    policy = nn.Linear(300, 300, bias=False)
    timeline = timeline_of(policy)
    with Disk(tmp_path).mounted() as disk:
        timeline.save(tmp_path / "timeline.pt")
    assert len(disk.calls) > 5
    for at in range(1, len(disk.calls) + 1):
        root = tmp_path / str(at)
        root.mkdir()
        with Disk(root, Full(at)).mounted(), pytest.raises(OSError, match="No space left"):
            timeline.save(root / "timeline.pt")
        assert [*root.iterdir()] == [root / "timeline.pt"] * (at == len(disk.calls))
