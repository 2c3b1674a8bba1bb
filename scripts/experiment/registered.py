"""The analysis that results/registration.md fixes: its cells, its tests, its predictions.

What is computed here and nothing else may be called registered. The numbers of the cells, and of
the tests in the secondary family, are those of that file.
"""

import hashlib
import math
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from agents.presets import preset
from scripts.experiment.analysis import Effect, adjust, contrast, gain, margin, present
from scripts.experiment.schemes import LAST, PRIMARY, TARGET
from scripts.experiment.stats import Floats
from scripts.experiment.study import CELLS, FIRST_SEED, RATE, Cell
from scripts.experiment.tidy import Key, Run, Stratum

REGISTRATION = Path(__file__).parents[1] / "results" / "registration.md"
CHOOSE = Path(__file__).parents[2] / "polyak_rl" / "choose.py"

HEADROOM, NULL = (1, 2, 3), (7, 8, 10)  # cells
PLAIN, DECAY = (1, ""), (5, "lr=decay75")  # cell and variant
OFTEN, NEVER = (6, "target=hard:32"), (6, "target=none")
RARELY, SOFT = (6, "target=hard:512"), (6, "target=soft:0.0155")
PPO = (12, "")
BUDGET = 60  # episodes, of the tests that choose

NOT_RUN = "cells not run"
BETTER, SIGNS = ("better", "worse"), ("above 0", "below 0")

Place = tuple[int, str]  # of a cell: its number and its variant
Rule = Literal["windows", "choose", "checkpoints"]  # of the tests 5, 6 and 7
Replay = Callable[[Mapping[str, Floats], Rule, int], Floats]  # see `replay.replay`


@dataclass(frozen=True)
class Test:
    """One test of the secondary family.

    Attributes:
        number: In the registration.
        about: What is compared with what.
        effect: None where it could not be computed.
        without: Why not.
        p: Holm's; NaN where it is none of those that can reject.
        words: For more than nothing, and for less.
    """

    number: int
    about: str
    effect: Effect | None
    without: str = ""
    p: float = math.nan
    words: tuple[str, str] = BETTER


@dataclass(frozen=True)
class Prediction:
    """What was said beforehand of a difference, and how it came out.

    Attributes:
        about: Of which difference, where.
        low: The least that was predicted.
        high: The most.
        effect: None where the cell was not run.
    """

    about: str
    low: float
    high: float
    effect: Effect | None

    @property
    def outcome(self) -> str:
        """Failed: the interval excludes all that was predicted. Held: see the report's method."""
        if self.effect is None:
            return "not run"
        estimate, low, high = map(float, self.effect.interval)
        if low > self.high or high < self.low:
            return "failed"
        if self.low == self.high:
            held = self.effect.interval.inside(self.effect.margin)
        elif math.isinf(self.high):
            held = low > self.low
        else:
            held = self.low <= estimate <= self.high
        return "held" if held else "neither held nor failed"


