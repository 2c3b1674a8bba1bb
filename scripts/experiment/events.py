"""TensorBoard's event files, written here and now: no thread, no queue, no exception."""

import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from tensorboard.compat.proto.event_pb2 import (  # type: ignore[import-untyped]
    Event,
    SessionLog,
)
from tensorboard.summary.writer.record_writer import (  # type: ignore[import-untyped]
    RecordWriter,
)
from torch.utils.tensorboard import summary as untyped_summary

from scripts.experiment import tracking
from scripts.experiment.paths import own_folder

summary: Any = untyped_summary
"""What makes summaries, of torch."""
PATTERN = "events.out.tfevents.*"
FLUSH_EVERY = 10  # seconds between two writes, for who looks on


class EventFile:
    """A new event file in a folder, after those that are there.

    TensorBoard reads the files of a folder in the order of their names, which begin with a second:
    a file gets one later than all before it, also where the clock was set back. Curves are there to
    be looked at: where they cannot be written, that is said once, and the run goes on without.
    What earlier files have of steps after `resume_at` is hidden.
    """

    def __init__(self, folder: Path, resume_at: int | None = None) -> None:
        self.folder = folder
        self.file: BinaryIO | None = None
        self.flushed_at = time.monotonic()
        try:
            own_folder(folder)
            tracking.follow(folder)
            name = f"{PATTERN[:-1]}{_next_second(folder):010d}.{socket.gethostname()}.{os.getpid()}"
            self.file = (folder / name).open("xb")
        except OSError as error:
            self._give_up(error)
        self._write(Event(file_version="brain.Event:2"))
        if resume_at is not None:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(step=resume_at + 1, session_log=start))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Add a point to a curve."""
        self.add(summary.scalar(tag, value), step)
        if time.monotonic() - self.flushed_at > FLUSH_EVERY:
            self.flush()

    def add(self, entry: Any, step: int = 0) -> None:
        """Add what `summary` made."""
        self._write(Event(summary=entry, step=step))

    def flush(self, *, sync: bool = False) -> None:
        """Hand what was added to the system, and with `sync` to the disk."""
        self.flushed_at = time.monotonic()
        try:
            if self.file:
                self.file.flush()
            if self.file and sync:
                os.fsync(self.file.fileno())
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Close the file."""
        self.flush()
        if self.file:
            self.file.close()
            self.file = None

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        try:
            if self.file:
                RecordWriter(self.file).write(event.SerializeToString())
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        print(f"warning: no more curves in {self.folder}: {error}", file=sys.stderr)
        file, self.file = self.file, None
        if file:
            with suppress(OSError):  # it tries to write once more
                file.close()


def _next_second(folder: Path) -> int:
    names = [path.name.removeprefix(PATTERN[:-1]) for path in folder.glob(PATTERN)]
    seconds = [name.partition(".")[0] for name in names]
    latest = max((int(second) for second in seconds if second.isdecimal()), default=0)
    return max(int(time.time()), latest + 1)
