"""The analysis that results/registration.md fixes: its cells, its tests, its predictions.

What is computed here and nothing else may be called registered. The numbers of the cells, and of
the tests in the secondary family, are those of that file.
"""

import hashlib
import math
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
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

Place = tuple[int, str]  # of a cell: its number and its variant

HEADROOM: list[Place] = [(1, ""), (2, ""), (3, "")]
NULL: list[Place] = [(7, ""), (8, ""), (10, "")]
PLAIN, DECAY = (1, ""), (5, "lr=decay75")
TARGETS = [(6, f"target={kind}") for kind in ("hard:32", "none", "hard:512", "soft:0.0155")]
RATES: dict[Place, float] = {PLAIN: 0.0} | {
    (cell.number, cell.changes["variant"]): math.log2(cell.changes["agent"]["learning_rate"] / RATE)
    for cell in CELLS
    if cell.number == 4
}
BUDGET = 60  # episodes, of the tests that choose

Rule = Literal["windows", "choose", "checkpoints"]  # of the tests 5, 6 and 7
Replay = Callable[[Mapping[str, Floats], Rule, int], Floats]  # see `replay.replay`


@dataclass(frozen=True)
class Test:
    """One test of the secondary family."""

    number: int  # in the registration
    about: str  # what is compared with what
    effect: Effect | None  # None where a cell of it was not run, or where it was not computed
    words: tuple[str, str] = ("better", "worse")  # for more than nothing, and for less
    computed: bool = True  # the program can; all but choosing without `polyak_rl.choose`
    p: float = math.nan  # Holm's; NaN where it is none of those that can reject

    @property
    def in_family(self) -> bool:
        """Whether its cells were run."""
        return self.effect is not None or not self.computed


@dataclass(frozen=True)
class Prediction:
    """What was said beforehand of a difference, and how it came out."""

    about: str  # of which difference, where
    low: float
    high: float
    effect: Effect | None  # None where the cell was not run

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
    """The registered cells, and what is said of them once all that will be run have ended.

    Before, nothing is: `cells` is empty, and `absent` says of each how far it is. Tests that choose
    need `replay`: without it they are named as not computed.

    Args:
        strata: The registered runs that are there.
        planned: All planned runs, as far as they are known.
        replay: Replays choosing on stored episodes.
        left_out: The numbers of cells that will not be run: the last ones, whole.

    Attributes:
        closed: Whether all cells but those left out have ended, and these have not.

    Raises:
        ValueError: `left_out` are not the last cells.
    """

    def __init__(
        self,
        strata: Mapping[Key, Stratum],
        planned: Sequence[Run],
        replay: Replay | None = None,
        left_out: Sequence[int] = (),
    ) -> None:
        numbers = sorted({cell.number for cell in CELLS})
        if sorted(left_out) != numbers[len(numbers) - len(left_out) :]:
            raise ValueError(
                f"whole cells are left out from the end, the last of them {numbers[-1]}, got "
                f"{', '.join(map(str, left_out))}"
            )
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
            said = f"{ended} of {cell.runs} runs have ended" if ended else "not run"
            self.absent[place(cell)] = said
            if s is not None and ended == cell.runs:
                self.cells[place(cell)], self.crashed[place(cell)] = s, crashed
        short = {key[0] for key in self.absent if key not in self.cells}
        self.closed = short == {*left_out}
        kept = [key for key in self.cells if self.closed and key[0] not in short]
        self.cells = {key: self.cells[key] for key in kept}
        self.crashed = {key: self.crashed[key] for key in kept}
        self.absent = {key: said for key, said in self.absent.items() if key not in self.cells}

    def effect(self, build: Callable[..., Effect], *cells: Place) -> Effect | None:
        """What is made of the strata of these cells; None where one of them is missing."""
        if any(cell not in self.cells for cell in cells):
            return None
        return build(*(self.cells[cell] for cell in cells))

    def title(self, key: Place) -> str:
        """As in "cell 4, DQN CartPole-v1 (lr=x2)"."""
        (cell,) = (cell for cell in CELLS if place(cell) == key)
        name = f"{cell.algo.upper()} {cell.env_id}"
        late = " (settings fixed after registration, before its first run)" * (key[0] == 12)
        return f"cell {key[0]}, {name}" + f" ({key[1]})" * bool(key[1]) + late

    def primary(self) -> dict[str, Effect]:
        """The primary test, and under it what is shown beside it without a test."""
        if any(cell not in self.cells for cell in HEADROOM):
            return {}
        strata = [self.cells[cell] for cell in HEADROOM]
        crashed = [self.crashed[cell] for cell in HEADROOM]
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
        adjusted = iter(adjust([test.effect for test in tests if test.in_family]))
        return [replace(t, p=next(adjusted)) if t.in_family else t for t in tests]

    def _tests(self) -> Iterable[Test]:
        effect, signs = self.effect, ("above 0", "below 0")
        for cell in HEADROOM:
            about = f"tail25 against last, {self.title(cell)}"
            yield Test(cell[0], about, effect(gain, cell))
        about = "gain: headroom (cells 1, 2, 3) minus null (7, 8, 10)"
        yield Test(4, about, effect(headroom, *HEADROOM, *NULL), signs)
        about = "choosing among ten windows on 60 episodes against always tail25, cells 1 to 3"
        yield self._choosing(5, about, "windows")
        about = "polyak_rl.choose among all on 60 episodes against always tail25, cells 1 to 3"
        yield self._choosing(6, about, "choose")
        about = "the same against the best of last and five checkpoints on 60 episodes"
        yield self._choosing(7, about, "choose", "checkpoints")
        about = "last with decay (cell 5) against tail25 without (cell 1)"
        yield Test(8, about, effect(decayed, DECAY, PLAIN))
        yield Test(9, "the target actor against tail25, cell 3", effect(deployed, HEADROOM[2]))
        yield Test(10, "gain per doubling of the learning rate", effect(slope, *RATES), signs)
        about = "gain without decay (cell 1) minus with it (cell 5)"
        yield Test(11, about, effect(gains, PLAIN, DECAY), signs)
        about = "gain at hard 32 and none minus hard 512 and soft"
        yield Test(12, about, effect(targets, *TARGETS), signs)

    def _choosing(self, number: int, about: str, rule: Rule, rival: Rule | None = None) -> Test:
        def build(*strata: Stratum) -> Effect:
            worth = self.chosen(rule, BUDGET)
            if rival:
                rivals = self.chosen(rival, BUDGET)
                worth = [a - b for a, b in zip(worth, rivals, strict=True)]
            return Effect(tuple(map(present, worth)), margin=margin(*strata))

        if self.replay is None and self.primary():
            return Test(number, about, None, computed=False)
        return Test(number, about, self.effect(build, *HEADROOM))

    def chosen(self, rule: Rule, budget: int) -> list[Floats]:
        """What a rule of choice is worth over always tail25 in cells 1 to 3, normalised."""
        if self.replay is None or any(cell not in self.cells for cell in HEADROOM):
            return []
        if (rule, budget) not in self._chosen:
            self._chosen[rule, budget] = [
                self.replay({name: s.normalise(x) for name, x in s.final.items()}, rule, budget)
                for s in (self.cells[cell] for cell in HEADROOM)
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
            (12, ""): (0, 0.05),
        }
        for cell, (low, high) in said.items():
            about = f"tail25 - last, {self.title(cell)}"
            yield Prediction(about, low, high, self.effect(gain, cell))
        on_target = self.effect(partial(gain, scheme=TARGET.name), HEADROOM[2])
        yield Prediction("target actor - last, cell 3", 0, 0, on_target)
        about = "gain per doubling of the learning rate, cells 1 and 4"
        yield Prediction(about, 0, math.inf, self.effect(slope, *RATES))
        about = "last with decay (cell 5) - tail25 without (cell 1)"
        yield Prediction(about, 0, 0, self.effect(decayed, DECAY, PLAIN))
        about = "gain at hard 32 and none, their mean, minus hard 512 and soft, cell 6"
        yield Prediction(about, 0, math.inf, self.effect(targets, *TARGETS))


