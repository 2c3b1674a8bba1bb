"""One writer a run folder at a time, whoever starts it and on whichever machine."""

import errno
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from polyak_rl.files import remove_partial
from scripts.experiment.paths import no_link

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"
"""The file in a run's folder that its writer holds; it stays there when nobody does."""
POLL = 1.0  # seconds between two looks at a lock that another process has


class HeldError(OSError):
    """Another process writes to the folder."""


class Hold:
    """Folders that this process alone writes to, until it closes them or ends, however.

    What a writer that was killed left half-written in them is removed. Where locks cannot be had,
    of a file system or an operating system, that is said once, and the run goes on without.
    """

    def __init__(self) -> None:
        self.files: dict[Path, IO[str]] = {}
        self.folders: dict[Path, int] = {}  # open, so that no other can have their inodes
        self.said = False

    def take(self, folder: Path, *, wait: bool = False) -> None:
        """Take one more folder; `wait` until a process that has it has ended, or raise.

        Raises:
            HeldError: Another process has it.
            OSError: The lock's file cannot be opened.
        """
        self.files[folder], problem = _hold(folder, wait)
        if fcntl and folder not in self.folders:
            self.folders[folder] = os.open(folder, os.O_RDONLY)
        if not problem:
            remove_partial(folder)
        elif not self.said:
            where = f"{folder} cannot be locked ({problem})"
            print(f"note: {where}: start no second process on it", file=sys.stderr)
            self.said = True

    def check(self) -> None:
        """See that the folders are still those that were taken; a lock that is gone is made anew.

        Raises:
            HeldError: A lock was removed, and another process has the folder since.
            OSError: A folder was deleted, moved or replaced.
        """
        for folder, file in [*self.files.items()]:
            if _is_there(file, folder):
                continue
            try:
                same = os.path.samestat(os.fstat(self.folders[folder]), os.stat(folder))
            except (KeyError, FileNotFoundError):
                same = False
            if not same:
                gone = "the folder was deleted, moved or replaced"
                raise OSError(errno.ENOENT, gone, str(folder))
            file.close()
            self.take(folder)

    def close(self) -> None:
        """Give the folders free."""
        for file in self.files.values():
            file.close()
        while self.folders:
            os.close(self.folders.popitem()[1])


def _hold(folder: Path, wait: bool) -> tuple[IO[str], str]:
    """A folder's lock, and why it could not be locked, or nothing."""
    said = False
    while True:
        # For writing: NFSv4 has no exclusive lock of a file that is open for reading.
        file = open(folder / LOCK, "a+", opener=no_link)  # noqa: SIM115
        try:
            problem = _lock(file)
        except BlockingIOError:
            file.seek(0)
            holder = f"{folder} is in use by another process ({file.read(80)!r})"
            file.close()
            if not wait:
                raise HeldError(holder) from None
            if not said:
                print(f"waiting: {holder}", file=sys.stderr, flush=True)
                said = True
            time.sleep(POLL)
            continue
        if _is_there(file, folder):  # else its folder was made anew between open and lock
            with suppress(OSError):  # a full disk: who holds it is for people to read
                file.truncate(0)
                os.write(file.fileno(), f"{os.getpid()} on {socket.gethostname()}".encode())
            return file, problem
        file.close()


def _lock(file: IO[str]) -> str:
    """Lock a file; why that cannot be done here, or nothing. BlockingIOError: another has it."""
    if fcntl is None:
        return "this operating system has no flock"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno == errno.EACCES:  # another name of EAGAIN
            raise BlockingIOError from error
        return error.strerror or str(error)
    return ""


def _is_there(file: IO[str], folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK))
    except FileNotFoundError:
        return False
