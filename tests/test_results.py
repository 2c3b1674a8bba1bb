"""Every headline number of a report, recomputed from its rows by code that shares nothing with it.

Here is plain Python, `statistics` and one quantile of scipy; nothing of `scripts.experiment` is
imported but what writes a report of rows. The committed reports are
checked so, and one of rows that are made up for all cells of the registered study.
"""

# ruff: noqa: RUF001  (the report's minus signs and dashes)

import csv
import gzip
import hashlib
import itertools
import json
import lzma
import math
import random
import re
import statistics
from collections import defaultdict
from pathlib import Path

import pytest
import scipy.stats

from scripts import report
from scripts.experiment import replay
from scripts.experiment.page import Page

RESULTS = Path(__file__).parent.parent / "scripts" / "results"
REGISTRATION = (RESULTS / "registration.md").read_text()
SCALES = {
    env: (float(low), float(high))
    for env, low, high in re.findall(r"^\| ([\w-]+-v\d) \| (\S+) \| (\S+) \|$", REGISTRATION, re.M)
} | {"InvertedPendulum-v5": (5.0, 1000.0)}
CARTPOLE = ("CartPole-v1", "dqn")
CELLS = {  # (cell, variant) -> environment, algorithm, steps, runs
    (1, ""): (*CARTPOLE, 50_000, 20),
    (2, ""): ("LunarLander-v3", "dqn", 100_000, 20),
    (3, ""): ("Hopper-v5", "ddpg", 100_000, 20),
    **{(4, f"lr=x{x}"): (*CARTPOLE, 50_000, 20) for x in ("0.25", "0.5", "2")},
    (5, "lr=decay75"): (*CARTPOLE, 50_000, 20),
    **{
        (6, f"target={kind}"): (*CARTPOLE, 50_000, 20)
        for kind in ("hard:32", "hard:512", "soft:0.0155", "none")
    },
    (7, ""): ("Acrobot-v1", "dqn", 100_000, 20),
    (8, ""): ("Pendulum-v1", "ddpg", 20_000, 20),
    (9, ""): ("Hopper-v5", "td3", 100_000, 10),
    (10, ""): ("HalfCheetah-v5", "sac", 50_000, 8),
    (11, ""): ("Hopper-v5", "sac", 100_000, 10),
    (12, ""): ("LunarLander-v3", "ppo", 300_000, 10),
}


def read(path):
    """{(env, algo, variant): {seed: {scheme: {step: {episode: return}}}}}."""
    runs = defaultdict(lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(dict))))
    opened = {".gz": gzip.open, ".xz": lzma.open}[path.suffix]
    with opened(path, "rt", newline="") as file:
        for row in csv.DictReader(file):
            run = runs[row["env"], row["algo"], row["variant"]][int(row["seed"])]
            run[row["scheme"]][int(row["step"])][row["episode"]] = float(row["return"])
    return runs


def scores(cell, env, scheme, other, late=False):
    """Normalised scores of a scheme by seed, on the final episodes that the other played too."""
    low, high = SCALES[env]
    end = max(step for run in cell.values() for step in run["last"])
    found = {}
    for seed, run in cell.items():
        if end not in run.get(scheme, {}) or end not in run.get(other, {}):
            continue
        common = run[scheme][end].keys() & run[other][end].keys()
        points = [statistics.fmean(run[scheme][end][e] for e in common)]
        if late:
            steps = [step for step in run["last"] if 0.8 * end <= step < end]
            points += [statistics.fmean(run[scheme][step].values()) for step in steps]
        found[seed] = (statistics.fmean(points) - low) / (high - low)
    return found


def gains(cell, env, scheme="tail25", base="last", late=False):
    """Paired differences by seed."""
    a, b = scores(cell, env, scheme, base, late), scores(cell, env, base, scheme, late)
    return {seed: a[seed] - b[seed] for seed in sorted(a)}


def welch(samples, weights):
    """A weighted sum of means, the ends of its t interval, and its p."""
    parts = [w * w * statistics.variance(x) / len(x) for w, x in zip(weights, samples, strict=True)]
    centre = sum(w * statistics.fmean(x) for w, x in zip(weights, samples, strict=True))
    if sum(parts) == 0:
        return centre, centre, centre, float(centre == 0)
    df = sum(parts) ** 2 / sum(v * v / (len(x) - 1) for v, x in zip(parts, samples, strict=True))
    error = math.sqrt(sum(parts))
    half = scipy.stats.t.ppf(0.975, df) * error
    return centre, centre - half, centre + half, 2 * scipy.stats.t.sf(abs(centre) / error, df)


