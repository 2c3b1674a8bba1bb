"""Ways to spend a budget of episodes on candidates, against each other on stored episodes.

    python -m scripts.allocation RESULTS

All rules get the same episodes in the same order and the same prior, and are scored on episodes
that no candidate was tried on. Halving is `polyak_rl.choose` itself. The others are for comparison:

- *uniform*: the same number of episodes each;
- *successive rejects*: one candidate leaves a round (Audibert, Bubeck & Munos 2010, COLT);
- *racing*: a candidate leaves where the confidence interval of its paired difference from the
  leader excludes zero, at 5 % for all candidates and looks together (as Maron & Moore 1993,
  NeurIPS, with a normal interval);
- *top-two Thompson*: an episode for the best of a draw from the posterior, or with probability one
  half for the best of a later draw that is another (Russo 2016, COLT);
- *top-two cost*: for the leader, or with probability one half for the challenger that is easiest
  to confuse with it (EB-TCI of Jourdan et al. 2022, NeurIPS);
- *OCBA*: episodes in proportion to (spread / gap)^2 (Chen et al. 2000, Discrete Event Dynamic
  Systems 10).

The last three decide anew after every episode, so that nothing can be played side by side.
Returns are Gaussian to them, of one variance, which is estimated as they go.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import tyro
from numpy.typing import NDArray

from polyak_rl.choose import rounds
from scripts.choice import BASE, HELD_OUT, PRIOR, Group, affordable, grouped, halving, read
from scripts.choice import table as markdown
from scripts.experiment.stats import Floats
from scripts.experiment.tidy import result_files

BUDGETS = (12, 36, 60)
Ints = NDArray[np.int64]
Allocation = Callable[[Floats, int, np.random.Generator], tuple[Ints, Ints]]
"""Returns [P, K, E] of P problems, budget, randomness -> winners [P], episodes of each [P, K].

The first candidate is the prior, to which ties go.
"""


def best_of(x: Floats, n: Ints) -> Ints:
    """The candidate with the highest mean of its first n returns, [P]; a tie goes to the first."""
    best: Ints = np.round(means(x, n), 9).argmax(axis=-1)
    return best


def means(x: Floats, n: Ints) -> Floats:
    """The mean of each candidate's first n >= 1 returns, [P, K]."""
    total = np.take_along_axis(x.cumsum(axis=-1), n[..., None] - 1, axis=-1)[..., 0]
    return np.asarray(total / n)


