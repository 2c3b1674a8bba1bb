"""A disk for tests: it counts what changes it, fails when it is told to, and loses its power."""

import builtins
import contextlib
import errno
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Tree = dict[str, bytes | None]
"""Name -> content; None: a folder."""


class Disk:
    """The part of the file system under a folder, as one process writes to it.

    Every call that changes something there, or brings it to the disk, is counted: opening for
    writing, write, fsync, rename, unlink, mkdir, rmdir. What is there already has been synced.

    Args:
        root: The folder.
        before: Called with the number of a call, from 1, and its name; what it raises, the call
            raises, and a write has written half.

    Attributes:
        calls: What was called.
        killed: What is there if the process is killed, at each call, before it and in the middle of
            each write; equal ones once.
        lost: What is there if the power fails then: all names, and of each file what it was at its
            last fsync.
    """

    def __init__(self, root: Path, before: Callable[[int, str], None] | None = None) -> None:
        self.root, self.before = root, before
        self.calls: list[str] = []
        files = [path for path in root.rglob("*") if path.is_file()]
        self.synced = {path.stat().st_ino: path.read_bytes() for path in files}  # by inode
        self.killed: dict[str, Tree] = {}
        self.lost: dict[str, Tree] = {}

    def call(self, name: str) -> None:
        """Count a call that is about to be made."""
        self.calls.append(name)
        if self.before:
            self.before(len(self.calls), name)
        else:
            self.remember()

    def remember(self) -> None:
        """Note what would be left of all if everything ended now."""
        killed: Tree = {}
        lost: Tree = {}
        for path in sorted(self.root.rglob("*")):
            name = str(path.relative_to(self.root))
            if path.is_dir():
                killed[name] = lost[name] = None
            else:
                killed[name] = path.read_bytes()
                lost[name] = self.synced.get(path.stat().st_ino, b"")
        self.killed.setdefault(_digest(killed), killed)
        self.lost.setdefault(_digest(lost), lost)

    @contextlib.contextmanager
    def mounted(self) -> Iterator["Disk"]:
        """Inside, all that Python writes under the root goes through here."""
        real_open, real_os_open = io.open, os.open
        with pytest.MonkeyPatch.context() as patch:

            def open_(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
                if set(mode) & set("wax+") and self._is_here(file):
                    return self._open(file, mode, *args, **options)
                return real_open(file, mode, *args, **options)

            def os_open(path: Any, flags: int, *args: Any, **options: Any) -> int:
                if flags & (os.O_WRONLY | os.O_RDWR) and self._is_here(path):
                    self.call("open")
                return real_os_open(path, flags, *args, **options)

            patch.setattr(builtins, "open", open_)
            patch.setattr(io, "open", open_)
            patch.setattr(os, "open", os_open)
            for name in ("replace", "unlink", "mkdir", "rmdir", "fsync"):
                patch.setattr(os, name, self._counted(name, getattr(os, name)))
            yield self

    def _open(self, file: Any, mode: str, buffering: int = -1, *text: Any, **options: Any) -> Any:
        exists = os.path.exists(file)
        opener = options.pop("opener", None)
        if opener is None:
            self.call("open")
        raw = _File(file, mode.replace("t", "").replace("b", ""), opener=opener)
        raw.disk = self
        if not exists:
            self.synced.pop(os.fstat(raw.fileno()).st_ino, None)  # another file had it
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *text, **options)

    def _counted(self, name: str, real: Any) -> Any:
        def call(target: Any, *args: Any, **options: Any) -> Any:
            here = "dir_fd" in options or self._is_here(target)
            if here:
                self.call(name)
            result = real(target, *args, **options)
            if here and name == "fsync":
                path = Path(os.readlink(f"/proc/self/fd/{target}"))
                if path.is_file():
                    self.synced[os.fstat(target).st_ino] = path.read_bytes()
            return result

        return call

    def _is_here(self, target: Any) -> bool:
        if isinstance(target, int):
            target = os.readlink(f"/proc/self/fd/{target}")
        return Path(os.path.abspath(target)).is_relative_to(self.root)


class _File(io.FileIO):
    disk: Disk

    def write(self, data: Any) -> int:
        data = bytes(data)
        half = len(data) // 2
        try:
            self.disk.call("write")
        finally:  # what fails has written half
            super().write(data[:half])
        if half and not self.disk.before:
            self.disk.remember()
        return half + (super().write(data[half:]) or 0)


class Fault:
    """For `Disk`: fails at a call with an error, once or from then on."""

    def __init__(self, at: int, number: int, *, stays: bool) -> None:
        self.at, self.number, self.stays = at, number, stays

    def __call__(self, call: int, name: str) -> None:
        """A full disk can be emptied, one that is read-only cannot."""
        grows = name in ("open", "write", "fsync", "mkdir", "replace")
        due = call == self.at or (self.stays and call > self.at)
        if due and (grows or self.number == errno.EROFS):
            raise OSError(self.number, os.strerror(self.number))


def lay_out(tree: Tree, root: Path) -> None:
    """Make a folder that holds what a disk remembered."""
    root.mkdir(parents=True)
    for name, content in tree.items():
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)


def _digest(tree: Tree) -> str:
    """What tells trees apart: all but random names and the curves, which nothing reads back."""
    found = hashlib.sha256()
    for name, content in tree.items():
        name = re.sub(r"\.[0-9a-f]{16}\.partial", ".partial", name)
        curves = "tfevents" in name
        found.update(repr((name, None if curves else content)).encode())
    return found.hexdigest()
