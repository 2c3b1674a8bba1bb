"""Which weights to ship: chosen on some episodes, valued on others.

A run ends with many weights that one could hand over: the last iterate, averages of its end,
stretches of its past. Which are best depends on the run, so it takes episodes to tell, and then the
score of the best of many on the episodes that it was chosen on flatters: luck was chosen too. Hence

1. **Choosing** is sequential halving: all candidates play the same few episodes, the better half
   plays on, until one is left. What is far behind costs little, and a round is one call that can
   play all of its candidates side by side.
2. One candidate is the **prior**, which is shipped without any episode (by default ``tail25``, the
   average of the last quarter). It is left only where it is beaten: a tie goes to it.
3. **Valuing** is a block of episodes that nobody has played, for the winner, the prior and the last
   iterate: what the change is worth with its interval, the worst tenth of the episodes, and beside
   them what the choosing episodes had promised.

For an agent of one's own. Here the policy is a number, and a return falls with its distance from
one that the episode sets, with its number as the seed: all candidates meet the same conditions.

    >>> from random import Random
    >>> from polyak_rl import choose, one_by_one
    >>> run = [1 + Random(step).gauss(0, 2) for step in range(100)]     # iterates that oscillate
    >>> candidates = {
    ...     "last": run[-1],
    ...     "tail10": sum(run[-10:]) / 10,
    ...     "tail25": sum(run[-25:]) / 25,
    ...     "tail50": lambda: sum(run[-50:]) / 50,     # a function is called when it is needed
    ... }
    >>> def play(policy, episodes):     # one return for each episode
    ...     return [-((policy - Random(seed).gauss(1, 0.5)) ** 2) for seed in episodes]
    >>> choice = choose(candidates, one_by_one(play), budget=36)
    >>> print(choice)
    ship tail50
      chosen among 4 on 14 episodes, which promised -0.2794
      on 40 fresh episodes -0.239
      +0.9589 [+0.6433, +1.275] over last
      +0.09662 [-0.007558, +0.2008] over tail25
      -0.8895 on the worst tenth of them
    >>> shipped = candidates["tail50"]()

Where the candidates are weights of one network they can be played at once: `play` is then given
the weights of a round by name, and :func:`polyak_rl.one_by_one` is not needed.

What it is worth, by ``python -m scripts.choice scripts/results/exploratory``, which replays the
episodes of an exploratory study: in sixty runs of DQN on CartPole-v1, still learning at their end,
shipping ``tail25`` instead of the last iterate gains .15 of the way from a random policy to the
best score, choosing with 12 episodes .23, and with 36 episodes among averages and five late
checkpoints .26, as much as the best of them in hindsight. The best of the five checkpoints alone,
as an evaluation callback keeps it, gains .23 with as many; whether that is less is not settled. On
Acrobot-v1, InvertedPendulum-v5 and Pendulum-v1, with little or nothing to gain, choosing was on
average no worse than shipping the last iterate.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

W = TypeVar("W")
Play = Callable[[Mapping[str, W], range], Mapping[str, Sequence[float]]]
Returns = dict[str, tuple[float, ...]]


class Interval(NamedTuple):
    """An estimate with its 95 % confidence interval."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:+.4g} [{self.low:+.4g}, {self.high:+.4g}]"


