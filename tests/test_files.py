import errno
import os
from pathlib import Path

import pytest

from polyak_rl.files import write_whole

STEPS = ("Path.open", "write", "os.fsync", "Path.replace")


@pytest.fixture
def place(tmp_path):
    """A file that is there already."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_takes_its_place_at_the_end_and_leaves_nothing_beside_it(place):
    with write_whole(place) as file:
        file.write(b"new")
        file.flush()
        assert place.read_bytes() == b"old"
    assert contents(place.parent) == {"file": b"new"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", STEPS)
def test_a_failure_at_any_step_leaves_the_old_file_and_no_partial_one(
    step, error, place, monkeypatch
):
    def fail(*args, **kwargs):
        raise error

    def write():
        with write_whole(place) as file:
            file.write(b"half")
            if step == "write":
                fail()

    owner, _, name = step.rpartition(".")
    if owner:
        monkeypatch.setattr({"Path": Path, "os": os}[owner], name, fail)
    with pytest.raises(type(error)):
        write()
    monkeypatch.undo()
    assert contents(place.parent) == {"file": b"old"}


def test_a_folder_in_the_way_is_refused_and_left(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError), write_whole(tmp_path / "file") as file:
        file.write(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_link_in_the_way_is_replaced_and_what_it_points_to_is_left(tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"other")
    for target in (other, tmp_path / "nowhere"):
        link = tmp_path / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with write_whole(link) as file:
            file.write(b"new")
        assert not link.is_symlink()
        assert contents(tmp_path) == {"other": b"other", "link": b"new"}


def test_a_link_where_the_partial_file_would_be_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr("polyak_rl.files.secrets.token_hex", lambda n: "0")
    other = tmp_path / "other"
    other.write_bytes(b"other")
    (tmp_path / "file.0.partial").symlink_to(other)
    with pytest.raises(FileExistsError), write_whole(tmp_path / "file") as file:
        file.write(b"new")
    assert other.read_bytes() == b"other"
    assert not (tmp_path / "file").exists()


def test_two_writers_of_one_file_do_not_mix(place):
    with write_whole(place) as one, write_whole(place) as other:
        one.write(b"one")
        other.write(b"other")
    assert contents(place.parent) == {"file": b"one"}  # which ended last


def test_file_and_folder_are_flushed_to_the_disk_in_this_order(place, monkeypatch):
    steps = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor):
        steps.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def noted_replace(self, target):
        steps.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    with write_whole(place) as file:
        file.write(b"new")
    assert steps == ["file", "rename", "folder"]


def test_a_file_system_that_cannot_flush_folders_is_no_error(place, monkeypatch):
    fsync = os.fsync

    def refuse_folders(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    with write_whole(place) as file:
        file.write(b"new")
    assert place.read_bytes() == b"new"
