"""The report of a comparison: tidy results in, one HTML page, Markdown and figures out.

    python -m scripts.report RESULTS [--out DIR]

RESULTS are CSV files (also .csv.gz, .csv.xz) or folders of them, one row an evaluation episode,
from whatever tool, with the columns

    run, env, algo, seed, scheme, step, episode, return   and, optionally, variant

`scheme` names the policy evaluated: `last` or an average of the same run. A `runs.json` or
`runs.csv` beside the results lists the planned runs (run, env, algo, seed, variant, status, and
where known seconds and config), so that crashed and missing runs are told, not dropped. Runs of the
registered study are recognised by their settings and seeds, and analysed as it says; all else is
called exploratory.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from scripts.experiment.replay import replay
from scripts.experiment.report import write_report
from scripts.experiment.schemes import PRIMARY
from scripts.experiment.terminal import command_line


@dataclass(frozen=True)
class Options:
    """What to report and where."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """CSV files in the tidy columns (also .csv.gz, .csv.xz), or folders of them"""
    out: Path | None = None
    """folder for report.html, report.md and figures/ (default: the first results' folder)"""
    primary: str = PRIMARY.name
    """the scheme that is compared with last; the registered study has its own"""
    random_score: float | None = None
    """score of a uniformly random policy in the results' one environment: what 0 is"""
    reference_score: float | None = None
    """score of a good policy there: what 1 is"""
    left_out: tuple[int, ...] = ()
    """cells of the registered study that will not be run, the last ones: nothing of the study is
    compared before all others have ended"""


@command_line("report", Options, __doc__)
def main(options: Options) -> int:
    """Write the report, and print where its page is."""
    scores = options.random_score, options.reference_score
    print(
        write_report(
            options.results, options.out, options.primary, *scores, replay, options.left_out
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
