"""The comparison's jobs on a Ray cluster, in place of processes on this machine.

    python -m scripts.compare --tier l --ray auto --out /shared/compare

Every job is one task of Ray, which queues them, places them and starts a task again whose machine
was lost; there it goes on from the job's last checkpoint, and waits for the first try where that
one still writes. Tasks and driver talk through files, as processes on one machine do: this
checkout, its environment and `--out` must have the same paths on every machine. What a job computes
is what it computes locally, byte for byte on CPUs of one kind.
"""

import contextlib
import functools
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from polyak_rl.files import write_whole
from scripts.experiment import __main__ as worker
from scripts.experiment.driver import errors_file, job_file
from scripts.experiment.jobs import Job

# Before the import, which reads them.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning

try:
    import ray
    from ray.exceptions import RayError
except ImportError as error:
    raise ImportError("--ray needs Ray: pip install -c constraints.txt --group ray") from error

RETRIES = 5  # of a job that loses its machine; an error of the job itself is final
OBJECT_STORE = 100_000_000  # bytes; tasks return nothing
GRACE = 30  # seconds for cancelled tasks to end


@contextlib.contextmanager
def connected(
    address: str, workers: int, num_cpus: float, num_gpus: float
) -> Iterator[Callable[[Job, Path], "Task"]]:
    """Connect to Ray, and leave it in the end; a cluster that was begun here ends with it.

    The arguments are those of `jobs.Options`.

    Yields:
        What begins a job.

    Raises:
        ConnectionError: There is no cluster at the address, or none that this Ray can join.
    """
    own: dict[str, Any] = {}
    if address == "local":
        own = {"num_cpus": workers * num_cpus, "object_store_memory": OBJECT_STORE}
        own["include_dashboard"] = False
    try:
        host, _, port = address.rpartition(":")
        if port.isdigit() and "//" not in host:  # Ray would try for minutes
            socket.create_connection((host, int(port)), timeout=GRACE).close()
        ray.init(address, logging_level=logging.WARNING, **own)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConnectionError(f"there is no Ray to join at {address!r}: {error}") from error
    remote = ray.remote(
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        max_retries=RETRIES,
        retry_exceptions=False,
        max_calls=1,  # a process of its own for each job
    )(work)
    try:
        yield functools.partial(Task, remote, max(1, int(num_cpus)))
    finally:
        ray.shutdown()


class Task:
    """A job on Ray, with what `scripts.compare.execute` asks of a process."""

    def __init__(self, remote: Any, processes: int, job: Job, out: Path) -> None:
        out = out.absolute()
        self.errors = errors_file(job, out)
        self.ref = remote.remote(job_file(job, out), out / "runs", processes)

    def poll(self) -> int | None:
        """None as long as the task waits or runs, then 0, or 1 if it failed."""
        done, _ = ray.wait([self.ref], timeout=0)
        if not done:
            return None
        try:
            ray.get(self.ref)
        except RayError as error:
            with write_whole(self.errors) as file:
                file.write(f"{error}\n".encode())
            return 1
        return 0

    def terminate(self) -> None:
        """Cancel the task, at once and for good."""
        ray.cancel(self.ref, force=True)

    def wait(self) -> None:
        """Wait until a cancelled task has ended."""
        ray.wait([self.ref], timeout=GRACE)


def work(record: Path, out: Path, processes: int = 1) -> None:
    """Do the job of a file on whichever machine this is, in no more processes than it was given."""
    if not record.exists():
        raise FileNotFoundError(
            f"{record} is not there on {socket.gethostname()}: --out must lie on storage that all "
            "machines share, at the same path"
        )
    worker.main([str(record), str(out), "--eval-processes", str(processes)])
