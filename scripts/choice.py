"""What choosing the weights to ship is worth: stored episodes replayed at every budget.

    python -m scripts.choice RESULTS [--out DIR]

RESULTS are CSV files (also packed) or folders of them, as `scripts.report` reads them. Of each run
the schemes at its last step are the candidates, and of its past the stretches and checkpoints that
were evaluated there, or else the last iterate at the evaluations of the last fifth. A replay deals
the stored episodes out at random: some to choose on, the others to score. Nothing is dealt twice; a
rule that needs more episodes than are stored is left out, and the table says so.

Written are choice.png, the gain over the last iterate against the episodes spent, and choice.md.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import tyro

from scripts.experiment.choosing import BASE, curves, draw, grouped, read, text
from scripts.experiment.figures import STYLE
from scripts.experiment.paths import make_folder
from scripts.experiment.terminal import command_line
from scripts.experiment.tidy import result_files


@dataclass(frozen=True)
class Options:
    """Replay the choice of weights on stored episodes."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """CSV files or folders of them"""
    out: Path = Path("runs/choice")
    """folder for choice.md and choice.png"""
    splits: int = 50
    """random splits of a run's episodes"""


@command_line("choice", Options, __doc__)
def main(options: Options) -> int:
    """Replay, and write the figure and the tables."""
    if options.splits < 1:
        raise ValueError(f"splits must be at least 1, got {options.splits}")
    runs = read(result_files(options.results))
    groups = grouped([run for run in runs if BASE in run.returns and len(run.returns) > 1])
    if not groups:
        raise ValueError("expected runs with candidates besides the last iterate, found none")
    make_folder(options.out)
    if left_out := len(runs) - sum(len(group.runs) for group in groups):
        print(f"Left out: {left_out} runs with nothing to choose among at their last step")
    tables = [curves(group, options.splits) for group in groups]
    with matplotlib.rc_context(STYLE):
        draw(groups, tables).savefig(options.out / "choice.png", dpi=200)
    page = text(groups, tables, options.splits)
    (options.out / "choice.md").write_text(page, encoding="utf-8")
    print(f"Written: {options.out / 'choice.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