class Study:
    """The registered cells that have ended, and what is said of them.

    Args:
        strata: The registered runs, by setting.
        planned: The runs that were planned, as far as they are known.
        replay: For the tests that choose; without it they are named as not computed.
    """

    def __init__(
        self,
        strata: Mapping[Key, Stratum],
        planned: Sequence[Run],
        replay: Replay | None = None,
    ) -> None:
        self.replay = replay
        self._chosen: dict[tuple[Rule, int], list[Floats]] = {}
        self.cells: dict[Place, Stratum] = {}
        self.crashed: dict[Place, int] = {}
        self.absent: dict[Place, str] = {}
        for cell in CELLS if strata else ():
            key = stratum_key(cell)
            crashed = sum(
                run.key == key and run.status == "crashed" and counted(cell, run.seed)
                for run in planned
            )
            s = strata.get(key)
            ended = crashed + (0 if s is None else int(np.isfinite(s.shipped(LAST.name)).sum()))
            if s is not None and ended == cell.runs:
                self.cells[place(cell)], self.crashed[place(cell)] = s, crashed
            else:
                said = f"{ended} of {cell.runs} runs have ended" if ended else "not run"
                self.absent[place(cell)] = said
        if strata and PPO not in map(place, CELLS):
            self.absent[PPO] = "not run"

    def find(self, *keys: Place) -> list[Stratum] | None:
        """The strata of the cells, or None where one of them is missing."""
        return None if any(key not in self.cells for key in keys) else [self.cells[k] for k in keys]

    def title(self, key: Place) -> str:
        """As in "cell 4, DQN CartPole-v1 (lr=x2)"."""
        names = {place(c): f"{c.algo.upper()} {c.env_id}" for c in CELLS}
        name = names.get(key, "PPO LunarLander-v3")
        return f"cell {key[0]}, {name}" + f" ({key[1]})" * bool(key[1])

    def primary(self) -> dict[str, Effect]:
        """The primary test, and under it what is shown beside it without a test."""
        strata = self.find(*((n, "") for n in HEADROOM))
        if strata is None:
            return {}
        crashed = [self.crashed[n, ""] for n in HEADROOM]
        effects = {"shipped weights: the primary test": gain(*strata)}
        for i, s in enumerate(strata):
            effects[f"the same without {s.name}"] = gain(*strata[:i], *strata[i + 1 :])
        effects["stopped late"] = gain(*strata, endpoint=Stratum.late)
        text = f"shipped weights, crashed runs ({sum(crashed)}) counted as no difference"
        effects[text] = gain(*strata, crashed=crashed)
        return effects

    def secondary(self) -> list[Test]:
        """The family of twelve, with Holm's p-values over those that can reject."""
        tests = [*self._tests()]
        family = [t for t in tests if t.without != NOT_RUN]
        adjusted = iter(adjust([t.effect for t in family]))
        return [t if t.without == NOT_RUN else replace(t, p=next(adjusted)) for t in tests]

    def _tests(self) -> Iterable[Test]:
        for number in HEADROOM:
            one = self.find((number, ""))
            about = f"tail25 against last, {self.title((number, ''))}"
            yield Test(number, about, *of(one and gain(*one)))
        both = self.find(*((n, "") for n in HEADROOM + NULL))
        weights = (1 / 3,) * 3 + (-1 / 3,) * 3
        effect = both and gain(*both, weights=weights, by_t=True)
        yield Test(
            4, "gain: headroom (cells 1, 2, 3) minus null (7, 8, 10)", *of(effect), words=SIGNS
        )
        yield from self._choosing()
        pair = self.find(PLAIN, DECAY)
        effect = pair and contrast([(1, pair[1], LAST.name), (-1, pair[0], PRIMARY.name)])
        yield Test(8, "last with decay (cell 5) against tail25 without (cell 1)", *of(effect))
        one = self.find((3, ""))
        effect = one and gain(*one, scheme=TARGET.name, base=PRIMARY.name)
        yield Test(9, "the target actor against tail25, cell 3", *of(effect))
        yield Test(10, "gain per doubling of the learning rate", *of(self.slope()), words=SIGNS)
        effect = pair and contrast([*signed(1, pair[0]), *signed(-1, pair[1])])
        yield Test(
            11, "gain without decay (cell 1) minus with it (cell 5)", *of(effect), words=SIGNS
        )
        about = "gain at hard 32 and none minus hard 512 and soft"
        yield Test(12, about, *of(self.targets()), words=SIGNS)

    def slope(self) -> Effect | None:
        """The mean over seeds of the slope of the gain on log2 of the learning rate."""
        rates = {
            (cell.number, cell.changes["variant"]): math.log2(
                cell.changes["agent"]["learning_rate"] / RATE
            )
            for cell in CELLS
            if cell.number == 4
        } | {PLAIN: 0.0}
        strata = self.find(*rates)
        if strata is None:
            return None
        x = np.array([*rates.values()]) - np.mean([*rates.values()])
        terms = zip(x / (x @ x), strata, strict=True)
        return contrast([term for weight, s in terms for term in signed(weight, s)])

    def targets(self) -> Effect | None:
        """The mean gain where targets were predicted to need averaging minus where not."""
        strata = self.find(OFTEN, NEVER, RARELY, SOFT)
        if strata is None:
            return None
        terms = zip((0.5, 0.5, -0.5, -0.5), strata, strict=True)
        return contrast([term for weight, s in terms for term in signed(weight, s)])

    def _choosing(self) -> Iterable[Test]:
        abouts = {
            5: "choosing among ten windows on 60 episodes against always tail25, cells 1 to 3",
            6: "polyak_rl.choose among all on 60 episodes against always tail25, cells 1 to 3",
            7: "the same against the best of last and five checkpoints on 60 episodes",
        }
        for number, about in abouts.items():
            strata = self.find(*((n, "") for n in HEADROOM))
            if strata is None:
                yield Test(number, about, None, NOT_RUN)
            elif self.replay is None:
                yield Test(number, about, None, "not computed")
            else:
                rules: tuple[Rule, ...] = ("windows", "choose", "choose")
                worth = self.chosen(rules[number - 5], BUDGET)
                if number == 7:
                    pairs = zip(worth, self.chosen("checkpoints", BUDGET), strict=True)
                    worth = [a - b for a, b in pairs]
                yield Test(
                    number, about, Effect(tuple(map(present, worth)), margin=margin(*strata))
                )

    def chosen(self, rule: Rule, budget: int) -> list[Floats]:
        """What a rule of choice is worth over always tail25 in cells 1 to 3, normalised."""
        if (rule, budget) in self._chosen:
            return self._chosen[rule, budget]
        strata = self.find(*((n, "") for n in HEADROOM))
        if strata is None or self.replay is None:
            return []
        self._chosen[rule, budget] = [
            self.replay({name: s.normalise(x) for name, x in s.final.items()}, rule, budget)
            for s in strata
        ]
        return self._chosen[rule, budget]

    def predictions(self) -> list[Prediction]:
        """Each that was made, failures first."""
        made = [*self._predictions()]
        order = ["failed", "neither held nor failed", "held", "not run"]
        return sorted(made, key=lambda prediction: order.index(prediction.outcome))

    def _predictions(self) -> Iterable[Prediction]:
        said = {
            (1, ""): (0.10, 0.20),
            (2, ""): (0.05, 0.15),
            (3, ""): (0.10, 0.25),
            (4, "lr=x0.25"): (0, 0),
            DECAY: (0, 0),
            (7, ""): (0, 0),
            (8, ""): (0, 0),
            (9, ""): (-0.02, 0.03),
            (10, ""): (-0.05, -0.02),
            (11, ""): (0, 0.05),
            PPO: (0, 0.05),
        }
        for key, (low, high) in said.items():
            one = self.find(key)
            yield Prediction(
                f"tail25 - last, {self.title(key)}", low, high, of(one and gain(*one))[0]
            )
        one = self.find((3, ""))
        effect = one and gain(*one, scheme=TARGET.name)
        yield Prediction("target actor - last, cell 3", 0, 0, of(effect)[0])
        yield Prediction(
            "gain per doubling of the learning rate, cells 1 and 4", 0, math.inf, self.slope()
        )
        pair = self.find(PLAIN, DECAY)
        effect = pair and contrast([(1, pair[1], LAST.name), (-1, pair[0], PRIMARY.name)])
        yield Prediction("last with decay (cell 5) - tail25 without (cell 1)", 0, 0, of(effect)[0])
        about = "gain at hard 32 and none minus hard 512 and soft, cell 6"
        yield Prediction(about, 0, math.inf, self.targets())


