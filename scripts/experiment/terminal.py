"""Command lines: what is wrong in one sentence, and output that is never in the way."""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import tyro

from agents.environments import EnvironmentFault

Options = TypeVar("Options")

INTERRUPTED = 130
"""The exit code of what was interrupted, as shells have it."""


def whole_numbers(argv: Sequence[str]) -> list[str]:
    """A command line with its whole numbers in digits.

    Example:
        >>> whole_numbers(["--total-steps", "1e5", "--batch-size=64.0", "--gamma", "0.9"])
        ['--total-steps', '100000', '--batch-size=64', '--gamma', '0.9']
    """
    number = re.compile(r"(--[\w.-]+=)?(\d+\.\d*|\d+(?:\.\d*)?[eE]\+?\d{1,2})")
    words = []
    for word in argv:
        found = number.fullmatch(word)
        if found and float(found[2]).is_integer():
            word = f"{found[1] or ''}{int(float(found[2]))}"
        words.append(word)
    return words


def command_line(
    name: str, kind: type[Options], description: str | None = None
) -> Callable[[Callable[[Options], int]], Callable[..., int]]:
    """Make what does a script's work, given its options, into one that takes a command line.

    Both return the exit code. What is raised is said in a sentence: with 2 as exit code where it is
    ValueError or OSError, with 1 where an environment is at fault.
    """

    def decorate(do: Callable[[Options], int]) -> Callable[..., int]:
        def main(argv: Sequence[str] | None = None) -> int:
            with unfailing_output():
                prog = f"python -m scripts.{name}"
                options = tyro.cli(kind, args=argv, prog=prog, description=description)
                try:
                    return do(options)
                except (ValueError, OSError, EnvironmentFault) as error:
                    print(f"error: {error}", file=sys.stderr)
                    return 1 if isinstance(error, EnvironmentFault) else 2

        return main

    return decorate


@contextlib.contextmanager
def stop_signals(stop: Callable[[], object] = lambda: None) -> Iterator[list[int]]:
    """Inside, Ctrl-C, SIGTERM and the end of the terminal (unless under nohup) are asked to wait.

    Args:
        stop: Called when one comes. After one, Ctrl-C or SIGTERM raises KeyboardInterrupt; the end
            of a terminal does not, since it comes twice, from the shell and from the kernel.

    Yields:
        The signals that came.
    """
    came: list[int] = []
    signals = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signals.append(signal.SIGHUP)

    def handle(number: int, frame: Any) -> None:
        came.append(number)
        stop()
        if len(came) > 1 and number in signals[:2]:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, handle) for number in signals}
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def unfailing_output() -> Iterator[None]:
    """Inside, printing raises nothing, whatever became of the terminal, the pipe or the disk.

    Nor does the interpreter when it ends: a stream that is dead is one to nowhere from then on. Who
    interrupts is told so in a word, with `INTERRUPTED` as exit code.
    """
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and _Unfailing(stream) for stream in streams)
    try:
        yield
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
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
