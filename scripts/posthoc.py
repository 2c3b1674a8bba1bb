"""Evaluate any average of a finished run, chosen afterwards.

    python -m scripts.posthoc runs/RUN --rule tail:0.3 --rule ema:half_life=2000

The run's timeline answers for every rule without training again. All policies play the same
episodes, which are not those of the run's own evaluations. The spread is over the episodes of this
one run: whether averaging helps is a question for several runs (`scripts.compare`).
"""

import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from agents.environments import interface, make_env
from agents.evaluation import Evaluator
from agents.networks import stack_members
from agents.seeding import Purpose, evaluation_seeds
from polyak_rl import Timeline, parse_rule
from polyak_rl.files import write_whole
from scripts.enjoy import load_policy
from scripts.experiment.terminal import unfailing_output


@dataclass(frozen=True)
class Options:
    """Evaluate averages of a finished run; rules count in gradient steps."""

    run: tyro.conf.Positional[Path]
    """the run's folder"""
    rule: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """uniform, uniform:start=5000, tail:0.3, ema:half_life=2000, ...; repeat it for several"""
    episodes: int = 100
    """episodes for each"""
    trust: bool = False
    """import the module that the run's environment names, as in my_module:My-v0"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    with unfailing_output():
        prog = "python -m scripts.posthoc"
        return command(tyro.cli(Options, args=argv, prog=prog, description=__doc__))


def command(options: Options) -> int:
    """Do what a command line asks for; returns the exit code."""
    try:
        if options.episodes < 2:
            raise ValueError(f"episodes must be at least 2, got {options.episodes}")
        rules = options.rule or ("tail:0.5",)
        returns = evaluate(options.run, rules, options.episodes, trust=options.trust)
        path = options.run / "posthoc.csv"
        text = StringIO()
        lines = csv.writer(text)
        lines.writerow(("rule", "episode", "return"))
        for rule, row in returns.items():
            lines.writerows((rule, i, float(value)) for i, value in enumerate(row))
        with write_whole(path) as file:
            file.write(text.getvalue().encode())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console().print(table(returns, options.run))
    print(f"Written: {path}")
    return 0


def evaluate(
    run: Path, rules: Sequence[str], episodes: int, *, trust: bool = False
) -> dict[str, NDArray[np.float64]]:
    """The returns [episodes] of the last policy and of each rule's, on the same episodes.

    Args:
        run: The run's folder.
        rules: As `parse_rule` takes them.
        episodes: For each.
        trust: As in `load_policy`.

    Raises:
        ValueError: No finished run with a timeline is there, or a rule is wrong or too fine.
    """
    averages = {text: parse_rule(text) for text in rules}
    trained = load_policy(run, trust=trust)
    policy = trained.policy
    if not (run / "timeline.pt").is_file():
        raise ValueError(f"{run} has no timeline.pt: it was trained without one, or has not ended")
    size = (run / "timeline.pt").stat().st_size
    # At least half of its segments are full, in float32; of a short run, fewer, but of little.
    timeline = Timeline.load(run / "timeline.pt", policy, max_bytes=max(8 * size, 1 << 30))
    states: dict[str, Mapping[str, Tensor]] = {"last": dict(policy.named_parameters())}
    states |= {text: timeline.average(rule) for text, rule in averages.items()}

    env = make_env(trained.env_id, trained.wrap)
    spaces = interface(env.observation_space, env.action_space, trained.algo)
    limits = (trained.wrap, trained.max_steps)
    evaluator = Evaluator(trained.env_id, spaces, "cpu", *limits)
    seeds = evaluation_seeds(trained.env_id, trained.seed, episodes, Purpose.POSTHOC)
    members = stack_members(policy, list(states.values()))
    result = evaluator.evaluate(members, np.tile(seeds, (len(states), 1)))
    evaluator.close()
    env.close()
    return dict(zip(states, result.returns, strict=True))


def table(returns: dict[str, NDArray[np.float64]], run: Path) -> Table:
    """Means, and paired differences from the last iterate with their standard errors."""
    shown = Table("policy", title=f"{escape(run.name)}: {len(returns['last'])} common episodes")
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