def of(effect: "Effect | list[Stratum] | None") -> tuple[Effect | None, str]:
    """An effect, or why there is none."""
    return (effect, "") if isinstance(effect, Effect) else (None, NOT_RUN)


def signed(weight: float, s: Stratum) -> list[tuple[float, Stratum, str]]:
    """The terms of so much of a stratum's gain."""
    return [(weight, s, PRIMARY.name), (-weight, s, LAST.name)]


def stratum_key(cell: Cell) -> Key:
    """Environment, algorithm and variant of a cell."""
    return cell.env_id, cell.algo, cell.changes.get("variant", "")


def place(cell: Cell) -> Place:
    """Number and variant of a cell."""
    return cell.number, cell.changes.get("variant", "")


def counted(cell: Cell, seed: str) -> bool:
    """Whether a training seed is one of the cell's."""
    return seed in map(str, range(FIRST_SEED, FIRST_SEED + cell.runs))


def cell_of(s: Stratum) -> Cell | None:
    """The cell whose setting a stratum has."""
    for cell in CELLS:
        steps = cell.changes.get("total_steps") or preset(cell.algo, cell.env_id)[1]
        if stratum_key(cell) == s.key and s.steps[-1] == steps:
            return cell
    return None


def divide(strata: Sequence[Stratum]) -> tuple[dict[Key, Stratum], list[Stratum]]:
    """The registered runs, by their setting and their training seeds; and all others."""
    registered, others = {}, []
    for s in strata:
        cell = cell_of(s)
        mine = np.array([cell is not None and counted(cell, seed) for seed in s.seeds])
        if mine.any():
            registered[s.key] = s.only(mine)
        if not mine.all():
            others.append(s.only(~mine))
    return registered, others


def provenance() -> str:
    """The commit that last changed the registration, and its SHA-256."""
    digest = hashlib.sha256(REGISTRATION.read_bytes()).hexdigest()
    return f"commit {commit_of(REGISTRATION)}, SHA-256 {digest}"


def commit_of(path: Path) -> str:
    """The commit that last changed a file of this repository."""
    command = ["git", "log", "-1", "--format=%h", "--", path.name]
    try:
        found = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip() or "unknown"