def headroom(*strata: Stratum) -> Effect:
    """The mean gain of the first half of the strata minus that of the second."""
    share = 2 / len(strata)
    half = (share,) * (len(strata) // 2)
    return gain(*strata, weights=half + tuple(-w for w in half), by_t=True)


def decayed(decay: Stratum, plain: Stratum) -> Effect:
    """Last where the learning rate decays minus tail25 where it does not."""
    return contrast([(1, decay, LAST.name), (-1, plain, PRIMARY.name)])


def deployed(s: Stratum) -> Effect:
    """The target actor minus tail25."""
    return gain(s, scheme=TARGET.name, base=PRIMARY.name)


def gains(*strata: Stratum, weights: Sequence[float] = (1, -1)) -> Effect:
    """A weighted sum of gains, paired by training seed."""
    terms = zip(weights, strata, strict=True)
    return contrast([
        term for w, s in terms for term in ((w, s, PRIMARY.name), (-w, s, LAST.name))
    ])  # fmt: skip


def slope(*strata: Stratum) -> Effect:
    """The mean over seeds of the slope of the gain on log2 of the learning rate."""
    x = np.array([*RATES.values()]) - np.mean([*RATES.values()])
    return gains(*strata, weights=x / (x @ x))


def targets(*strata: Stratum) -> Effect:
    """The mean gain where targets were predicted to leave most room minus where not."""
    return gains(*strata, weights=(0.5, 0.5, -0.5, -0.5))


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
    """The commits that added the registration and last changed it, and its SHA-256."""
    digest = hashlib.sha256(REGISTRATION.read_bytes()).hexdigest()
    first, last = commit_of(REGISTRATION, "--diff-filter=A"), commit_of(REGISTRATION)
    changed = f", changed at its end, the last time in commit {last}" * (first != last)
    return f"commit {first}{changed} (SHA-256 as it is now: {digest})"


def commit_of(path: Path, *options: str) -> str:
    """The last commit that changed a path of this repository, by these options of `git log`."""
    command = ["git", "log", "-1", *options, "--format=%h", "--", str(path)]
    try:
        found = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip() or "unknown"
