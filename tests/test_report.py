"""The report on synthetic results whose truth is known: an effect, a null, a ceiling with ties."""

# ruff: noqa: RUF001  (the report's minus signs and dashes)

import csv
import gzip
import json
import re

import numpy as np
import pytest

from scripts import report
from scripts.experiment import analysis, stats
from scripts.experiment.tidy import COLUMNS, SCALES, Stratum, read_results

LATE = ["suffix90", "suffix75", "suffix25", "suffix10", "ema0.1", "ema0.3", "ema3", "ema10"]
LATE += ["power6.94", "power16.97", "lawa", "best", "placebo"]
CORE = ["last", "suffix50", "uniform0", "ema1"]
LINE = {f"line{x:g}": x for x in (-0.5, 0, 0.25, 0.5, 0.75, 1, 1.5)}
STEPS = [2500 * (k + 1) for k in range(20)]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([[*COLUMNS, "variant"], *rows])


def effect_of(scheme, gain):
    """The true normalised gain of a scheme over last, given that of suffix50."""
    if scheme in ("last", "placebo"):
        return 0.0
    if scheme == "uniform0":
        return gain - 0.3
    if scheme in LINE:
        return gain * LINE[scheme] * (2 - LINE[scheme])  # a parabola with its top at the average
    return gain * {"ema0.1": 0.2, "ema0.3": 0.5, "suffix10": 0.6, "best": 1.2}.get(scheme, 0.9)


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
            schemes = [*CORE, *(LATE if k >= 15 else []), *(LINE if k == 19 else [])]
            wobble = noise * rng.standard_normal()
            for scheme in schemes:
                mean = own * (1 - np.exp(-(k + 1) / 5)) + wobble
                if scheme != "last":
                    mean += effect_of(scheme, gain) + 0.2 * noise * rng.standard_normal()
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
    """Three environments, 12 runs; one run crashed, one not run; two kinds of variant."""
    folder = tmp_path_factory.mktemp("results")
    write(folder / "effect.csv.gz", synthetic("CartPole-v1", 0.15, ends={11: 7}))
    write(folder / "null.csv", synthetic("Pendulum-v1", 0.0, algo="ddpg", noise=0.01))
    write(
        folder / "more" / "ceiling.csv",
        synthetic("InvertedPendulum-v5", 0.1, algo="ddpg", level=1.15, ceiling=1.0),
    )
    for variant, gain, level in (
        ("lr=linear", 0.0, 0.85),
        ("target=hard:128", 0.15, 0.7),
        ("target=soft:0.0155", 0.15, 0.75),
        ("target=hard:1024", 0.15, 0.6),
        ("target=soft:0.00195", 0.15, 0.6),
    ):
        write(
            folder / f"{variant.replace(':', '-')}.csv",
            synthetic("CartPole-v1", gain, runs=6, variant=variant, level=level),
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
    report.main([str(results), "--out", str(out), "--resamples", "2000"])
    return out


@pytest.fixture(scope="module")
def text(written):
    return (written / "report.md").read_text()


def test_the_first_sentence_says_what_was_found_where_and_how_surely(text):
    finding = text.split("\n\n")[1]
    assert "Averaging the policy's weights uniformly over the last 50 % of training" in finding
    for name in ("DQN CartPole-v1 (11 runs)", "DDPG Pendulum-v1 (12", "DDPG InvertedPendulum-v5"):
        assert name in finding
    assert re.search(r"\+0\.\d{3} \[[+−]0\.\d{3}, \+0\.\d{3}\]", finding)


def row(text, *starts):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {' | '.join(starts)} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_known_effect_the_null_and_the_ceiling_are_told_apart(text):
    assert row(text, "DQN CartPole-v1", "11")[-1] == "better"
    assert row(text, "DDPG Pendulum-v1", "12")[-1] == "no difference that matters"
    iqm, mean = row(text, "DDPG InvertedPendulum-v5", "12")[4:6]
    assert "[" not in iqm
    assert "[" in mean
    assert "On DDPG InvertedPendulum-v5, 50 % of the pairs are exact ties: no interval" in text


def test_crashed_and_missing_runs_are_reported_and_weighed(text):
    assert "Runs that ended before their last evaluations: 1 on DQN CartPole-v1." in text
    assert "Counting them as no difference: interquartile mean +0." in text
    assert "| DQN CartPole-v1 | 13 | 11 | 1 crashed, 1 not run | 50 000 | 20 | 0–11 |" in text
    assert row(text, "DQN CartPole-v1", "dqn-CartPole-v1--11")[2:] == ["crashed", "17500"]
    assert "`python -m scripts.compare --tier m`" in text
    assert row(text, "`learning_rate`")[1] == "0.0023"


def test_variants_stay_out_of_the_main_analysis(results, tmp_path, text):
    plain = [str(p) for p in (results / "effect.csv.gz", results / "null.csv", results / "more")]
    report.main([*plain, "--out", str(tmp_path), "--resamples", "2000"])
    assert (tmp_path / "report.md").read_text().split("\n\n")[1] == text.split("\n\n")[1]


def test_the_learning_rate_study_is_a_two_by_two_with_its_interaction(text):
    decay = row(text, "DQN CartPole-v1", "decay − constant")
    assert decay[-1].startswith("−0.1")
    assert row(text, "DQN CartPole-v1", "linear decay")[2].startswith("0.8")


def test_hard_and_soft_targets_are_matched_by_mean_age(text):
    assert row(text, "DQN CartPole-v1", "128")[2:4] == ["0.0155", "63.5"]
    assert row(text, "DQN CartPole-v1", "1024")[2:4] == ["0.001951", "511.5"]


def test_oracle_and_placebo_are_marked(text):
    assert text.count("| best checkpoint, fresh episodes (oracle) † |") == 4
    assert text.count("| last iterate, other episodes (placebo) ‡ |") == 4
    assert "The placebo's interval of the mean misses 0 on 0 of 3 environments" in text


def test_the_page_stands_alone_and_the_figures_are_written_twice(written):
    page = (written / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    names = {path.stem for path in (written / "figures").iterdir()}
    assert names == {
        "forest", "curves", "profile", "sensitivity", "stability", "line", "decay", "targets"
    }  # fmt: skip
    for name in names:
        assert (written / "figures" / f"{name}.png").stat().st_size > 5_000
        assert (written / "figures" / f"{name}.svg").stat().st_size > 5_000
    assert page.count("data:image/svg+xml;base64,") == len(names)


def test_the_same_results_give_the_same_page(results, written, tmp_path):
    report.main([str(results), "--out", str(tmp_path), "--resamples", "2000"])
    assert (tmp_path / "report.html").read_bytes() == (written / "report.html").read_bytes()


def stripped(rows, runs=12, schemes=("last", "suffix50"), points=20):
    """What another tool may have: fewer runs, schemes and points, no variant column."""
    steps = set(STEPS[-points:])
    return [r[:-1] for r in rows if r[3] < runs and r[4] in schemes and r[5] in steps]


def first_sentence(folder, *options):
    report.main([str(folder), "--resamples", "500", *options])
    return (folder / "report.md").read_text().split("\n\n")[1]


def test_an_average_chosen_on_some_seeds_is_judged_by_others_only():
    seeds = [str(seed) for seed in (10, 2, 11, 1, 12, 3, 9, 20, 21)]  # 1, 2 and 3 choose
    first = np.isin(seeds, ["1", "2", "3"])
    wobble = np.arange(9.0) / 100
    scores = {
        "last": np.zeros(9),
        "lucky": np.where(first, 60.0, -40.0) + wobble,  # the best of the first, bad afterwards
        "steady": np.full(9, 50.0) + wobble,
        "best": np.full(9, 90.0),  # an oracle is no choice
    }
    stratum = Stratum(
        "Walker2d-v5",
        "sac",
        "",
        seeds,
        seeds,
        np.ones(1),
        {n: x[:, None] for n, x in scores.items()},
        {},
    )
    span = SCALES["Walker2d-v5"][1] - SCALES["Walker2d-v5"][0]
    name, there, comparison = analysis.choose(stratum, 3, np.random.default_rng(0), 500)
    assert name == "lucky"
    assert there == pytest.approx(np.mean(60 + wobble[first]) / span)
    assert comparison.runs == 6
    assert comparison.losses == 6
    assert comparison.mean.estimate == pytest.approx(np.mean(-40 + wobble[~first]) / span)
    assert analysis.choose(stratum, 5, np.random.default_rng(0), 500) is None  # four are too few


def test_the_choice_is_reported_where_it_is_asked_for(results, tmp_path, text):
    assert "Chosen on some seeds" not in text
    report.main([str(results), "--out", str(tmp_path), "--resamples", "500", "--choose-on", "5"])
    _, section = (
        (tmp_path / "report.md").read_text().split("## Chosen on some seeds, tested on others")
    )
    section = section.split("## ")[0]
    assert row(section, "DQN CartPole-v1")[3] == "6"  # 11 finished, the first 5 chose
    assert row(section, "DQN CartPole-v1")[-1] == "better, indicative"


def test_an_unknown_environment_is_reported_raw_and_never_aggregated(tmp_path):
    for env, gain in (("Chess-v0", 0.5), ("Go-v0", 0.0)):
        write(tmp_path / f"{env}.csv", stripped(synthetic(env, gain, algo="ppo_other_tool")))
    finding = first_sentence(tmp_path)
    assert "ppo_other_tool Chess-v0 (12 runs): better, +0.4" in finding
    assert "ppo_other_tool Go-v0 (12 runs): not settled, " in finding
    text = (tmp_path / "report.md").read_text()
    assert "No random and reference score is known for" in text
    assert "all runs**" not in text
    assert not (tmp_path / "figures" / "forest.png").exists()


@pytest.mark.parametrize(
    ("runs", "said", "interval"),
    [(3, "in too few runs to conclude anything", 0), (7, "indicative", 1)],
)
def test_few_runs_are_indicative_and_fewer_have_no_interval(tmp_path, runs, said, interval):
    write(tmp_path / "r.csv", stripped(synthetic("CartPole-v1", 0.15), runs, points=2))
    finding = first_sentence(tmp_path)
    assert said in finding
    assert finding.count("[") == interval
    table = (tmp_path / "report.md").read_text().split("## How")[0]
    assert ("[" in table.replace("![", "")) == bool(interval)


@pytest.mark.parametrize(
    ("gain", "noise", "said"),
    [
        (-0.2, 0.02, "scored lower than the last iterate on"),
        (0.0, 0.01, "made no difference that matters (the interval lies inside ±2 %) on"),
        (0.0, 1.0, "showed no clear effect, nor can one be excluded, on"),
        (0.012, 0.01, "scored higher than the last iterate, yet by less than 2 %, on"),
    ],
)
def test_the_finding_says_worse_null_open_and_small(tmp_path, gain, noise, said):
    write(tmp_path / "r.csv", stripped(synthetic("CartPole-v1", gain, noise=noise)))
    assert said in first_sentence(tmp_path)


@pytest.mark.parametrize(
    ("moved", "said", "interval"),
    [(0, "changed nothing (every pair is an exact tie)", 0), (5, "no clear effect", 0),
     (8, "scored higher than the last iterate", 0), (10, "scored higher", 1)],
)  # fmt: skip
def test_where_most_runs_tie_the_sign_flips_decide_and_no_interval_is_given(
    tmp_path, moved, said, interval
):
    """20 runs of which `moved` gain; p of that is 2^(1 - moved)."""
    rows = [
        [f"r{seed}", "CartPole-v1", "dqn", seed, scheme, 1, 0, score, ""]
        for seed in range(20)
        for scheme, score in (("last", 400.0), ("suffix50", 400.0 + 3 * seed * (seed > 19 - moved)))
    ]
    write(tmp_path / "r.csv", rows)
    finding = first_sentence(tmp_path, "--resamples", "2000")
    assert said in finding
    assert finding.count("[") == interval
    assert f"{100 - 5 * moved} % of the pairs tied exactly" in finding


def test_endpoints_are_means_of_the_last_five_points_over_episode_means(tmp_path):
    rows = []
    for seed, gain in ((1, 10.0), (10, 30.0), (2, 20.0)):
        for k in range(7):
            for episode in range(4 if k == 6 else 2):  # more episodes weigh no more
                for scheme, up in (("last", 0.0), ("suffix50", gain)):
                    score = 100.0 * k + up + (episode % 2)
                    rows.append([f"r{seed}", "CartPole-v1", "dqn", seed, scheme, k, episode, score])
    write(tmp_path / "r.csv", [[*r, ""] for r in rows])
    (s,) = read_results([tmp_path / "r.csv"])
    assert s.seeds == ["1", "2", "10"]
    np.testing.assert_allclose(s.endpoint("last"), 400.5)
    np.testing.assert_allclose(s.difference("suffix50"), np.array([10, 20, 30]) / 478)
    np.testing.assert_allclose(s.tails["last"][0], 100.0 * np.arange(7))


def test_the_primary_interval_is_the_stratified_bootstrap_of_paired_differences(results):
    strata = read_results([results / "effect.csv.gz", results / "null.csv"])
    c = analysis.compare(strata, "suffix50", np.random.default_rng(5), 400)
    d = [s.difference("suffix50") for s in strata]
    assert [x.size for x in d] == [11, 12]  # the crashed run has no pair
    assert c.iqm == stats.bootstrap_interval(d, np.random.default_rng(5), resamples=400)
    assert c.mean == stats.mean_interval(*d)


def test_a_row_given_twice_counts_once_and_a_contradiction_is_refused(tmp_path):
    rows = [["r", "E", "a", 0, "last", 1, 0, 5.0, ""]]
    write(tmp_path / "r.csv", rows * 2)
    (s,) = read_results([tmp_path / "r.csv"])
    assert s.scores["last"].tolist() == [[5.0]]
    write(tmp_path / "r.csv", [*rows, [*rows[0][:7], 6.0, ""]])
    with pytest.raises(ValueError, match=r"line 3: one return an episode, got 5.0 and 6.0"):
        read_results([tmp_path / "r.csv"])


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([["r", "E", "a", 0, "last", 1, 0, "nan", ""]], "line 2: return must be finite, got nan"),
        ([["r", "E", "a", 0, "last", "x", 0, 1.0, ""]], "line 2: step and return must be numbers"),
        (
            [["r", "E", "a", 0, "last", k, 0, 1.0, ""] for k in (1, 2)]
            + [["q", "E", "a", 1, "last", 3, 0, 1.0, ""]],
            r"evaluated at the same steps, got \[3\] in run q alone",
        ),
        ([["r", "E", "a", 0, "last", 1, 0, 1.0, ""]], "with the schemes last and suffix50"),
    ],
)
def test_results_that_cannot_be_reported_are_refused_in_one_sentence(tmp_path, rows, text):
    write(tmp_path / "r.csv", rows)
    with pytest.raises(SystemExit, match=text):
        report.main([str(tmp_path)])


def test_missing_columns_and_missing_files_are_named(tmp_path):
    (tmp_path / "r.csv").write_text("run,env\n1,E\n")
    with pytest.raises(SystemExit, match=r"missing \['algo', 'seed', 'scheme'"):
        report.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="no such"):
        report.main([str(tmp_path / "nowhere")])
