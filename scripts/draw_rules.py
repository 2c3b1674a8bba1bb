"""Draw how much each rule weighs the iterates of a run.

python -m scripts.draw_rules --rule uniform --rule tail:0.5 --out rules.png
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import tyro
from matplotlib.figure import Figure

from polyak_rl import parse_rule
from scripts.experiment.paths import make_folder
from scripts.experiment.terminal import command_line

UPDATES = 2_000
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7")  # Okabe and Ito


@dataclass(frozen=True)
class Options:
    """Which rules to draw, and where to."""

    rule: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """a rule, with periods in gradient steps of a run of 2000; repeat it for several"""
    out: Path = Path("runs/rules.png")
    """the picture; its ending says the format"""


DEFAULT = ("uniform", "tail:0.5", "polynomial:3", "power:sigma_rel=0.1", "ema:half_life=100")


@command_line("draw_rules", Options, __doc__)
def main(options: Options) -> int:
    """Draw the rules to a file."""
    figure = draw(options.rule or DEFAULT)
    if options.out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"out must end in .png, .svg or .pdf, got {options.out}")
    make_folder(options.out.parent)
    figure.savefig(options.out, dpi=200)
    print(f"Written: {options.out}")
    return 0


def draw(rules: Sequence[str]) -> Figure:
    """Weights over the run, as density: 1 is what the uniform average gives to each iterate."""
    matplotlib.rcParams.update({"font.size": 10, "svg.hashsalt": "rules"})
    figure = Figure(figsize=(7.0, 3.2), layout="constrained")
    axes = figure.subplots()
    share = [100 * (j + 0.5) / UPDATES for j in range(UPDATES)]
    for i, text in enumerate(rules):
        density = [UPDATES * weight for weight in parse_rule(text).weights(UPDATES)]
        axes.plot(share, density, color=COLORS[i % len(COLORS)], linewidth=1.8, label=text)
    axes.set(xlim=(0, 100), ylim=(0, 14), xlabel="part of the run (%)", ylabel="relative weight")
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
