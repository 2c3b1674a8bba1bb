"""Write a file whole: it is there with all of its content or not at all, also after a power cut."""

from __future__ import annotations

import errno
import os
import secrets
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def write_whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to, which takes its place when the block ends without an exception.

    What is written goes beside its place, under a name of its own that ends in ``.partial``; it is
    flushed to the disk, renamed, and the folder is flushed too. Until the rename whoever reads the
    place finds the file of before. After any exception, KeyboardInterrupt included, that file is
    untouched and the partial one is gone; only a process that is killed leaves it behind. Symbolic
    links are never written through: one at the place itself is replaced.

    Args:
        path: the file. Its folder must be there.

    Raises:
        OSError: it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     place = Path(folder, "numbers")
        ...     with write_whole(place) as file:
        ...         _ = file.write(b"1 2 ")
        ...         _ = file.write(b"3")
        ...         print(place.exists())
        ...     print(place.read_bytes())
        False
        b'1 2 3'
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:  # which follows no link: x is O_CREAT | O_EXCL
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch's writer hides it behind an error of its own
        raise
    _sync_folder(path.parent)


def remove_partial(folder: str | os.PathLike[str]) -> None:
    """Remove what writers of :func:`write_whole` that were killed have left in a folder.

    Args:
        folder: one that nobody writes to now; what is in its folders stays.

    Raises:
        OSError: something cannot be removed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "numbers.0123456789abcdef.partial").touch()
        ...     Path(folder, "film.partial").touch()
        ...     remove_partial(folder)
        ...     print(*(path.name for path in Path(folder).iterdir()))
        film.partial
    """
    for path in Path(folder).glob(f"*.{'[0-9a-f]' * 16}.partial"):
        path.unlink(missing_ok=True)


def verify_archive(path: str | os.PathLike[str]) -> None:
    """Compare what a file of ``torch.save`` holds with the checksums that are in it.

    ``torch.load`` does not. Nothing of the content is parsed.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, or it has changed since it was written.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type]
            damaged = packed[0] if packed else archive.testzip()
    except Exception as error:  # bytes that are no such file raise anything, EINVAL among it
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ValueError(
            f"{os.fspath(path)} is damaged, or no file of torch.save: {error}"
        ) from error
    if damaged:
        raise ValueError(f"{os.fspath(path)} is damaged: the checksum of {damaged!r} does not fit")


def _sync_folder(folder: Path) -> None:
    """Flush a folder to the disk, so that the new name in it outlives a power cut too."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # a file system that cannot
            raise
    finally:
        os.close(descriptor)
