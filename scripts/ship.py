"""Choose which weights of a finished run to hand over, and say what they are worth.

    python -m scripts.ship runs/RUN
    python -m scripts.ship runs/RUN --episodes 200 --criterion cvar
    python -m scripts.ship runs/RUN --folder runs/hand-over

Candidates are the last iterate, tails of 5, 10, 25 and 50 % of the run, an EMA, the target actor
where there is one, and nine windows of 5 % for the checkpoints of the last half. They are chosen on
some episodes and valued on others (`polyak_rl.choose`); no call plays an episode of an earlier one.
In the run's folder are then shipped.pt, which scripts.enjoy plays, and shipped.json.
"""

import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polyak_rl.choose import Choice, mean_of_worst
from scripts.experiment.card import hand_over, new_folder
from scripts.experiment.finished import FinishedRun, read
from scripts.experiment.locks import Hold
from scripts.experiment.shipping import Criterion, ship
from scripts.experiment.terminal import command_line


@dataclass(frozen=True)
class Options:
    """Choose the weights of a finished run to hand over."""

    run: tyro.conf.Positional[Path]
    """the run's folder"""
    episodes: int = 60
    """episodes to choose with, over all candidates; two thirds as many, at least 40, value each of
    winner, tail25 and last. 0: tail25, unseen"""
    criterion: Criterion = "mean"
    """mean return, or that of the worst quarter of the episodes (conditional value at risk)"""
    again: int | None = None
    """the number of an earlier call, to play its episodes once more"""
    folder: Path | None = None
    """make a folder with what others need to play the policy, and a model card"""
    trust: bool = False
    """import the module that the run's environment names, as in my_module:My-v0"""


@command_line("ship", Options, __doc__)
def main(options: Options) -> int:
    """Choose the weights, and show which, among what, and what could not be a candidate."""
    torch.set_num_threads(1)
    run = read(options.run, trust=options.trust)
    if options.folder:
        new_folder(options.folder)
    with closing(Hold()) as held:
        held.take(run.path)
        choice = ship(run, options.episodes, options.criterion, options.again, held.check)
        if options.folder:
            hand_over(run, options.folder)
    Console().print(table(run, choice))
    print(choice)
    for name, why in run.choice["left_out"].items():
        print(f"note: {name} is no candidate: {why}", file=sys.stderr)
    print(f"Written: {options.folder or run.path / 'shipped.pt'}")
    return 0


def table(run: FinishedRun, choice: Choice) -> Table:
    """How each candidate did on the episodes that it was chosen on, and on fresh ones."""
    call = run.choice["call"]
    shown = Table("policy", title=f"{escape(run.path.name)}, call {call}")
    what = "mean" if choice.worst == 1 else f"worst {choice.worst:.0%}"
    for heading in ("episodes", f"choosing: {what}", f"fresh: {what}", "fresh: worst 10%"):
        shown.add_column(heading, justify="right")
    for name in [*choice.choosing] or [choice.winner]:
        row = choice.choosing.get(name, ())
        cells = [f"{len(row)}", f"{mean_of_worst(row, choice.worst):.1f}" if row else ""]
        if name in choice.valuing:
            cells += [f"{choice.value(name):.1f}", f"{choice.value(name, worst=0.1):.1f}"]
        style = "bold" if name == choice.winner else None
        shown.add_row(name, *cells, style=style)
    return shown


if __name__ == "__main__":
    sys.exit(main())