@dataclass(frozen=True)
class Choice:
    """What was chosen, with every return that this rests on.

    A plain record: ``dataclasses.asdict`` and JSON take it apart, ``Choice(**values)`` puts it
    together again.

    Args:
        winner: the candidate to ship.
        prior: the candidate that is shipped unless it is beaten.
        last: the candidate whose weights would have been shipped without any of this.
        worst: the criterion is the mean of this share of the episodes, the worst ones; in (0, 1].
        seed: of the order in which candidates were played.
        start: the first episode.
        choosing: returns on the episodes from `start` on, as many as a candidate stayed for, by
            name; empty where the budget was 0.
        valuing: returns of winner, prior and last on the episodes that follow.

    Raises:
        ValueError: The values are no record of a choice.

    Example:
        >>> import dataclasses, json
        >>> play = one_by_one(lambda policy, episodes: [policy * seed for seed in episodes])
        >>> choice = choose({"last": 1.0, "tail25": 1.5}, play, budget=4)
        >>> choice.winner, choice.choosing
        ('tail25', {'last': (0.0, 1.0), 'tail25': (0.0, 1.5)})
        >>> Choice(**json.loads(json.dumps(dataclasses.asdict(choice)))) == choice
        True
    """

    winner: str
    prior: str
    last: str
    worst: float
    seed: int
    start: int
    choosing: Returns
    valuing: Returns

    def __post_init__(self) -> None:
        kinds: dict[str, type] = dict.fromkeys(("winner", "prior", "last"), str)
        kinds |= {"seed": int, "start": int, "choosing": dict, "valuing": dict}
        for field, kind in kinds.items():
            if not isinstance(value := getattr(self, field), kind):
                raise ValueError(f"{field} must be of type {kind.__name__}, got {value!r}")
        _check_share(self.worst)
        roles = {self.winner, self.prior, self.last}
        for block in ("choosing", "valuing"):
            rows = {name: _finite(name, row) for name, row in getattr(self, block).items()}
            object.__setattr__(self, block, rows)
            if rows and not roles <= rows.keys():
                raise ValueError(f"{block} must hold {sorted(roles)}, got {sorted(rows)}")
        fresh = {len(row) for row in self.valuing.values()}
        if len(fresh) > 1 or fresh & {0, 1}:
            raise ValueError(f"valuing must hold the same 2 or more episodes of each, got {fresh}")

    @property
    def next_start(self) -> int:
        """The first episode that nobody has played: where another choice may start."""
        blocks = (self.choosing, self.valuing)
        return self.start + sum(max(map(len, rows.values()), default=0) for rows in blocks)

    @property
    def episodes(self) -> int:
        """How many episodes were played, over all candidates."""
        return sum(len(row) for rows in (self.choosing, self.valuing) for row in rows.values())

    def promised(self) -> float:
        """The winner's criterion on the choosing episodes, which flatters; NaN without any."""
        return mean_of_worst(self.choosing.get(self.winner, ()), self.worst)

    def value(self, name: str | None = None, worst: float | None = None) -> float:
        """The criterion on the fresh episodes; NaN without any.

        Args:
            name: the winner (the default), the prior or the last.
            worst: another share of the episodes than that of the criterion, in (0, 1].
        """
        share = self.worst if worst is None else worst
        return mean_of_worst(self._fresh(name or self.winner), share)

    def gain(self, over: str | None = None) -> Interval:
        """The winner's criterion minus that of the last (or the prior) on the fresh episodes.

        A t interval over paired episodes. It knows only what these hold: a failure in one of a
        hundred is most often not among forty. For a criterion of the worst episodes it is that of
        linearised returns, with the degrees of freedom of the episodes that count; there it covers
        less than 95 %: in replays about 90 % for a quarter of 40 episodes, 80 % for a tenth.
        """
        pair = [self._fresh(name) for name in (self.winner, over or self.last)]
        if not all(pair):
            return Interval(math.nan, math.nan, math.nan)
        parts = (_parts(row, self.worst) for row in pair)
        df = max(1, _counted(len(pair[0]), self.worst) - 1)
        return mean_interval([a - b for a, b in zip(*parts, strict=True)], df)

    def _fresh(self, name: str) -> tuple[float, ...]:
        """The candidate's returns on the fresh episodes."""
        if self.valuing and name not in self.valuing:
            raise ValueError(f"only {sorted(self.valuing)} were valued, got {name!r}")
        return self.valuing.get(name, ())

    def __str__(self) -> str:
        lines = [f"ship {self.winner}"]
        if self.choosing:
            among = f"{len(self.choosing)} on {len(self.choosing[self.winner])} episodes"
            lines.append(f"chosen among {among}, which promised {self.promised():.4g}")
        if self.valuing:
            lines.append(f"on {len(self.valuing[self.winner])} fresh episodes {self.value():.4g}")
            others = dict.fromkeys((self.last, self.prior))
            lines += [f"{self.gain(name)} over {name}" for name in others if name != self.winner]
            lines.append(f"{self.value(worst=0.1):.4g} on the worst tenth of them")
        return "\n  ".join(lines)


