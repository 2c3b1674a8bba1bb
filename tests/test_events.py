import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts import train
from scripts.experiment import events
from scripts.experiment.events import EventFile
from tests.test_resume import COMMAND


def curve(folder):
    found = EventAccumulator(str(folder)).Reload().Scalars("x")
    return [(point.step, point.value) for point in found]


def write(folder, points, **options):
    file = EventFile(folder, **options)
    for step in points:
        file.scalar("x", step / 2, step)
    file.close()


@pytest.mark.parametrize("by", [0, -3600, 3600])
def test_a_later_file_comes_after_the_earlier_ones_whatever_the_clock_says(
    by, tmp_path, monkeypatch
):
    write(tmp_path, [1, 2, 3])
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + by)
    write(tmp_path, [3, 4, 5, 6], resume_at=2)  # what came after step 2 is taken back
    write(tmp_path, [5], resume_at=4)
    assert curve(tmp_path) == [(step, step / 2) for step in range(1, 6)]


def test_odd_names_beside_it_are_no_obstacle(tmp_path):
    for name in ("", "x", "9", "99999999999999999999.1", "-1"):
        (tmp_path / f"events.out.tfevents.{name}").touch()
    write(tmp_path, [1])
    assert len([*tmp_path.iterdir()]) == 6


class Full:
    """A file on a disk that is full."""

    def write(self, *data):
        raise OSError(28, "No space left on device")

    flush = close = write


def test_curves_that_cannot_be_written_are_one_warning_and_the_run_is_the_same(
    tmp_path, monkeypatch, capsys
):
    assert train.main([*COMMAND, "--runs-dir", str(tmp_path / "whole")]) == 0
    capsys.readouterr()

    class Broken(EventFile):
        def scalar(self, tag, value, step):
            if step >= 100 and self.file:
                self.file.close()
                self.file = Full()
            super().scalar(tag, value, step)

    with monkeypatch.context() as patch:
        patch.setattr("scripts.experiment.run_folder.EventFile", Broken)
        assert train.main([*COMMAND, "--runs-dir", str(tmp_path / "full")]) == 0
    warnings = capsys.readouterr().err.splitlines()
    (whole,), (full,) = ([*(tmp_path / name).iterdir()] for name in ("whole", "full"))
    reason = "[Errno 28] No space left on device"
    assert sorted(warnings) == [
        f"warning: no more curves in {full / 'averages'}: {reason}",
        f"warning: no more curves in {full}: {reason}",
    ]
    for name in ("evaluations.csv", "config.json"):
        assert (whole / name).read_bytes() == (full / name).read_bytes()


def test_what_waits_is_shown_after_a_while(tmp_path, monkeypatch):
    file = EventFile(tmp_path)
    file.scalar("x", 1.0, 1)
    assert not any(path.stat().st_size for path in tmp_path.iterdir())
    monkeypatch.setattr(events, "FLUSH_EVERY", -1)
    file.scalar("x", 2.0, 2)
    assert curve(tmp_path) == [(1, 1.0), (2, 2.0)]
    file.close()
