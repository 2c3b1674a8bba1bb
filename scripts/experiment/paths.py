"""What is written for a run stays in its folder: names are names, and no link is followed."""

import os
from pathlib import Path
from urllib.parse import quote


def folder_name(*parts: str) -> str:
    """The name of a folder for some names: other names give another one.

    Example:
        >>> folder_name("ALE/Pong-v5", "dqn", "1")
        'ALE%2FPong-v5__dqn__1'
    """
    return "__".join(quote(part, safe="").replace("__", "_%5F") for part in parts)


def beside(path: Path, name: str) -> Path:
    """The place of a plain name beside a path.

    Raises:
        ValueError: The name leads elsewhere.
    """
    if name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(f"{name!r} is not the name of a folder beside {path}")
    return path.parent / name


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, where they are not there.

    Raises:
        OSError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {folder}: {error.strerror}") from error


def own_folder(folder: Path) -> None:
    """Make a folder, and refuse one that is a link to elsewhere.

    Raises:
        OSError: It is a link, or cannot be made.
    """
    folder.mkdir(exist_ok=True)
    refuse_link(folder)


def refuse_link(path: Path) -> None:
    """Raise OSError if a path is a symbolic link."""
    if path.is_symlink():
        raise OSError(f"{path} is a symbolic link: nothing is written through it")


def no_link(path: str, flags: int) -> int:
    """An opener for `open` that follows no symbolic link."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
