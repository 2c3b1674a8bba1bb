"""Do the job of a file: `python -m scripts.experiment JOB.json OUT`, which `compare` starts."""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from agents.malloc import keep_freed_memory
from scripts.experiment import measurement
from scripts.experiment.jobs import read_job
from scripts.experiment.paths import no_link
from scripts.experiment.terminal import unfailing_output


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job of a file; the step reached is kept in `<first run>/progress`."""
    parser = argparse.ArgumentParser("python -m scripts.experiment", description=__doc__)
    parser.add_argument("job", type=Path, help="the file of a job, as compare writes it")
    parser.add_argument("out", type=Path, help="the folder of run folders")
    parser.add_argument("--eval-processes", type=int, help="as in scripts.train")
    asked = parser.parse_args(argv)
    with unfailing_output():
        try:
            job = read_job(asked.job)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        set_up = measurement.set_up
        if job.algo == "ppo":
            from scripts.experiment import ppo  # which takes seconds, and may not be installed

            set_up = ppo.set_up
        torch.set_num_threads(1)
        keep_freed_memory()
        progress = asked.out / job.run_names()[0] / "progress"

        def report(step: int) -> None:
            with contextlib.suppress(OSError), open(progress, "w", opener=no_link) as file:
                file.write(str(step))

        measurement.run(job, asked.out, report, set_up, asked.eval_processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
