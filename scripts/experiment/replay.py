"""Choosing weights replayed on stored episodes, as the registration has it in its tests 5 to 7."""

from collections.abc import Callable, Mapping

import numpy as np

from polyak_rl.choose import choose, one_by_one, rounds
from scripts.experiment.registered import Rule
from scripts.experiment.schemes import LAST, PRIMARY, SCHEMES, TARGET
from scripts.experiment.stats import Floats

SPLITS = 200
BUDGETS = (0, 5, 12, 36, 60, 120)  # episodes to choose on, in all
CANDIDATES: Mapping[Rule, list[str]] = {
    "windows": ["tail5", *(name for name, s in SCHEMES.items() if s.rule and s.until)],
    "choose": [LAST.name, TARGET.name, *(name for name, s in SCHEMES.items() if s.rule)],
    "checkpoints": [LAST.name, *(name for name, s in SCHEMES.items() if s.is_checkpoint)],
}

Deal = Mapping[str, Floats]  # candidate -> returns in the order in which they are dealt out


def replay(episodes: Mapping[str, Floats], rule: Rule, budget: int) -> Floats:
    """What a rule of choice is worth over always shipping tail25, on so many episodes in all.

    Args:
        episodes: Returns by scheme, [N, E]; the same episodes for all schemes of a run.

    Returns:
        Score of what the rule ships minus that of tail25, on the same episodes, which no candidate
        was tried on: each run's mean over random splits, [N]. NaN where the budget is too small for
        the candidates, or too large for the episodes.

    Raises:
        ValueError: A candidate of some runs is missing in others.
    """
    names = [n for n in CANDIDATES[rule] if n in episodes]
    if lacking := [n for n in names if not np.isfinite(episodes[n]).all()]:
        raise ValueError(f"expected the same episodes of all schemes, some runs lack {lacking[0]}")
    runs, stored = episodes[PRIMARY.name].shape
    used, pick = halving(names, budget) if rule == "choose" else best(names, budget)
    if pick is None or used >= stored:
        return np.full(runs, np.nan)
    worth = np.empty((runs, SPLITS))
    rng = np.random.default_rng(0)  # the same splits for all rules
    for i, j in np.ndindex(worth.shape):
        order = rng.permutation(stored)
        deal = {name: episodes[name][i, order] for name in {*names, PRIMARY.name}}
        worth[i, j] = (deal[pick(deal)] - deal[PRIMARY.name])[used:].mean()
    return np.asarray(worth.mean(axis=1))


def halving(names: list[str], budget: int) -> tuple[int, Callable[[Deal], str] | None]:
    """How many episodes of a candidate `polyak_rl.choose` deals out, and its winner."""
    try:
        plan = rounds(len(names), budget)
    except ValueError:  # the budget is too small
        return 0, None

    def dealt(row: Floats, episodes: range) -> list[float]:
        return list(row[episodes.start : episodes.stop])

    def pick(deal: Deal) -> str:
        candidates = {name: deal[name] for name in names}
        play, prior = one_by_one(dealt), PRIMARY.name
        return choose(candidates, play, budget=budget, prior=prior, last=LAST.name, fresh=0).winner

    ready = {PRIMARY.name, LAST.name} <= {*names}
    return sum(episodes for _, episodes in plan), pick if ready else None


def best(names: list[str], budget: int) -> tuple[int, Callable[[Deal], str] | None]:
    """How many episodes each candidate plays, and the best of them; of ties the newest."""
    each = budget // len(names) if names else 0
    if each == 0 or len(names) < 2:
        return 0, None
    return each, lambda deal: max(names, key=lambda name: deal[name][:each].mean())
