"""The report on synthetic results whose truth is known: an effect, a null, a ceiling with ties."""

# ruff: noqa: RUF001  (the report's minus signs and dashes)

import csv
import dataclasses
import gzip
import json
import math
import re

import numpy as np
import pytest
from markdown_it import MarkdownIt

from scripts import report
from scripts.experiment.analysis import Effect, contrast, gain
from scripts.experiment.page import Page
from scripts.experiment.registered import REGISTRATION, Prediction, Study, divide, place
from scripts.experiment.registered_report import RegisteredReport
from scripts.experiment.schemes import KNOWN, SCHEMES, is_late
from scripts.experiment.study import CELLS
from scripts.experiment.tidy import COLUMNS, SCALES, Stratum, read_results, read_runs
from scripts.experiment.wording import plain

STEPS = [2500 * (k + 1) for k in range(20)]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([[*COLUMNS, "variant"], *rows])


def synthetic(
    env, gain, runs=12, algo="dqn", variant="", level=0.7, noise=0.05, ceiling=None, ends=None
):
    """Rows of tidy results: each run has a level and a wobble that its schemes share.

    `ceiling` clips the normalised score; `ends` is {seed: points before the run crashed}.
    """
    rng = np.random.default_rng([len(env), runs, len(variant)])
    random, reference = SCALES.get(env, (0.0, 1.0))
    rows = []
    for seed in range(runs):
        run = f"{algo}-{env}-{variant}-{seed}"
        own = level + 0.08 * rng.standard_normal()
        for k, step in enumerate(STEPS[: (ends or {}).get(seed, 20)]):
            effects = {"last": 0.0, "tail25": gain}
            if k == 19:
                effects |= {"tail10": 0.6 * gain, "all": gain - 0.3, "ema1": 0.9 * gain}
                effects |= {"placebo": 0.0, "best": 1.2 * gain}
            wobble = noise * rng.standard_normal()
            for scheme, effect in effects.items():
                mean = own * (1 - np.exp(-(k + 1) / 5)) + wobble
                if scheme != "last":
                    mean += effect + 0.2 * noise * rng.standard_normal()
                scores = mean + 0.02 * rng.standard_normal(4)
                if ceiling is not None:
                    scores = np.minimum(scores, ceiling)
                for episode, score in enumerate(random + (reference - random) * scores):
                    rows.append(
                        [run, env, algo, seed, scheme, step, episode, repr(float(score)), variant]
                    )
    return rows


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Three environments, 12 runs; one run crashed, one not run; a variant."""
    folder = tmp_path_factory.mktemp("results")
    write(folder / "effect.csv.gz", synthetic("CartPole-v1", 0.15, ends={11: 7}))
    write(folder / "null.csv", synthetic("Pendulum-v1", 0.0, algo="ddpg", noise=0.01))
    write(
        folder / "more" / "ceiling.csv",
        synthetic("InvertedPendulum-v5", 0.1, algo="ddpg", level=1.25, ceiling=1.0),
    )
    write(
        folder / "linear.csv",
        synthetic("CartPole-v1", 0.0, runs=6, variant="lr=linear", level=0.85),
    )
    runs = [
        {
            "run": f"dqn-CartPole-v1--{seed}",
            "env": "CartPole-v1",
            "algo": "dqn",
            "seed": seed,
            "status": {11: "crashed", 12: "not run"}.get(seed, "finished"),
            "seconds": 120.0,
            "config": {"learning_rate": 2.3e-3, "seed": seed},
        }
        for seed in range(13)
    ]
    about = {"command": "python -m scripts.compare --tier m", "runs": runs}
    (folder / "runs.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def written(results, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    assert report.main([str(results), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def text(written):
    return (written / "report.md").read_text()


def row(text, *starts):
    """The cells of the first table row that begins so."""
    start = f"| {' | '.join(starts)} |"
    line = next(line for line in text.splitlines() if line.startswith(start))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_the_first_lines_say_what_was_found_where_and_how_surely(text):
    _, first, findings, kind, *_ = text.split("\n\n")
    assert first == (
        "> tail25 (uniform over the last 25 %) against the last iterate, each environment by"
        " itself (95 % intervals, not adjusted; the words are):"
    )
    lines = findings.splitlines()
    assert len(lines) == 4
    found = r"- DQN CartPole-v1 \(11 runs\): \*\*better\*\*, \+0\.1\d\d \[\+0\.\d{3}, \+0\.\d{3}\]"
    assert re.fullmatch(found, lines[0])
    assert kind == "Exploratory: no test of these runs was registered before them."


def test_the_known_effect_the_null_and_the_ceiling_are_told_apart(text):
    assert row(text, "DQN CartPole-v1")[1] == "better"
    assert row(text, "DDPG Pendulum-v1")[1] == "no difference that matters"
    assert row(text, "DDPG InvertedPendulum-v5")[1] == "cannot tell: ceiling"
    assert row(text, r"DQN CartPole-v1 (lr=linear)")[1].endswith(", indicative")


def test_scores_subtract_and_everything_is_a_mean(text):
    for name in ("DQN CartPole-v1", "DDPG Pendulum-v1"):
        difference, last, averaged = (
            float(cell.split()[0].replace("−", "-")) for cell in row(text, name)[5:8]
        )
        assert averaged - last == pytest.approx(difference, abs=1.1e-3)
    plain_row, variant, difference = (
        [float(cell.split()[0].replace("−", "-")) for cell in row(text, *starts)[2:]]
        for starts in (
            ("DQN CartPole-v1", "6"),
            ("DQN CartPole-v1 (lr=linear)", "6"),
            ("difference", "6"),
        )
    )
    for one in (plain_row, variant, difference):
        assert one[1] - one[0] == pytest.approx(one[2], abs=1.6e-3)
    np.testing.assert_allclose(np.subtract(variant, plain_row), difference, atol=1.6e-3)


def test_crashed_and_missing_runs_are_reported_and_weighed(text):
    assert re.search(
        r"Runs of DQN CartPole-v1 that did not reach their end: 1. Counted as no difference: \+0",
        text,
    )
    assert row(text, "DQN CartPole-v1", "13")[2:7] == [
        "11", "1 crashed, 1 not run", "50 000", "20", "0–11",
    ]  # fmt: skip
    assert row(text, "DQN CartPole-v1", "dqn-CartPole-v1--11")[2:] == ["crashed", "17500"]
    assert "- command: python -m scripts.compare --tier m" in text
    assert row(text, r"learning\_rate")[1] == "0.0023"


def test_baselines_and_placebo_say_what_they_are(text):
    assert text.count("best of 20 checkpoints, a baseline that spends 480 episodes") == 4
    assert text.count("placebo: last iterate, other episodes") == 4
    assert "oracle" not in text


def test_the_known_scores_are_printed(text):
    assert row(text, "DDPG Pendulum-v1", "–")[7] == "-1239 to -150"


def test_the_page_stands_alone_and_the_figures_are_written_twice(written):
    page = (written / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    names = {path.stem for path in (written / "figures").iterdir()}
    assert names == {"forest", "curves", "shares", "dose"}
    for name in names:
        assert (written / "figures" / f"{name}.png").stat().st_size > 5_000
        assert (written / "figures" / f"{name}.svg").stat().st_size > 5_000
    assert page.count("data:image/svg+xml;base64,") == len(names)
    assert page.count('<div class="scroll"') == page.count("<table>") > 5


def test_the_same_results_give_the_same_page(results, written, tmp_path):
    report.main([str(results), "--out", str(tmp_path)])
    assert (tmp_path / "report.html").read_bytes() == (written / "report.html").read_bytes()


# --- words ---------------------------------------------------------------------------------------

SPREAD = np.linspace(-1, 1, 12)


@pytest.mark.parametrize(
    ("effect", "p", "word"),
    [
        (Effect((0.3 + 0.1 * SPREAD,), margin=0.02), 0.01, "better"),
        (Effect((-0.3 + 0.1 * SPREAD,), margin=0.02), 0.01, "worse"),
        (Effect((0.3 + 0.1 * SPREAD,), margin=0.02), 0.06, "not settled"),
        (Effect((0.3 + 0.1 * SPREAD,), margin=0.02), math.nan, "not settled"),
        (Effect((0.001 + 0.01 * SPREAD,), margin=0.02), 0.5, "no difference that matters"),
        (Effect((0.001 + 0.01 * SPREAD,), margin=0.02), 0.04, "better"),
        (Effect((0.001 + 0.1 * SPREAD,), margin=0.02), 0.5, "not settled"),
        (Effect((0.001 + 0.1 * SPREAD,), margin=math.nan), 0.5, "not settled"),
        (Effect((0.001 + 0.01 * SPREAD,), margin=0.02, ceiling=True), 0.5, "cannot tell: ceiling"),
        (Effect((0.3 + 0.1 * SPREAD,), margin=0.02, ceiling=True), 0.01, "better"),
        (Effect((np.ones(4),), margin=0.02), math.nan, "too few runs"),
        (Effect((np.ones(12), np.ones(4)), margin=0.02), math.nan, "too few runs"),
    ],
)
def test_words_follow_the_adjusted_p_then_ceiling_then_margin(effect, p, word):
    assert effect.word(p) == word


def stratum(scores, env="CartPole-v1", steps=20, seeds=None, algo="dqn"):
    """One with these final scores [N] by scheme, one episode a point."""
    n = len(next(iter(scores.values())))
    seeds = seeds or [str(seed) for seed in range(n)]
    curves = {
        name: np.repeat(np.asarray(x, float)[:, None], steps, 1) for name, x in scores.items()
    }
    final = {name: x[:, -1:] for name, x in curves.items()}
    return Stratum(
        env,
        algo,
        "",
        seeds,
        seeds,
        2500.0 * np.arange(1, steps + 1),
        curves,
        final,
        SCALES.get(env),
    )


def test_the_margin_is_a_fifth_of_a_standard_deviation_of_last_and_the_mean_of_cells():
    a = stratum({"last": [100, 200, 300, 400, 480], "tail25": [100, 200, 300, 400, 490]})
    b = stratum({"last": [90, 90, 90, 90, 90], "tail25": [90, 90, 90, 90, 90]})
    sd = np.std([100, 200, 300, 400, 480], ddof=1) / 478
    assert gain(a).margin == pytest.approx(0.2 * sd)
    assert gain(a, b).margin == pytest.approx(0.1 * sd)


@pytest.mark.parametrize(("at_top", "ceiling"), [(3, False), (4, True)])
def test_a_ceiling_is_over_half_of_the_pairs_both_at_the_largest_return(at_top, ceiling):
    last = np.where(np.arange(6) < at_top, 500.0, 300.0)
    s = stratum({"last": last, "tail25": last})
    assert gain(s).ceiling == ceiling
    assert not gain(stratum({"last": last, "tail25": last}, env="Chess-v0")).ceiling


def test_a_difference_is_of_the_episodes_that_both_played():
    s = stratum({"last": [10.0], "tail25": [30.0]}, env="Chess-v0")
    s.final["last"] = np.array([[10.0, 20.0, 90.0]])
    s.final["tail25"] = np.array([[11.0, 23.0, np.nan]])
    assert gain(s).samples[0] == pytest.approx([2.0])
    assert s.shipped("last") == pytest.approx([40.0])


def test_endpoints_are_the_last_point_and_the_points_from_80_percent_on(tmp_path):
    rows = []
    for seed, up in ((1, 10.0), (10, 30.0), (2, 20.0)):
        for k in range(1, 11):
            for episode in range(4 if k == 10 else 2):  # more episodes weigh no more
                for scheme, more in (("last", 0.0), ("tail25", up)):
                    score = 100.0 * k + more + (episode % 2)
                    rows.append([f"r{seed}", "CartPole-v1", "dqn", seed, scheme, k, episode, score])
    write(tmp_path / "r.csv", [[*r, ""] for r in rows])
    (s,) = read_results([tmp_path / "r.csv"])
    assert s.seeds == ["1", "2", "10"]
    np.testing.assert_allclose(s.shipped("last"), (1000.5 - 22) / 478)
    np.testing.assert_allclose(s.late("last"), (900.5 - 22) / 478)  # points 8, 9 and 10
    np.testing.assert_allclose(gain(s).samples[0], np.array([10, 20, 30]) / 478)
    np.testing.assert_allclose(s.worst("last"), (1000 - 22) / 478)
    np.testing.assert_allclose(s.wobble("last"), np.std([6, 7], ddof=1) * 100 / 478)


def test_contrasts_pair_by_training_seed():
    a = stratum({"last": [22, 22, 500]}, seeds=["1", "2", "3"])
    b = stratum({"last": [261, 22, 22]}, seeds=["3", "4", "1"])
    effect = contrast([(1, b, "last"), (-1, a, "last")])
    assert effect.samples[0] == pytest.approx([-0.5, 0])


def test_a_contrast_is_at_the_ceiling_where_over_half_of_its_seeds_are():
    seeds = [str(i) for i in range(10)]
    full = stratum({"last": [500] * 6 + [300] * 4}, seeds=seeds)
    most = stratum({"tail25": [500] * 6 + [400] * 4, "last": [500] * 10}, seeds=seeds)
    half = stratum({"tail25": [500] * 5 + [400] * 5, "last": [500] * 10}, seeds=seeds)
    assert contrast([(1, full, "last"), (-1, most, "tail25")]).ceiling
    assert not contrast([(1, full, "last"), (-1, half, "tail25")]).ceiling


def test_equal_scores_come_to_exactly_nothing_in_a_contrast():
    rng = np.random.default_rng(0)
    terms = []
    for weight in (-0.3, -0.1, 0.1, 0.3):
        score = rng.uniform(22, 400, 20)
        s = stratum({"last": score, "tail25": score}, seeds=[str(i) for i in range(20)])
        s = dataclasses.replace(s, variant=str(weight))
        terms += [(weight, s, "tail25"), (-weight, s, "last")]
    assert contrast(terms).counts == (0, 20, 0)


# --- the registration ---------------------------------------------------------------------------


def test_cells_scales_and_predictions_are_those_of_the_registration():
    said = REGISTRATION.read_text()
    for env, low, high in re.findall(r"^\| ([\w-]+-v\d) \| (\S+) \| (\S+) \|$", said, re.M):
        assert SCALES[env] == (float(low), float(high))
    table = re.findall(r"^\| (\d+) \| [^|]*\| ([\dx ]+) \| [^|]* \| ([^|]*) \|$", said, re.M)
    assert [int(number) for number, *_ in table] == list(range(1, 13))
    predictions = {p.about: p for p in Study({}, []).predictions()}
    for number, runs, text in table:
        cells = [cell for cell in CELLS if cell.number == int(number)]
        times, _, each = runs.rpartition("x ")
        assert len(cells) == int(times or 1)
        assert {cell.runs for cell in cells} == {int(each)}
        if span := re.match(r"([-+.\d]+) to ([-+.\d]+)", text):
            low, high = sorted(map(float, span.groups()))
            (p,) = (
                p for name, p in predictions.items() if f"tail25 - last, cell {number}," in name
            )
            assert (p.low, p.high) == (low, high)


@pytest.mark.parametrize(
    ("low", "high", "shift", "outcome"),
    [
        (0.1, 0.2, 0.15, "held"),
        (0.1, 0.2, 0.09, "neither held nor failed"),
        (0.1, 0.2, 0.05, "failed"),
        (0.0, 0.0, 0.05, "failed"),
        (0.0, 0.0, 0.001, "held"),
        (0.0, math.inf, 0.05, "held"),
        (0.0, math.inf, 0.005, "neither held nor failed"),
        (0.0, math.inf, -0.05, "failed"),
    ],
)
def test_a_prediction_fails_where_the_interval_excludes_it(low, high, shift, outcome):
    effect = Effect((shift + 0.03 * SPREAD,), margin=0.02)  # the interval is +-.013
    assert Prediction("", low, high, effect).outcome == outcome
    assert Prediction("", low, high, None).outcome == "not run"


REST = range(4, 13)  # cells that are left out


def registered(cell, runs=None, seeds=None):
    n = runs or cell.runs
    rng = np.random.default_rng(cell.number)
    last = rng.uniform(0, 1, n)
    scores = {"last": last, "tail25": last + 0.1}
    seeds = seeds or [str(201 + i) for i in range(n)]
    s = stratum(scores, cell.env_id, seeds=seeds, algo=cell.algo)
    total = {"CartPole-v1": 50_000}.get(cell.env_id, 100_000)
    s.steps[:] = total * np.arange(1, 21) / 20
    return s


def test_a_cell_counts_when_all_of_its_runs_have_ended():
    whole, partial = registered(CELLS[0]), registered(CELLS[1], 19)
    strata, others = divide([whole, partial])
    study = Study(strata, [], left_out=range(2, 13))
    assert others == []
    assert [*study.cells] == [place(CELLS[0])]
    assert study.absent[2, ""] == "19 of 20 runs have ended"
    assert study.absent[3, ""] == "not run"
    assert study.primary() == {}
    assert [t.number for t in study.secondary() if t.in_family] == [1]
    (first,) = (t for t in study.secondary() if t.number == 1)
    assert first.p == first.effect.p  # the only one of the family
    assert Study(strata, []).absent[1, ""] == "20 of 20 runs have ended"


def test_the_three_tests_that_choose_are_those_of_the_family():
    strata = {s.key: s for s in map(registered, CELLS[:3])}
    worth = {"windows": 0.3, "choose": 0.5, "checkpoints": 0.1}
    ask = []

    def stub(returns, rule, budget):
        ask.append(budget)
        return np.full(20, worth[rule]) + np.linspace(-0.1, 0.1, 20)

    tests = {test.number: test for test in Study(strata, [], stub, REST).secondary()}
    estimates = [float(tests[n].effect.interval.estimate) for n in (5, 6, 7)]
    assert estimates == pytest.approx([0.3, 0.5, 0.4])
    assert {tests[n].effect.runs for n in (5, 6, 7)} == {60}
    assert set(ask) == {60}
    assert all(tests[n].p <= 0.05 for n in (5, 6, 7))


def test_without_a_replay_the_three_are_named_and_counted():
    strata = {s.key: s for s in map(registered, CELLS[:3])}
    tests = Study(strata, [], left_out=REST).secondary()
    assert [test.number for test in tests if not test.computed] == [5, 6, 7]
    assert [test.number for test in tests if test.in_family] == [1, 2, 3, 5, 6, 7, 9]
    assert tests[0].p == pytest.approx(6 * tests[0].effect.p)


def test_budgets_are_shown_side_by_side(tmp_path):
    page = Page("", tmp_path)
    strata = {s.key: s for s in map(registered, CELLS[:3])}

    def stub(returns, rule, budget):
        return np.full(20, 0.01 * budget) if budget else np.full(20, np.nan)

    RegisteredReport(page, Study(strata, [], stub, REST)).budgets()
    _, _, table, note = page.parts
    assert row(table, "best of ten windows, equal numbers")[1:3] == ["–", "+0.050 [+0.050, +0.050]"]
    assert row(table, "choose minus best of last and five checkpoints")[1:3] == [
        "–",
        "+0.000 [+0.000, +0.000]",
    ]
    assert row(table, "minus always tail25")[-1] == "120 episodes"
    assert re.search(r"`polyak_rl.choose` is that of commit \w{7,}", note)


def test_the_same_setting_with_other_seeds_or_another_length_is_not_registered():
    seeds = [str(s) for s in (1, 2, *range(201, 221))]
    mixed = registered(CELLS[0], 22, seeds)
    strata, (rest,) = divide([mixed])
    assert strata[mixed.key].seeds == seeds[2:]
    assert rest.seeds == ["1", "2"]
    short = registered(CELLS[0])
    short.steps[:] /= 2
    strata, (rest,) = divide([short])
    assert strata == {}
    assert rest.seeds == short.seeds


def test_nothing_is_shown_of_a_cell_that_has_not_ended(tmp_path):
    rows = synthetic("CartPole-v1", 0.15, runs=3)
    write(tmp_path / "r.csv", [[r[0], r[1], r[2], 201 + r[3], *r[4:]] for r in rows])
    assert report.main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "- cell 1, DQN CartPole-v1: 3 of 20 runs have ended" in text
    assert not re.search(r"[+−]0\.\d{3}", text)
    assert "![" not in text
    assert row(text, "DQN CartPole-v1", "–")[2:4] == ["3", "none"]


def test_the_schemes_of_the_rows_are_those_of_the_table():
    assert len({scheme.label for scheme in KNOWN.values()}) == len(KNOWN)
    assert [name for name, s in SCHEMES.items() if s.place] == [
        "tail5", "tail10", "tail25", "tail50", "all", "ema1",
    ]  # fmt: skip
    assert all(scheme.name == name for name, scheme in KNOWN.items())
    assert not any(scheme.rule and scheme.when == "never" and name in SCHEMES
                   for name, scheme in KNOWN.items())  # fmt: skip


# --- what others bring --------------------------------------------------------------------------


def first_lines(folder, *options):
    assert report.main([str(folder), *options]) == 0
    return (folder / "report.md").read_text()


def test_an_unknown_environment_is_reported_raw_until_its_scores_are_given(tmp_path):
    rows = [r[:-1] for r in synthetic("Chess-v0", 0.5, algo="ppo_other_tool") if r[5] > 40_000]
    write(tmp_path / "r.csv", rows)
    text = first_lines(tmp_path)
    assert re.search(r"- ppo\\_other\\_tool Chess-v0 \(12 runs\): \*\*better\*\*, \+0\.[45]", text)
    assert "Raw scores, as no random and reference score is known" in text
    assert not (tmp_path / "figures" / "forest.png").exists()
    text = first_lines(tmp_path, "--random-score", "-1", "--reference-score", "1")
    assert re.search(r"\*\*better\*\*, \+0\.2", text)
    assert "-1 to 1" in text
    assert "Raw scores" not in text


def test_scores_may_stand_in_runs_json(tmp_path):
    write(tmp_path / "r.csv", [["r", "Chess-v0", "a", 0, "last", 1, 0, 5.0, ""]])
    (tmp_path / "runs.json").write_text(json.dumps({"scores": {"Chess-v0": [0, 10]}, "runs": []}))
    text = first_lines(tmp_path)
    assert row(text, "A Chess-v0")[6] == "0.500"


EXTERNAL = """run,env,algo,seed,scheme,step,episode,return
Hopper-v3__sac,Hopper-v3,sac,1,last,900000,0,2310.5
Hopper-v3__sac,Hopper-v3,sac,1,last,900000,1,2290.5
Hopper-v3__sac,Hopper-v3,sac,1,last,1000000,0,2400
Hopper-v3__sac,Hopper-v3,sac,1,last,1000000,1,2420
Acrobot-v1__a2c,Acrobot-v1,a2c,1,last,10000,0,-500
Acrobot-v1__a2c,Acrobot-v1,a2c,1,last,20000,0,-90
"""


def test_results_that_hold_last_alone_compare_nothing_and_say_so(tmp_path):
    (tmp_path / "r.csv").write_text(EXTERNAL)
    text = first_lines(tmp_path)
    assert (
        "> Nothing is compared: no run of A2C Acrobot-v1 and SAC Hopper-v3 was evaluated with"
        " tail25 beside last." in text
    )
    assert row(text, "SAC Hopper-v3")[1:8] == ["too few runs", "–", "–", "1", "–", "2410", "–"]
    for word in ("better\\*", "worse\\*", "not settled", "no difference that matters |"):
        assert word not in text.split("## How")[0].replace("better / tied / worse", "")


def test_what_names_hold_is_shown_and_does_nothing(tmp_path):
    evil = "<script>alert(1)</script>|$^$ `x` [a](http://b) ![i](j) **b** _u_ # &lt;\n## h"
    rows = synthetic("X", 0.3, runs=2)
    rows = [[evil, evil, evil, evil + str(r[3]), *r[4:7], r[7], evil] for r in rows]
    for r in rows:
        r[4] = {"tail10": evil}.get(r[4], r[4])
    write(tmp_path / "r.csv", [r for r in rows if r[5] > 40_000])
    run = {"run": evil, "env": evil, "algo": evil, "seed": evil, "status": evil, "variant": evil}
    run["config"] = {evil: evil}
    (tmp_path / "runs.json").write_text(
        json.dumps({evil: evil, "runs": [run, {**run, "run": "b"}]})
    )
    text = first_lines(tmp_path)
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    for page in (shown, (tmp_path / "report.html").read_text()):
        assert "<script" not in page
        assert "http://b" in page
        assert not re.search(r"<a |<h2>h|<em>|<strong>b|<code>x", page)
        assert page.count("<img") == text.count("(figures/") > 0
    assert plain("a_b|c\n d") == r"a\_b\|c d"


def test_a_row_given_twice_counts_once_and_a_contradiction_is_refused(tmp_path):
    rows = [["r", "E", "a", 0, "last", 1, 0, 5.0, ""]]
    write(tmp_path / "r.csv", rows * 2)
    (s,) = read_results([tmp_path / "r.csv"])
    assert s.scores["last"].tolist() == [[5.0]]
    write(tmp_path / "r.csv", [*rows, [*rows[0][:7], 6.0, ""]])
    with pytest.raises(ValueError, match=r"line 3: one return an episode, got 5.0 and 6.0"):
        read_results([tmp_path / "r.csv"])


ONE = ["r", "E", "a", 0, "last", 1, 0, 1.0, ""]


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([[*ONE[:7], "nan", ""]], "line 2: return must be finite, got nan"),
        ([[*ONE[:5], "x", *ONE[6:]]], "line 2: step and return must be numbers"),
        ([[*ONE[:5], "inf", *ONE[6:]]], "line 2: step and return must be numbers"),
        ([[*ONE[:5], "-3", *ONE[6:]]], "line 2: expected 8 values and a step from 0 on"),
        ([["x" * 140_000, *ONE[1:]]], "cannot be read as a table, field larger than field limit"),
        (
            [[*ONE[:5], k, *ONE[6:]] for k in (1, 2)] + [["q", "E", "a", 1, "last", 3, 0, 1.0, ""]],
            r"evaluated at the same steps, got \[3\] in run q alone",
        ),
        ([[*ONE[:4], "tail25", *ONE[5:]]], "expected finished runs with the scheme last"),
        ([ONE, [*ONE[:4], "tail50", *ONE[5:]]], r"primary must be one of the schemes \['last', "),
    ],
)
def test_results_that_cannot_be_reported_are_refused_in_one_sentence(tmp_path, capsys, rows, text):
    write(tmp_path / "r.csv", rows)
    assert report.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(text, error)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("[" * 200_000, "not a list of runs"),
        ('{"runs": 5}', "not a list of runs"),
        ('["x"]', "a run must have names and values, got x"),
        ('[{"run": 1}]', "missing .'env', 'algo', 'seed', 'status'. in"),
        ('[{"run": 1, "env": 2, "algo": 3, "seed": 4, "status": 5, "config": [1]}]', "not a list"),
        ('[{"run": 1, "env": 2, "algo": 3, "seed": 4, "status": 5, "seconds": "y"}]', "not a list"),
        ('{"scores": {"E": [1, 1]}, "runs": []}', "must be .random, reference. by environment"),
        ('{"scores": 3, "runs": []}', "must be .random, reference. by environment"),
        ("\xff", "not a list of runs"),
    ],
)
def test_a_runs_json_that_is_none_is_refused_in_one_sentence(tmp_path, capsys, said, text):
    write(tmp_path / "r.csv", [ONE])
    (tmp_path / "runs.json").write_text(said, encoding="latin-1")
    assert report.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.search(text, error)
    assert error.count("\n") == 1
    assert len(error) < 600


@pytest.mark.parametrize("depth", range(860, 1000, 20))
def test_a_value_too_deep_to_be_shown_is_refused_like_one_too_deep_to_be_read(tmp_path, depth):
    write(tmp_path / "r.csv", [ONE])
    nested = "[" * depth + "]" * depth
    (tmp_path / "runs.json").write_text(f'{{"command": {nested}, "runs": []}}')
    said = ""
    try:
        _, about = read_runs([tmp_path / "r.csv"])
    except ValueError as error:
        said = str(error)
    assert "not a list of runs" in said or about["command"] == nested


def test_runs_json_with_other_types_is_read_as_text(tmp_path):
    run = {"run": 1, "env": None, "algo": 3, "seed": 4, "status": "not_run", "seconds": None}
    (tmp_path / "runs.json").write_text(json.dumps([run]))
    ((found,), about) = read_runs([tmp_path / "r.csv"])
    assert (found.run, found.env, found.status, about) == ("1", "None", "not run", {})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--random-score", "1"], "give both --random-score and --reference-score"),
        (["--random-score", "1", "--reference-score", "1"], "must differ, got 1.0 twice"),
    ],
)
def test_scores_are_given_in_pairs(tmp_path, capsys, options, text):
    write(tmp_path / "r.csv", [ONE])
    assert report.main([str(tmp_path), *options]) == 2
    assert text in capsys.readouterr().err


def test_missing_columns_and_missing_files_are_named(tmp_path, capsys):
    (tmp_path / "r.csv").write_text("run,env\n1,E\n")
    assert report.main([str(tmp_path)]) == 2
    assert re.search(r"missing \['algo', 'seed', 'scheme'", capsys.readouterr().err)
    assert report.main([]) == 2
    assert "give results" in capsys.readouterr().err
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert "no such" in capsys.readouterr().err
    (tmp_path / "r.csv").unlink()
    (tmp_path / "broken.csv.gz").write_bytes(b"\x1f\x8b not gzip")
    assert report.main([str(tmp_path)]) == 2
    assert "cannot be read as a table" in capsys.readouterr().err


@pytest.mark.parametrize("total", [12_346, 50_000, 99_999])
def test_the_last_five_of_twenty_points_are_late_wherever_they_fall(total):
    points = np.arange(1, 21)
    assert np.array_equal(is_late(total * points // 20, total), points >= 16)