def flipped(samples, flips=4000):
    """The sign-flip p of the mean of means: of all flips where there are few, else roughly."""
    d = [x / len(s) for s in samples for x in s if x]
    observed = abs(sum(d)) * (1 - 1e-9)
    if len(d) <= 12:
        every = itertools.product((-1, 1), repeat=len(d))
    else:
        draw = random.Random(1)
        every = ([draw.choice((-1, 1)) for _ in d] for _ in range(flips))
    hits = [abs(sum(s * x for s, x in zip(signs, d, strict=True))) >= observed for signs in every]
    return statistics.fmean(hits)


def trimmed(x):
    """The interquartile mean."""
    cut = len(x) // 4
    return statistics.fmean(sorted(x)[cut : len(x) - cut])


def holm(p):
    """Adjusted by name, one after another."""
    adjusted, least = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.get)):
        least = max(least, (len(p) - rank) * p[name])
        adjusted[name] = min(1.0, least)
    return adjusted


def best(names, rows, budget=60):
    """The name with the best mean over an equal share of the budget, and how many that is."""
    each = budget // len(names)
    return max(names, key=lambda name: statistics.fmean(rows[name][:each])), each


def halved(names, rows, budget=60):
    """Sequential halving: of those left, who is in the better half by the mean so far stays."""
    sizes, played = [len(names)], 0
    while sizes[-1] > 2:
        sizes.append((sizes[-1] + 1) // 2)
    for i, size in enumerate(sizes):
        new = max(1, budget // (size * (len(sizes) - i)))
        budget -= size * new
        played += new
        ranked = sorted(names, key=lambda name: -statistics.fmean(rows[name][:played]))
        names = ranked[: (size + 1) // 2]
    return names[0], played


def replayed(run, env, names, pick, splits=60):
    """A run's mean over random splits: what was picked on some episodes minus tail25 on others."""
    low, high = SCALES[env]
    end = max(run["last"])
    final = {n: [*run[n][end].values()] for n in {*names, "tail25"} if end in run.get(n, {})}
    names = [name for name in dict.fromkeys(names) if name in final]
    draw, gaps = random.Random(len(names)), []
    for _ in range(splits):
        order = draw.sample(range(len(final["tail25"])), len(final["tail25"]))
        rows = {name: [row[i] for i in order] for name, row in final.items()}
        winner, used = pick(names, rows)
        gaps.append(statistics.fmean(rows[winner][used:]) - statistics.fmean(rows["tail25"][used:]))
    return statistics.fmean(gaps) / (high - low)


def numbers(cell):
    """As floats: the numbers of one cell of a table."""
    return [float(x) for x in re.findall(r"[+-]?\d+\.?\d*", cell.replace("−", "-"))]


def table(text, *columns):
    """The rows of the first table with these columns, each as {column: cell}."""
    for block in text.split("\n\n"):
        lines = [re.split(r" ?(?<!\\)\| ?", line)[1:-1] for line in block.splitlines()]
        if block.startswith("|") and set(columns) <= set(lines[0]):
            head = ["name", *lines[0][1:]]
            return [dict(zip(head, line, strict=True)) for line in lines[2:]]
    raise AssertionError(f"no table with {columns}")


def near(cell, *expected, abs=6e-4):
    assert numbers(cell) == pytest.approx(expected, abs=abs)


def check_row(row, cell, env):
    """A stratum's row: runs, scores, differences, ties."""
    d = gains(cell, env)
    assert int(row["runs"]) == len(d)
    near(row["last"], statistics.fmean(scores(cell, env, "last", "tail25").values()))
    near(row["averaged"], statistics.fmean(scores(cell, env, "tail25", "last").values()))
    for column, x in (
        ("difference", d),
        ("stopped late", gains(cell, env, late=True)),
        ("placebo − last", gains(cell, env, "placebo")),
    ):
        x = [*x.values()]
        near(row[column], *(welch([x], [1])[:3] if len(x) >= 5 else [statistics.fmean(x)]))
    near(row["interquartile mean"], trimmed([*d.values()]))
    signs = [math.copysign(x != 0, x) for x in d.values()]
    counts = [signs.count(1), len(d) - signs.count(1) - signs.count(-1), signs.count(-1)]
    assert numbers(row["better / tied / worse"]) == counts
    return d


def test_the_report_of_the_first_study_is_what_its_rows_say():
    folder = RESULTS / "exploratory"
    rows = read(folder / "results.csv.gz")
    found = table((folder / "report.md").read_text(), "finding", "difference")
    assert len(found) == len(rows) == 6
    unadjusted = {}
    for row in found:
        (key,) = [
            key
            for key in rows
            if row["name"] == f"{key[1].upper()} {key[0]}" + f" ({key[2]})" * bool(key[2])
        ]
        d = check_row(row, rows[key], key[0])
        if len(d) >= 5:
            p = flipped([[*d.values()]])
            near(row["p, not adjusted"], p, abs=0.02)
            if 2 / 2 ** sum(map(bool, d.values())) <= 0.05 / 5:
                unadjusted[row["name"]] = numbers(row["p, not adjusted"])[0]
    adjusted = holm(unadjusted)
    for row in found:
        if row["name"] in adjusted:
            near(row["Holm's p"], adjusted[row["name"]], abs=0.003)
        else:
            assert row["Holm's p"] == "–"
        significant = adjusted.get(row["name"], 1) <= 0.05
        assert significant == (row["finding"].split(",")[0] in ("better", "worse"))


def test_the_first_studys_rows_are_those_that_were_measured_under_new_names():
    old = {"all": "uniform0"} | {f"tail{n}": f"suffix{n}" for n in (10, 25, 50, 75, 90)}
    digest = hashlib.sha256()
    with gzip.open(RESULTS / "exploratory" / "results.csv.gz", "rt", newline="") as file:
        rows = csv.reader(file)
        head = next(rows)
        digest.update("\x1f".join(head).encode() + b"\n")
        at = head.index("scheme")
        for row in rows:
            row[at] = old.get(row[at], row[at])
            digest.update("\x1f".join(row).encode() + b"\n")
    expected = "ae66499e085afce8412cb3b085658e2c1635aef659040d5514f4295fe4c3a17d"
    assert digest.hexdigest() == expected


# --- the registered study ------------------------------------------------------------------------


def check_registered(text, rows):
    """All registered numbers, of a report on the cells that have rows."""
    ended = [place for place in CELLS if (*CELLS[place][:2], place[1]) in rows]
    cells = {place: rows[*CELLS[place][:2], place[1]] for place in ended}
    cells = {
        place: {seed: run for seed, run in cell.items() if 201 <= seed < 201 + CELLS[place][3]}
        for place, cell in cells.items()
    }
    found = table(text, "runs", "placebo − last")
    names = {
        (number, variant): f"cell {number}, {CELLS[number, variant][1].upper()}"
        f" {CELLS[number, variant][0]}" + f" ({variant})" * bool(variant)
        for number, variant in ended
    }
    assert [row["name"] for row in found] == [*names.values()]
    gain = {}
    for row, (place, cell) in zip(found, cells.items(), strict=True):
        gain[place] = check_row(row, cell, CELLS[place][0])

    def samples(*numbers):
        return [[*gain[n, ""].values()] for n in numbers]

    primary = table(text, "interquartile mean", "p")
    head = [(1, 2, 3), (2, 3), (1, 3), (1, 2)]
    for row, which in zip(primary, head, strict=False):
        near(row["mean"], *welch(samples(*which), [1 / len(which)] * len(which))[:3])
        iqm = statistics.fmean(map(trimmed, samples(*which)))
        near(row["interquartile mean"], iqm)
    near(primary[0]["p"].replace("< 0.001", "0.000"), flipped(samples(1, 2, 3)), abs=0.02)
    late = [[*gains(cells[n, ""], CELLS[n, ""][0], late=True).values()] for n in (1, 2, 3)]
    near(primary[4]["mean"], *welch(late, [1 / 3] * 3)[:3])

    one, decay = cells[1, ""], cells[5, "lr=decay75"]
    last = scores(decay, "CartPole-v1", "last", "last")
    average = scores(one, "CartPole-v1", "tail25", "tail25")
    rates = {-2: (4, "lr=x0.25"), -1: (4, "lr=x0.5"), 0: (1, ""), 1: (4, "lr=x2")}
    slopes = []
    for seed in set.intersection(*(set(gain[place]) for place in rates.values())):
        line = scipy.stats.linregress([*rates], [gain[place][seed] for place in rates.values()])
        slopes.append(line.slope)
    hard32, none, hard512, soft = (
        gain[6, f"target={kind}"] for kind in ("hard:32", "none", "hard:512", "soft:0.0155")
    )
    seeds = set(hard32) & set(none) & set(hard512) & set(soft)
    expected = {
        **{n: samples(n)[0] for n in (1, 2, 3)},
        8: [last[seed] - average[seed] for seed in last.keys() & average.keys()],
        9: [*gains(cells[3, ""], "Hopper-v5", "target", "tail25").values()],
        10: slopes,
        11: [gain[1, ""][s] - gain[5, "lr=decay75"][s] for s in gain[1, ""].keys() & last.keys()],
        12: [(hard32[s] + none[s] - hard512[s] - soft[s]) / 2 for s in seeds],
    }
    paragraph = text.split("\n\n")[1]
    for row in [primary[0], *table(text, "Holm's p", "mean", "runs")]:
        assert row["mean"] in paragraph
    worth = {}
    if all("window95" in run for n in (1, 2, 3) for run in cells[n, ""].values()):
        windows = ["tail5", *(f"window{end}" for end in range(95, 50, -5))]
        averages = ["tail5", "tail10", "tail25", "tail50", "all", "ema1", "target"]
        now = ["last", *(f"checkpoint{at}" for at in range(95, 70, -5))]
        for rule, names, pick in (
            (5, windows, best),
            (6, ["tail25", "last", *averages, *windows], halved),
            (7, now, best),
        ):
            worth[rule] = [
                [replayed(run, CELLS[n, ""][0], names, pick) for run in cells[n, ""].values()]
                for n in (1, 2, 3)
            ]
        both = zip(worth[6], worth[7], strict=True)
        worth[7] = [[a - b for a, b in zip(*pair, strict=True)] for pair in both]
    family = {
        int(row["name"].split(":")[0]): row for row in table(text, "Holm's p", "mean", "runs")
    }
    assert sorted(family) == list(range(1, 13))
    p = {}
    for number, d in expected.items():
        row = family[number]
        near(row["mean"], *welch([d], [1])[:3])
        p[number] = flipped([d])
        near(row["p, not adjusted"].replace("< 0.001", "0.000"), p[number], abs=0.03)
    for number, d in worth.items():  # by other splits
        near(family[number]["mean"], *welch(d, [1 / 3] * 3)[:3], abs=4e-3)
    centre, low, high, p[4] = welch(samples(1, 2, 3, 7, 8, 10), [1 / 3] * 3 + [-1 / 3] * 3)
    near(family[4]["mean"], centre, low, high)
    near(family[4]["p, not adjusted"].replace("< 0.001", "0.000"), p[4], abs=1e-3)
    shown = {
        number: numbers(row["p, not adjusted"].replace("< 0.001", "0.0005"))[0]
        for number, row in family.items()
        if row["Holm's p"] not in ("", "–")
    }
    pending = {n: 1.0 for n, row in family.items() if "not computed" in row.values()}
    for number, adjusted in holm(shown | pending).items():
        if number in shown:
            near(family[number]["Holm's p"].replace("< 0.001", "0.000"), adjusted, abs=7e-3)
            decided = family[number]["finding"].split(",")[0] in (
                "better",
                "worse",
                "above 0",
                "below 0",
            )
            assert decided == (adjusted <= 0.05)
    return family


def made_up(folder):
    """Rows of all cells but 12 with known gains, few episodes; one run of cell 2 has crashed."""
    draw = random.Random(3)
    truth = {1: 0.15, 2: 0.1, 3: 0.2, 4: 0.1, 5: 0.0, 6: 0.1, 11: 0.03}
    factor = {"lr=x0.25": 0, "lr=x0.5": 0.7, "lr=x2": 2, "target=hard:512": 0.3}
    lines, runs = [], []
    for (number, variant), (env, algo, total, count) in list(CELLS.items())[:-1]:
        low, high = SCALES[env]
        for seed in range(201, 201 + count):
            name = f"{env}-{algo}-{variant}-{seed}"
            crashed = (number, seed) == (2, 207)
            status = "crashed" if crashed else "finished"
            about = {"run": name, "env": env, "algo": algo, "seed": seed, "variant": variant}
            runs.append(
                {
                    **about,
                    "status": status,
                    "seconds": 60,
                    "evaluating": 12,
                    "config": {"gamma": 0.99},
                }
            )
            if crashed:
                continue
            own = 0.5 + 0.1 * draw.gauss(0, 1)
            for share in (0.25, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1):
                schemes = {"last": 0.0, "tail25": truth.get(number, 0) * factor.get(variant, 1)}
                episodes = 20 if share == 1 and number < 4 else 3
                if episodes == 20:
                    schemes |= {f"window{at}": 0.002 * at - 0.1 for at in range(95, 50, -5)}
                    schemes |= {f"checkpoint{at}": 0.02 for at in range(95, 70, -5)}
                    schemes |= {"tail5": 0.12}
                if share == 1:
                    schemes |= {"placebo": 0.0, "tail10": schemes["tail25"], "all": -0.2}
                    schemes |= {"target": 0.0} if algo != "dqn" else {}
                for scheme, gain in schemes.items():
                    for episode in range(episodes):
                        score = own + gain + 0.05 * draw.gauss(0, 1)
                        if env == "CartPole-v1":
                            score = min(score, 1.0)
                        value = f"{low + (high - low) * score:.6g}"
                        step = int(share * total)
                        lines.append((name, env, algo, seed, variant, scheme, step, episode, value))
    other = {"scores": {"CartPole-v1": [0, 250]}}  # which are not the registered ones
    head = ("run", "env", "algo", "seed", "variant", "scheme", "step", "episode", "return")
    with gzip.open(folder / "results.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows([head, *lines])
    (folder / "runs.json").write_text(json.dumps({"commit": "abc1234", **other, "runs": runs}))
    return head, lines, runs


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    made_up(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Page, "figure", lambda *_: None)  # drawn, and not saved: that takes longest
        patch.setattr(replay, "SPLITS", 30)
        assert report.main([str(folder), "--left-out", "12"]) == 0
    return folder


def test_the_registered_analysis_is_what_the_rows_say(study):
    text = (study / "report.md").read_text()
    family = check_registered(text, read(study / "results.csv.gz"))
    assert {family[n]["runs"] for n in (5, 6, 7)} == {"59"}
    digest = hashlib.sha256((RESULTS / "registration.md").read_bytes()).hexdigest()
    assert f"SHA-256 as it is now: {digest}" in text
    assert re.search(r"The runs are of commit abc1234, the analysis of commit \w{7,}\.", text)
    assert "- cell 12, PPO LunarLander-v3 (settings fixed after registration" in text
    # gains were made up for cells 1 to 6, windows are poor, and cells 7 to 10 gain nothing
    came = {row["name"]: row["came about"] for row in table(text, "came about")}
    assert list(came.values()) == ["no", "no", "no", "no"]


def test_a_crashed_run_is_counted_as_no_difference_in_a_line_of_its_own(study):
    text = (study / "report.md").read_text()
    row = table(text, "interquartile mean", "p")[5]
    assert row["name"] == "shipped weights, crashed runs (1) counted as no difference"
    rows = read(study / "results.csv.gz")
    d = [[*gains(rows[(*CELLS[n, ""][:2], "")], CELLS[n, ""][0]).values()] for n in (1, 2, 3)]
    near(row["mean"], *welch([d[0], [*d[1], 0.0], d[2]], [1 / 3] * 3)[:3])
    assert row["runs"] == "60"


REPORT = RESULTS / "registered" / "report.md"


@pytest.mark.skipif(not REPORT.exists(), reason="the registered study is under way")
def test_the_report_of_the_registered_study_is_what_its_rows_say():
    (rows,) = REPORT.parent.glob("results.csv.*")
    check_registered(REPORT.read_text(), read(rows))
