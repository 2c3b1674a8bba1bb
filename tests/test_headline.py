"""The five sentences follow the tests of a study whose truth is known."""

# ruff: noqa: RUF001  (the report's minus signs)

import dataclasses
import math
import re

import numpy as np
import pytest

from scripts.experiment.analysis import Effect
from scripts.experiment.headline import PLACE, VERBS, headline, verb
from scripts.experiment.literature import LITERATURE
from scripts.experiment.page import Page
from scripts.experiment.registered import Study
from scripts.experiment.registered_report import RegisteredReport
from scripts.experiment.study import CELLS
from tests.test_report import SPREAD, registered

GAINS = {1: 0.15, 2: 0.1, 3: 0.2}


def study(cells=CELLS, gains=GAINS, replay=None, left_out=()):
    """One whose cells gain so much, each run a little more or less."""
    strata = {}
    for cell in cells:
        s = registered(cell)
        if cell.changes.get("total_steps"):
            s.steps[:] *= cell.changes["total_steps"] / s.steps[-1]
        elif cell.env_id == "Pendulum-v1":
            s.steps[:] *= 20_000 / s.steps[-1]
        low, high = s.scale
        n = len(s.runs)
        last = low + (high - low) * np.linspace(0.2, 0.8, n)
        own = gains.get(cell.number, 0) + 0.01 * np.resize([1, -1], n)
        for name, score in (("last", last), ("tail25", last + (high - low) * own)):
            s.scores[name][:] = score[:, None]
            s.final[name] = score[:, None]
        s.scores["target"], s.final["target"] = s.scores["last"], s.final["last"]
        s = dataclasses.replace(s, variant=cell.changes.get("variant", ""))
        strata[s.key] = s
    return Study(strata, [], replay, left_out)


def test_a_study_that_found_what_is_true_says_so_in_five_sentences():
    replay = {"windows": -0.05, "choose": 0.0, "checkpoints": -0.1}
    found = headline(study(replay=lambda returns, rule, budget: replay[rule] + 0.001 * SIGNS))
    assert len(found) == 5
    first, second, third, fourth, fifth = found
    assert first.startswith(
        "Over DQN CartPole-v1, DQN LunarLander-v3 and DDPG Hopper-v5, shipping the average of the"
        " last quarter of the run (tail25) **was better than** shipping the last iterate: +0.150 ["
    )
    assert "60 runs, 95 % interval, sign-flip p < 0.001" in first
    assert "without one of the three, +0.125 to +0.175" in first
    assert "**better** (+0.150 [+0.145, +0.155]) in cell 1, DQN CartPole-v1" in second
    assert "**above 0, indicative** (+0.150 [" in second  # of eight runs in cell 10
    assert re.search(r"\(there [+−]0\.000 \[", second)
    assert "ten windows of 5 % against always tail25 came out as **worse** (−0.050" in third
    assert (
        "choose among all against always tail25 as **no difference that matters** (+0.000" in third
    )
    assert "five checkpoints, which spends them too, as **better** (+0.100" in third
    assert "decaying learning rate came out as **worse** (−0.150" in fourth
    assert "target actor as **worse** (−0.200" in fourth
    assert "without decay minus with it as **above 0** (+0.150" in fourth
    assert fifth.endswith("cells that are missing: none; runs that crashed: 0.")


SIGNS = np.resize([1, -1], 20)


def test_the_sign_of_a_finding_turns_its_words():
    first, second, *_ = headline(study(gains={n: -x for n, x in GAINS.items()}))
    assert "**was worse than** shipping the last iterate: −0.150" in first
    assert "**below 0, indicative** (−0.150" in second
    nothing, *_ = headline(study(gains={}))
    assert "**made no difference that matters to** shipping the last iterate: " in nothing


def test_what_was_not_run_is_said_where_it_would_stand():
    *_, second, third, fourth, fifth = headline(study(CELLS[:3], left_out=range(4, 13)))
    assert "headroom minus the cells where none was expected as not run." in second
    assert third.count("not computed") == 3
    assert fourth.count("not run") == 4
    assert "target actor as **worse**" in fourth
    assert "cells that are missing: cell 4 (lr=x0.25), cell 4 (lr=x0.5)," in fifth
    assert headline(study(CELLS[:2], left_out=range(3, 13))) == [
        "The registered primary test cannot be made: a cell of it was left out."
    ]


