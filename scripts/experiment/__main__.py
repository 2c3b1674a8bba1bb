"""Do the job of a file: `python -m scripts.experiment JOB.json OUT`, which `compare` starts."""

import sys
from pathlib import Path

import torch

from agents.malloc import keep_freed_memory
from scripts.experiment.measurement import read_job, run


def main(argv: list[str]) -> int:
    """Run the job of a file; the step reached is kept in `<first run>/progress`."""
    job_file, out = map(Path, argv)
    job = read_job(job_file)
    torch.set_num_threads(1)
    keep_freed_memory()
    progress = out / job.run_names()[0] / "progress"

    def report(step: int) -> None:
        progress.write_text(str(step))

    run(job, out, report)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
