"""Weights & Biases, which reads TensorBoard's events itself: here it is only begun and ended."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensorboard.summary.writer import event_file_writer  # type: ignore[import-untyped]


def require_wandb() -> None:
    """Raise ValueError where wandb is not installed; the folder that it leaves is no package."""
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:
        raise ValueError("--track wandb needs wandb, which is not installed: pip install wandb")


def begin(folder: Path, config: Mapping[str, Any]) -> None:
    """Begin a run of wandb's, before the folder has events: it leaves out what is older.

    Here and below, a run goes on without what wandb fails to do.
    """
    with _never_in_the_way():
        wandb = importlib.import_module("wandb")
        wandb.tensorboard.patch(root_logdir=str(folder.resolve()))
        wandb.init(name=folder.name, config=dict(config))


def follow(folder: Path) -> None:
    """Let wandb, where it was begun, read the events that are going to be in a folder."""
    with _never_in_the_way():
        if _under_way():  # it looks where a writer of TensorBoard's own is made
            event_file_writer.EventFileWriter(str(folder.resolve())).close()


def end(code: int) -> None:
    """End what was begun, if anything, with the exit code of the run."""
    with _never_in_the_way():
        if wandb := _under_way():
            wandb.finish(exit_code=code)


def _under_way() -> Any:
    wandb: Any = sys.modules.get("wandb")
    return wandb if wandb and getattr(wandb, "run", None) else None


@contextmanager
def _never_in_the_way() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # it raises anything
        print(f"warning: wandb: {type(error).__name__}: {error}", file=sys.stderr)
