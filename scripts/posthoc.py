"""Evaluate any average of a finished run, chosen afterwards.

    python -m scripts.posthoc runs/RUN --rule tail:0.3 --rule ema:half_life=2000

The run's timeline answers for every rule without training again; names of schemes (window80, ema1)
and what was shipped can be asked for too. All policies play the same episodes, which are neither
those of the run's own evaluations nor those of an earlier call. The spread is over the episodes of
this one run: whether averaging helps is a question for several runs (`scripts.compare`).
"""

import csv
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from io import StringIO
from itertools import repeat
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from agents.networks import stack_members
from polyak_rl.files import write_whole
from scripts.experiment.episodes import first_episode, note_call, seeds_of
from scripts.experiment.finished import FinishedRun, read
from scripts.experiment.locks import Hold
from scripts.experiment.terminal import command_line


@dataclass(frozen=True)
class Options:
    """Evaluate averages of a finished run; rules count in gradient steps."""

    run: tyro.conf.Positional[Path]
    """the run's folder"""
    rule: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """uniform, uniform:start=5000, tail:0.3, ema:half_life=2000, ..., a scheme, or shipped; repeat
    it for several; none: tail:0.25"""
    episodes: int = 100
    """episodes for each"""
    again: int | None = None
    """the number of an earlier call, to play its episodes once more"""
    trust: bool = False
    """import the module that the run's environment names, as in my_module:My-v0"""


@command_line("posthoc", Options, __doc__)
def main(options: Options) -> int:
    """Evaluate the averages, write their returns to the run's folder, and show a table."""
    if options.episodes < 2:
        raise ValueError(f"episodes must be at least 2, got {options.episodes}")
    run = read(options.run, trust=options.trust)
    with closing(Hold()) as held:
        held.take(run.path)
        first = first_episode(run.path, options.again)
        numbers = range(first, first + options.episodes)
        returns = evaluate(run, options.rule or ("tail:0.25",), numbers)
        held.check()
        call = note_call(run.path, "posthoc", first, len(numbers))
        path = run.path / "posthoc.csv"
        text = StringIO()
        lines = csv.writer(text)
        lines.writerow(("rule", "episode", "return"))
        for rule, row in returns.items():
            lines.writerows(zip(repeat(rule), numbers, row.tolist(), strict=False))
        with write_whole(path) as file:
            file.write(text.getvalue().encode())
    Console().print(table(returns, f"{run.path.name}, call {call}"))
    print(f"Written: {path}")
    return 0


def evaluate(
    run: FinishedRun, rules: Sequence[str], episodes: range
) -> dict[str, NDArray[np.float64]]:
    """The returns of the last policy and of each rule's, on the same episodes of these numbers.

    Raises:
        ValueError: There is no timeline, a file is damaged, or a rule is wrong or too fine.
    """
    _ = run.timeline
    states = {which: run.weights(which) for which in ("last", *rules)}
    members = stack_members(run.network, list(states.values()))
    seeds = seeds_of(run.env_id, run.seed, episodes)
    with closing(run.evaluator()) as evaluator:
        result = evaluator.evaluate(members, np.tile(seeds, (len(states), 1)))
    return dict(zip(states, result.returns, strict=True))


def table(returns: dict[str, NDArray[np.float64]], name: str) -> Table:
    """Means, and paired differences from the last iterate with their standard errors."""
    policy = Column("policy", no_wrap=True)  # a rule is shown whole
    shown = Table(policy, title=f"{escape(name)}: {len(returns['last'])} common episodes")
    for heading in ("mean return", "worst", "difference from last", "standard error"):
        shown.add_column(heading, justify="right")
    for rule, row in returns.items():
        gap = row - returns["last"]
        error = gap.std(ddof=1) / np.sqrt(len(gap))
        paired = ("", "") if rule == "last" else (f"{gap.mean():+.1f}", f"{error:.1f}")
        shown.add_row(rule, f"{row.mean():.1f}", f"{row.min():.1f}", *paired)
    return shown


if __name__ == "__main__":
    sys.exit(main())