def choose(
    candidates: Mapping[str, W | Callable[[], W]] | Iterable[tuple[str, W | Callable[[], W]]],
    play: Play[W],
    *,
    budget: int = 60,
    prior: str = "tail25",
    last: str = "last",
    worst: float = 1.0,
    fresh: int | None = None,
    start: int = 0,
    seed: int = 0,
) -> Choice:
    """Choose the weights to ship on a budget of episodes, and value them on others.

    Sequential halving in about log2(K) rounds for K candidates. A round gives each of its
    candidates the same number of new episodes, the same ones to all, and keeps the better half by
    the criterion on all episodes so far. (The published rule forgets those of earlier rounds, which
    its proof needs. Here a candidate's rivals have all played what it has played.)
    Ties go to the prior, then to what is named first.

    Args:
        candidates: weights by name, or functions that give them, each called once. Only functions,
            methods and partials count as such: a module is weights.
        play: given weights by name and a range of episodes, returns for each name one number an
            episode, higher is better. The same episode must mean the same conditions whoever plays:
            derive the environment's seed from it.
        budget: episodes to choose with, counted over all candidates; 0 ships the prior.
        prior: the candidate that is shipped unless it is beaten.
        last: the candidate that the winner is compared with in the end.
        worst: the criterion is the mean of this share of the episodes, the worst ones (conditional
            value at risk); in (0, 1], where 1 is the mean of all.
        fresh: episodes to value each of winner, prior and last on, 0 or at least 2; by default two
            thirds of the budget and at least 40, or 0 for a budget of 0. Where most episodes are
            alike and few fail, an interval of 20 covers too seldom (about 90 %).
        start: the first episode; `Choice.next_start` of an earlier choice to play no episode twice.
        seed: of the order in which `play` is given the candidates, so that none always goes first.

    Raises:
        ValueError: An argument is wrong or the budget is too small, before anything is played; or
            `play` did not answer one finite number an episode, before anything else is played.

    References:
        Karnin, Koren & Somekh (2013), Almost optimal exploration in multi-armed bandits, ICML,
        https://proceedings.mlr.press/v28/karnin13.html; Rockafellar & Uryasev (2000), Optimization
        of conditional value-at-risk, Journal of Risk 2(3), 21-41.

    Example:
        >>> def play(weights, episodes):     # all at once
        ...     return {name: [w - seed % 2 for seed in episodes] for name, w in weights.items()}
        >>> candidates = {"last": 3.0, "tail10": 5.0, "tail25": 4.0}
        >>> print(choose(candidates, play, budget=12))
        ship tail10
          chosen among 3 on 5 episodes, which promised 4.6
          on 40 fresh episodes 4.5
          +2 [+2, +2] over last
          +1 [+1, +1] over tail25
          4 on the worst tenth of them
    """
    pairs = list(candidates.items() if isinstance(candidates, Mapping) else candidates)
    weights = dict(pairs)
    if len(weights) < len(pairs) or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"candidates must have names of their own, got {[n for n, _ in pairs]}")
    budget, start, seed = map(operator.index, (budget, start, seed))
    for role, name in (("prior", prior), ("last", last)):
        if name not in weights:
            raise ValueError(f"{role} must be one of {[*weights]}, got {name!r}")
    _check_share(worst)
    if fresh is None:
        fresh = max(40, 2 * budget // 3) if budget else 0
    if operator.index(fresh) < 0 or fresh == 1:
        raise ValueError(f"fresh must be 0 or at least 2 episodes, got {fresh}")
    if start < 0:
        raise ValueError(f"start must be at least 0, got {start}")
    plan = rounds(len(weights), budget)

    order = random.Random(seed)
    ready: dict[str, W] = {}

    def returns(names: Iterable[str], episodes: range) -> Returns:
        group = sorted(set(names), key=[*weights].index)
        order.shuffle(group)
        for name in group:
            if name not in ready:
                given = weights[name]
                made = inspect.isroutine(given) or isinstance(given, functools.partial)
                ready[name] = given() if made else given
        return _answer(play({name: ready[name] for name in group}, episodes), group, episodes)

    alive = [prior, *(name for name in weights if name != prior)]  # the order in which ties fall
    rows: Returns = dict.fromkeys(weights, ()) if plan else {}
    played = start
    for size, episodes in plan:
        new = returns(alive, range(played, played + episodes))
        rows |= {name: rows[name] + new[name] for name in alive}
        played += episodes
        best = sorted(alive, key=lambda name: mean_of_worst(rows[name], worst), reverse=True)
        alive = [name for name in alive if name in best[: (size + 1) // 2]]
    winner = alive[0]
    fair = returns((winner, prior, last), range(played, played + fresh)) if fresh else {}
    return Choice(winner, prior, last, worst, seed, start, rows, fair)


def one_by_one(play: Callable[[W, range], Sequence[float]]) -> Play[W]:
    """Make a function that plays one candidate into one that plays several, one after another.

    Args:
        play: given weights and a range of episodes, returns one number an episode.

    Example:
        >>> play = one_by_one(lambda policy, episodes: [policy + seed for seed in episodes])
        >>> play({"last": 0.5, "tail25": 1.5}, range(3))
        {'last': [0.5, 1.5, 2.5], 'tail25': [1.5, 2.5, 3.5]}
    """
    return lambda weights, episodes: {name: play(w, episodes) for name, w in weights.items()}


def rounds(candidates: int, budget: int) -> list[tuple[int, int]]:
    """The rounds of sequential halving: how many play, and how many new episodes each of them.

    Each round gets an equal share of what is left of the budget, and at least one episode each.

    Raises:
        ValueError: The budget is neither 0 nor enough for one episode of each in each round.

    Example:
        >>> rounds(12, 36)     # 12 + 6 + 3 * 3 + 2 * 4 = 35 episodes
        [(12, 1), (6, 1), (3, 3), (2, 4)]
        >>> rounds(12, 20)
        Traceback (most recent call last):
        ValueError: budget must be 0 or at least 23 episodes for 12 candidates, got 20
    """
    sizes = [candidates] if candidates > 1 else []
    while sizes and sizes[-1] > 2:
        sizes.append((sizes[-1] + 1) // 2)
    if budget < 0 or 0 < budget < sum(sizes):
        least = f"{sum(sizes)} episodes for {candidates} candidates"
        raise ValueError(f"budget must be 0 or at least {least}, got {budget}")
    plan: list[tuple[int, int]] = []
    for i, size in enumerate(sizes if budget else ()):
        plan.append((size, max(1, budget // (size * (len(sizes) - i)))))
        budget -= size * plan[-1][1]
    return plan


def mean_of_worst(returns: Sequence[float], share: float = 1.0) -> float:
    """The mean of the worst share of the returns (conditional value at risk); NaN of none.

    Where the share is no whole number of returns the last one counts in part, and below one return
    it is the minimum.

    Example:
        >>> mean_of_worst([5.0, 1.0, 2.0, 9.0], 0.5), mean_of_worst([5.0, 1.0, 2.0, 9.0])
        (1.5, 4.25)
    """
    _check_share(share)
    return statistics.fmean(_parts(returns, share)) if returns else math.nan


def mean_interval(x: Sequence[float], df: int | None = None) -> Interval:
    """The mean of at least two numbers with its 95 % t interval.

    Args:
        x: the numbers.
        df: the degrees of freedom, by default one less than there are numbers.

    Example:
        >>> print(mean_interval([1.0, 2.0, 3.0]))
        +2 [-0.4841, +4.484]
    """
    if len(x) < 2:
        raise ValueError(f"an interval needs at least 2 numbers, got {len(x)}")
    mean = statistics.fmean(x)
    half = (
        t_quantile(len(x) - 1 if df is None else df) * statistics.stdev(x, mean) / math.sqrt(len(x))
    )
    return Interval(mean, mean - half, mean + half)


@functools.cache
def t_quantile(df: int, level: float = 0.95) -> float:
    """The t within which Student's distribution has the probability `level`: P(\\|T\\| <= t).

    For whole degrees of freedom this probability is a finite sum in the angle arctan(t / sqrt(df)),
    in which it rises; bisection inverts it to the last digits.

    References:
        Abramowitz & Stegun (1964), Handbook of mathematical functions, 26.7.3 and 26.7.4.

    Example:
        >>> [round(t_quantile(df), 3) for df in (1, 2, 19, 1000)]     # as in the tables
        [12.706, 4.303, 2.093, 1.962]
    """
    if df < 1:
        raise ValueError(f"df must be at least 1, got {df}")

    def inside(angle: float) -> float:
        sine, cosine = math.sin(angle), math.cos(angle)
        odd = df % 2
        term = total = 0.0 if df == 1 else cosine if odd else 1.0
        for k in range(2 if odd else 1, df - 1, 2):
            term *= k / (k + 1) * cosine**2
            total += term
        return 2 / math.pi * (angle + sine * total) if odd else sine * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < level else (low, middle)
    return math.sqrt(df) * math.tan(low)


def _parts(returns: Sequence[float], share: float) -> list[float]:
    """One number a return, whose mean is that of the worst share: ``q - max(q - x, 0) / share``."""
    if share == 1:
        return list(returns)
    quantile = sorted(returns)[_counted(len(returns), share) - 1]
    return [quantile - max(quantile - x, 0.0) / share for x in returns]


def _counted(episodes: int, share: float) -> int:
    """How many of the episodes are the worst share; rounded, as .1 * 30 is a trifle over 3."""
    return math.ceil(round(share * episodes, 9))


def _answer(given: Mapping[str, Sequence[float]], names: Sequence[str], episodes: range) -> Returns:
    """What `play` answered, checked: one finite return an episode for each name."""
    if not isinstance(given, Mapping) or given.keys() != set(names):
        got = sorted(given) if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(f"play must answer with returns for {sorted(names)} by name, got {got}")
    rows = {name: _finite(name, given[name]) for name in names}
    for name, row in rows.items():
        if len(row) != len(episodes):
            raise ValueError(
                f"play must answer one return an episode, got {len(row)} of {name!r}"
                f" for {len(episodes)} episodes"
            )
    return rows


def _finite(name: str, returns: Iterable[float]) -> tuple[float, ...]:
    """The returns as finite numbers, whatever kind of sequence they came in."""
    try:
        row = tuple(map(float, returns))
    except (TypeError, ValueError):
        raise ValueError(f"returns must be numbers, got {returns!r} of {name!r}") from None
    if wrong := [x for x in row if not math.isfinite(x)]:
        raise ValueError(f"returns must be finite, got {wrong[0]} of {name!r}")
    return row


def _check_share(share: float) -> None:
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"worst must be a share of the episodes in (0, 1], got {share}")
