"""Train agents beside Stable-Baselines3's own at the same settings, and draw both curves.

SAC on HalfCheetah-v5 and TD3 on Hopper-v5 by their presets, three seeds each, for 50,000 steps:
evaluated at twenty points on episodes that are the same for both libraries. About an hour and a
half on one core; a run that has ended is not made again.
"""

import csv
import dataclasses
import io
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import stable_baselines3
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from agents.denormals import flushed
from agents.environments import interface, make_env
from agents.evaluation import Evaluator
from agents.malloc import keep_freed_memory
from agents.presets import preset
from agents.seeding import evaluation_seeds
from agents.training import TrainConfig, Training
from polyak_rl.files import write_whole
from scripts.bench_cases.rivals import sb3_agent
from scripts.experiment.figures import BLUE, ORANGE, STYLE, WIDTH, thousands
from scripts.experiment.paths import make_folder
from scripts.experiment.terminal import command_line

PAIRS = (("sac", "HalfCheetah-v5"), ("td3", "Hopper-v5"))
OURS, SB3 = "polyak_rl", "Stable-Baselines3"


class Row(NamedTuple):
    """What a policy reached: the mean return of its episodes."""

    library: str
    algo: str
    env: str
    seed: int
    step: int
    score: float


@dataclass(frozen=True)
class Options:
    """Train beside Stable-Baselines3, and draw both curves."""

    out: Path = Path("runs/beside_sb3")
    """folder for returns.csv and curves.png"""
    seeds: int = 3
    """training seeds, from 1 on"""
    total_steps: int = 50_000
    """environment steps of a run"""
    points: int = 20
    """evaluations of a run, evenly spread"""
    episodes: int = 10
    """episodes in an evaluation"""


class Greedy(nn.Module):
    """A deterministic policy of Stable-Baselines3, as an evaluation asks for it: of one member."""

    def __init__(self, actor: Any) -> None:
        super().__init__()
        self.actor = actor

    def act(self, obs: Tensor) -> Tensor:
        """Actions [1, E, A] in [-1, 1] for observations [1, E, O]."""
        actions: Tensor = self.actor._predict(obs[0], deterministic=True)
        return actions.unsqueeze(0)


def train_ours(
    algo: str, env_id: str, seed: int, config: Any, steps: Sequence[int]
) -> Iterator[nn.Module]:
    """The policy at each of the steps."""
    training = Training(algo, config, TrainConfig(env_id, steps[-1], eval_every=0), (seed,))
    for step in steps:
        while training.step < step:
            training.advance()
        yield training.agent.policy
    training.close()


def train_theirs(
    algo: str, env_id: str, seed: int, config: Any, steps: Sequence[int]
) -> Iterator[nn.Module]:
    """The same of Stable-Baselines3's agent with the same settings."""
    model = sb3_agent(stable_baselines3, algo, env_id, config, seed, device="cpu")
    for step in steps:
        with flushed():
            model.learn(step - model.num_timesteps, reset_num_timesteps=False)
        yield Greedy(model.actor)


TRAIN = {OURS: train_ours, SB3: train_theirs}


def run(library: str, algo: str, env_id: str, seed: int, o: Options) -> list[Row]:
    """A run, and what it reached at each of its points."""
    with closing(make_env(env_id)) as env:
        spaces = interface(env.observation_space, env.action_space, algo)
    config = dataclasses.replace(preset(algo, env_id)[0], buffer_size=o.total_steps)
    steps = [o.total_steps * (i + 1) // o.points for i in range(o.points)]
    episodes = evaluation_seeds(env_id, seed, o.episodes)[None]
    policies = TRAIN[library](algo, env_id, seed, config, steps)
    with closing(Evaluator(env_id, spaces)) as evaluator:
        scores = [evaluator.evaluate(policy, episodes).returns.mean() for policy in policies]
    return [
        Row(library, algo, env_id, seed, step, float(score))
        for step, score in zip(steps, scores, strict=True)
    ]


def read(path: Path) -> list[Row]:
    """The rows of a file, or none."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(
                x["library"], x["algo"], x["env"], int(x["seed"]), int(x["step"]), float(x["score"])
            )
            for x in csv.DictReader(file)
        ]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows, or leave the file as it was."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([Row._fields, *rows])
    with write_whole(path) as file:
        file.write(text.getvalue().encode())


def draw(rows: Sequence[Row]) -> Figure:
    """A panel for each algorithm: a thin line for each run, a thick one for their mean."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    panels = figure.subplots(1, len(PAIRS))
    for axes, (algo, env_id) in zip(panels, PAIRS, strict=True):
        for library, color, style in ((OURS, BLUE, "-"), (SB3, ORANGE, "--")):
            here = [r for r in rows if r[:3] == (library, algo, env_id)]
            runs = [[*each] for _, each in itertools.groupby(sorted(here), lambda r: r.seed)]
            for each in runs:
                x, name = thousands(np.array([r.step for r in each], dtype=float))
                axes.plot(x, [r.score for r in each], style, color=color, linewidth=0.7, alpha=0.6)
            if runs:
                mean = np.mean([[r.score for r in each] for each in runs], axis=0)
                axes.plot(x, mean, style, color=color, linewidth=2.2, label=library)
                axes.set_xlabel(name)
        axes.set_title(f"{algo.upper()} {env_id}", loc="left")
        axes.locator_params(nbins=5)
    panels[0].set_ylabel("return")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


@command_line("beside_sb3", Options, __doc__)
def main(o: Options) -> int:
    """Make the runs that are missing, and draw."""
    if min(o.seeds, o.points, o.episodes) < 1 or o.total_steps < o.points:
        raise ValueError(f"expected one seed, point and episode at least, got {o}")
    torch.set_num_threads(1)
    keep_freed_memory()
    make_folder(o.out)
    rows = read(o.out / "returns.csv")
    done = {(r.seed, r.algo, r.env, r.library) for r in rows}
    for seed, (algo, env_id), library in itertools.product(range(1, o.seeds + 1), PAIRS, TRAIN):
        if (seed, algo, env_id, library) not in done:
            rows += run(library, algo, env_id, seed, o)
            write(o.out / "returns.csv", rows)
            print(f"{library} {algo} {env_id} seed {seed}: {rows[-1].score:.0f}", flush=True)
    with matplotlib.rc_context(STYLE):
        draw(rows).savefig(o.out / "curves.png", dpi=200)
    print(f"Written: {o.out / 'curves.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