@pytest.mark.parametrize(
    ("cells", "left_out"),
    [(CELLS[:2], ()), (CELLS[:-1], ()), (CELLS[:3] + CELLS[4:], ()), (CELLS, [12])],
)
def test_nothing_is_compared_before_all_that_will_be_run_has_ended(cells, left_out):
    under_way = study(cells, left_out=left_out)
    assert not under_way.closed
    assert under_way.cells == {}
    assert all(test.effect is None for test in under_way.secondary())
    (only,) = headline(under_way)
    assert only.startswith("The registered study is under way: nothing of it is compared")


def test_cells_are_left_out_whole_and_from_the_end():
    for wrong in ([11], [4, 12], [12, 12], [13]):
        with pytest.raises(ValueError, match="whole cells are left out from the end"):
            study(left_out=wrong)
    parts = study(CELLS[:4], left_out=range(4, 13))  # one of the three of cell 4
    assert [*parts.cells] == [(1, ""), (2, ""), (3, "")]


def test_the_primary_is_not_shown_where_its_interval_includes_0_whatever_its_p():
    effect = Effect((np.array([0.1] * 9 + [9.0]),), margin=0.02)
    assert effect.p <= 0.01
    assert effect.interval.low < 0
    assert effect.word(effect.p) == "better"
    assert verb(effect) == "**is not settled against**"


def test_predictions_that_failed_are_named():
    *_, fifth = headline(study(gains={**GAINS, 2: 0.3}))
    assert "failed (tail25 - last, cell 2, DQN LunarLander-v3" in fifth
    *_, fifth = headline(study(CELLS[:3], left_out=range(4, 13)))
    # of tail25 in three cells, and of the target actor
    assert fifth.startswith("Of 4 predictions that can be judged 0 failed and 4 held, by")


@pytest.mark.parametrize(
    ("gains", "worth", "answers"),
    [
        (GAINS, {}, ["no", "no", "no", "no"]),
        ({}, {}, ["**yes**", "no", "no", "no"]),
        (GAINS, {"windows": 0.2}, ["no", "**yes**", "no", "no"]),
        (GAINS, {"checkpoints": 0.2}, ["no", "**yes**", "no", "no"]),
        ({**GAINS, 1: -0.15, 5: -0.4}, {}, ["no", "no", "**yes**", "no"]),
        ({**GAINS, 7: 0.1, 8: 0.1, 10: 0.1}, {}, ["no", "no", "no", "**yes**"]),
    ],
)
def test_what_would_change_the_conclusion_is_answered(tmp_path, gains, worth, answers):
    worth = {"windows": -0.1, "choose": 0.0, "checkpoints": -0.1} | worth
    page = Page("", tmp_path)
    found = study(gains=gains, replay=lambda returns, rule, budget: worth[rule] + 0.001 * SIGNS)
    RegisteredReport(page, found).conclusions()
    rows = page.parts[-1].splitlines()[2:]
    assert [row.split(" | ")[-1].rstrip(" |") for row in rows] == answers


@pytest.mark.parametrize(
    ("effect", "p"),
    [
        (Effect((0.3 + 0.1 * SPREAD,), margin=0.02), 0.01),
        (Effect((-0.3 + 0.1 * SPREAD,), margin=0.02), 0.01),
        (Effect((0.3 + 0.1 * SPREAD,), margin=0.02), 0.06),
        (Effect((0.001 + 0.01 * SPREAD,), margin=0.02), 0.5),
        (Effect((0.001 + 0.01 * SPREAD,), margin=0.02, ceiling=True), 0.5),
        (Effect((np.ones(4),), margin=0.02), math.nan),
    ],
)
def test_every_word_has_a_verb(effect, p):
    assert effect.word(p) in VERBS


def test_the_literature_is_named_once_and_can_be_found():
    groups = [group.splitlines() for group in re.split(r"\n\n(?=- )", LITERATURE)[1:]]
    for group in groups:
        years = []
        for line in (line for line in group if line.startswith("- ")):
            work = re.fullmatch(r"- [^()]+ \((\d{4})\)\. (.+?[.?]) (.*\d.*)", line)
            assert work, line
            assert LITERATURE.count(work[2]) == 1
            assert line.endswith(".")
            assert ".." not in line
            assert "?." not in line
            years.append(int(work[1]))
        assert years == sorted(years)
    assert len(groups) == 6
    for name, year in re.findall(r"(\w+) et al\. (\d{4})", PLACE):
        assert re.search(rf"^- {name}, .* \({year}\)\. ", LITERATURE, re.M)
