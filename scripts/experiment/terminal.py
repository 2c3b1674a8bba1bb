"""Output that is never in the way of what is computed: what cannot be shown is not shown."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def unfailing_output() -> Iterator[None]:
    """Inside, printing raises nothing, whatever became of the terminal, the pipe or the disk.

    Nor does the interpreter when it ends: a stream that is dead is one to nowhere from then on.
    """
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and _Unfailing(stream) for stream in streams)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream:
                stream.flush()
        sys.stdout, sys.stderr = streams


class _Unfailing:
    """A text stream that swallows what it cannot write."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, or do not."""
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            self.write(text.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError):  # ValueError: it is closed
            self._lead_nowhere()
        return len(text)

    def flush(self) -> None:
        """Flush, or do not."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self._lead_nowhere()

    def isatty(self) -> bool:
        """Whether it is a terminal that is still there."""
        try:
            return bool(self.stream.isatty())
        except ValueError:
            return False

    def _lead_nowhere(self) -> None:
        """Empty what waits in its buffer, so that neither a write nor the last flush fails."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
            self.stream.flush()