def uniform(x: Floats, budget: int, _: np.random.Generator) -> tuple[Ints, Ints]:
    """The same number of episodes each."""
    n = np.full(x.shape[:2], budget // x.shape[1])
    return best_of(x, n), n


def successive_rejects(x: Floats, budget: int, _: np.random.Generator) -> tuple[Ints, Ints]:
    """The worst leaves after each of K - 1 rounds."""
    problems, candidates, _e = x.shape
    scale = 0.5 + sum(1 / i for i in range(2, candidates + 1))
    alive, n = np.ones((problems, candidates), bool), np.ones((problems, candidates), np.int64)
    for left in range(candidates, 1, -1):
        n[alive] = max(1, int(np.ceil((budget - candidates) / (scale * left))))
        score = np.where(alive, np.round(means(x, n), 9), np.inf)
        worst = candidates - 1 - score[:, ::-1].argmin(axis=-1)  # of ties, the last named
        np.put_along_axis(alive, worst[:, None], False, axis=-1)
    return alive.argmax(axis=-1), n


def racing(x: Floats, budget: int, _: np.random.Generator) -> tuple[Ints, Ints]:
    """All that are left play on together; who is surely behind the leader leaves."""
    problems, candidates, episodes = x.shape
    looks = max(1, budget // candidates) * candidates
    z = NormalDist().inv_cdf(1 - 0.05 / looks)
    alive, n = np.ones((problems, candidates), bool), np.zeros((problems, candidates), np.int64)
    left = np.full(problems, budget)
    for seen in range(1, episodes + 1):
        fits = (alive.sum(axis=-1) <= left) & (alive.sum(axis=-1) > 1)
        n += alive & fits[:, None]
        left = left - np.where(fits, alive.sum(axis=-1), 0)
        if seen >= 3:
            score = np.where(alive, x[..., :seen].mean(axis=-1), -np.inf)
            leader = np.round(score, 9).argmax(axis=-1)
            gap = np.take_along_axis(x, leader[:, None, None], axis=1)[..., :seen] - x[..., :seen]
            behind = gap.mean(axis=-1) > z * gap.std(axis=-1, ddof=1) / np.sqrt(seen)
            alive &= ~(behind & fits[:, None])
    score = np.where(n == n.max(axis=-1, keepdims=True), means(x, n), -np.inf)
    return np.round(score, 9).argmax(axis=-1), n


def one_at_a_time(choose_next: Callable[..., Ints]) -> Allocation:
    """Spend the budget episode by episode, after one for each candidate."""

    def allocate(x: Floats, budget: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
        problems, candidates, episodes = x.shape
        n = np.ones((problems, candidates), np.int64)
        squares = (x**2).cumsum(axis=-1)
        for _ in range(budget - candidates):
            mean = means(x, n)
            total = np.take_along_axis(squares, n[..., None] - 1, axis=-1)[..., 0]
            within = np.maximum(total - n * mean**2, 0).sum(axis=-1)
            df = (n - 1).sum(axis=-1)
            variance = np.where(df > 2, within / np.maximum(df, 1), mean.var(axis=-1))
            pick = choose_next(mean, np.maximum(variance, 1e-6)[:, None], n, rng)
            stored = np.take_along_axis(n, pick[:, None], axis=-1)[:, 0] < episodes - HELD_OUT
            best_left = np.where(n < episodes - HELD_OUT, mean, -np.inf).argmax(axis=-1)
            n[np.arange(problems), np.where(stored, pick, best_left)] += 1
        return best_of(x, n), n

    return allocate


def top_two_thompson(mean: Floats, variance: Floats, n: Ints, rng: np.random.Generator) -> Ints:
    """The best of a posterior draw, or half of the time the best of a later one that differs."""

    def sample() -> Ints:
        draw = mean + rng.standard_normal(mean.shape) * np.sqrt(variance / n)
        best: Ints = draw.argmax(axis=-1)
        return best

    first = sample()
    order = np.argsort(-mean, axis=-1)
    other = np.where(order[:, 0] == first, order[:, 1], order[:, 0])  # if no draw differs
    for _ in range(20):
        again = sample()
        other = np.where(again != first, again, other)
    return np.where(rng.random(len(mean)) < 0.5, first, other)


def top_two_cost(mean: Floats, variance: Floats, n: Ints, rng: np.random.Generator) -> Ints:
    """The leader, or half of the time the challenger with the least evidence against it."""
    leader = np.round(mean, 9).argmax(axis=-1)[:, None]
    gap = np.take_along_axis(mean, leader, axis=-1) - mean
    cost = gap**2 / (variance * (1 / n + 1 / np.take_along_axis(n, leader, axis=-1))) + np.log(n)
    np.put_along_axis(cost, leader, np.inf, axis=-1)
    chosen: Ints = np.where(rng.random(len(mean)) < 0.5, leader[:, 0], cost.argmin(axis=-1))
    return chosen


def ocba(mean: Floats, variance: Floats, n: Ints, _: np.random.Generator) -> Ints:
    """Whoever is furthest behind its share of the episodes so far."""
    leader = np.round(mean, 9).argmax(axis=-1)[:, None]
    gap = np.maximum(np.take_along_axis(mean, leader, axis=-1) - mean, 0.02)
    share = 1 / gap**2
    np.put_along_axis(share, leader, 0.0, axis=-1)
    np.put_along_axis(share, leader, np.sqrt((share**2).sum(axis=-1, keepdims=True)), axis=-1)
    share /= share.sum(axis=-1, keepdims=True)
    return np.asarray((share * (n.sum(axis=-1, keepdims=True) + 1) - n).argmax(axis=-1))


def library(x: Floats, budget: int, _: np.random.Generator) -> tuple[Ints, Ints]:
    """`polyak_rl.choose`, problem by problem; its stages are the same for all of them."""
    names = [str(i) for i in range(x.shape[1])]
    deals = (dict(zip(names, problem, strict=True)) for problem in x)
    winners = np.array([int(halving(names, deal, budget)) for deal in deals])
    most = sum(episodes for _, episodes in rounds(len(names), budget))
    return winners, np.full(x.shape[:2], most)


ALLOCATIONS: dict[str, Allocation] = {
    "halving": library,
    "uniform": uniform,
    "successive rejects": successive_rejects,
    "racing": racing,
    "top-two Thompson": one_at_a_time(top_two_thompson),
    "top-two cost": one_at_a_time(top_two_cost),
    "OCBA": one_at_a_time(ocba),
}


def gains(group: Group, budget: int, splits: int) -> dict[str, tuple[float, float]]:
    """Each rule's gain over last, and the standard error of its difference from halving."""
    found: dict[str, list[list[float]]] = {name: [] for name in ALLOCATIONS}
    for run in group.runs:
        names = affordable(run.all, budget)
        stored = run.table(names)
        rng = np.random.default_rng([budget, *run.name.encode()])
        order = np.stack([rng.permutation(len(stored[BASE])) for _ in range(splits)])
        x = np.stack([stored[name][order] for name in names], axis=1) / group.span(run)
        last = stored[BASE][order] / group.span(run)
        for name, allocate in ALLOCATIONS.items():
            winner, n = allocate(x, budget, rng)
            held = np.arange(x.shape[-1]) >= n.max(axis=-1, keepdims=True)
            gap = np.take_along_axis(x, winner[:, None, None], axis=1)[:, 0] - last
            found[name].append([float((gap * held).sum() / held.sum())])
    means_of = {name: np.array(rows)[:, 0] for name, rows in found.items()}
    runs = len(group.runs)
    return {
        name: (float(x.mean()), float((x - means_of["halving"]).std(ddof=1) / np.sqrt(runs)))
        for name, x in means_of.items()
    }


@dataclass(frozen=True)
class Options:
    """Compare rules of allocation on stored episodes."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """CSV files or folders of them"""
    splits: int = 100
    """random orders of a run's episodes"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = tyro.cli(Options, args=argv, prog="python -m scripts.allocation", description=__doc__)
    try:
        if options.splits < 1:
            raise ValueError(f"splits must be at least 1, got {options.splits}")
        groups = grouped(read(result_files(options.results)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for group in groups:
        if group.pooled or any({PRIOR, BASE} - run.returns.keys() for run in group.runs):
            continue
        columns = [gains(group, budget, options.splits) for budget in BUDGETS]
        rows = [
            [name, *(f"{column[name][0]:+.4f} ± {column[name][1]:.4f}" for column in columns)]
            for name in ALLOCATIONS
        ]
        print(f"## {group.name}\n\n{markdown(['rule', *map(str, BUDGETS)], rows)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
