import csv
import gzip
import json
import lzma

import numpy as np
import pytest

from scripts.experiment.results import COLUMNS, add
from scripts.experiment.tidy import read_results, read_runs, read_table, result_files


def leave(folder, seeds, status="finished", commit="abc", scores=None, draw=0):
    """A folder of results as `collect` leaves it, of runs of these seeds."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(draw)
    with gzip.open(folder / "results.csv.gz", "wt", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(COLUMNS)
        for seed in seeds if status == "finished" else ():
            for scheme in ("last", "tail25"):
                for episode in range(100):
                    key = (f"r{seed}", "E", "a", seed, "", scheme, 10, episode)
                    lines.writerow((*key, f"{rng.normal(200, 90):.6g}"))
    key = {"env": "E", "algo": "a", "variant": "", "commit": commit, "status": status}
    runs = [{"run": f"r{seed}", "seed": seed, **key} for seed in seeds]
    about = {"scores": scores} if scores else {}
    (folder / "runs.json").write_text(json.dumps({**about, "runs": runs}))
    return folder


def rows(folder):
    return [row for path in result_files([folder]) for _, row in read_table(path)]


def test_rows_are_put_behind_those_that_are_kept_to_the_letter(tmp_path):
    kept, new = leave(tmp_path / "kept", (1, 2)), leave(tmp_path / "new", (3,), commit="def")
    before, more = rows(kept), rows(new)
    size = (kept / "results.csv.gz").stat().st_size + (new / "results.csv.gz").stat().st_size
    add(new, kept)
    assert [path.name for path in result_files([kept])] == ["results.csv.xz"]
    assert rows(kept) == before + more
    assert (kept / "results.csv.xz").stat().st_size < 0.8 * size
    runs, about = read_runs(result_files([kept]))
    assert [run.seed for run in runs] == ["1", "2", "3"]
    assert about["commit"] == "abc, def"
    assert rows(new) == more


def test_runs_that_are_kept_stay_as_they_are(tmp_path):
    kept, new = leave(tmp_path / "kept", (1, 2)), leave(tmp_path / "new", (2, 3), draw=1)
    before, more = rows(kept), rows(new)
    add(new, kept)
    assert rows(kept) == before + [row for row in more if row["seed"] == "3"]
    whole = (kept / "results.csv.xz").read_bytes()
    add(new, kept)
    assert (kept / "results.csv.xz").read_bytes() == whole


def test_a_run_that_had_crashed_is_replaced_once_it_has_ended(tmp_path):
    kept = leave(tmp_path / "kept", (1, 2), "crashed", scores={"E": [0, 9]})
    add(leave(tmp_path / "new", (2,)), kept)
    runs, about = read_runs(result_files([kept]))
    assert {run.seed: run.status for run in runs} == {"1": "crashed", "2": "finished"}
    assert {row["seed"] for row in rows(kept)} == {"2"}
    assert about["scores"] == {"E": [0, 9]}


def test_a_run_that_has_not_ended_is_not_kept(tmp_path):
    kept = leave(tmp_path / "kept", (1,))
    for status in ("not run", "damaged", "of other settings"):
        add(leave(tmp_path / "new", (1, 2), status), kept)
        assert [run.seed for run in read_runs(result_files([kept]))[0]] == ["1"]


def test_results_are_the_same_however_they_are_packed(tmp_path):
    folder = leave(tmp_path / "a", (1, 2))
    (packed,) = read_results(result_files([folder]))
    data = gzip.decompress((folder / "results.csv.gz").read_bytes())
    (folder / "results.csv.gz").unlink()
    for name, form in (("r.csv.xz", lzma.compress(data)), ("r.csv", data)):
        (folder / name).write_bytes(form)
        (again,) = read_results(result_files([folder]))
        (folder / name).unlink()
        assert again.seeds == packed.seeds
        for scheme, returns in packed.final.items():
            np.testing.assert_array_equal(again.final[scheme], returns)


def test_a_damaged_xz_is_refused_in_one_sentence(tmp_path):
    whole = lzma.compress(",".join(COLUMNS).encode() + b"\n" + b"x" * 50_000)
    for damage in (b"no xz", whole[:-20], whole[:40] + b"\0" + whole[41:]):
        (tmp_path / "r.csv.xz").write_bytes(damage)
        with pytest.raises(ValueError, match=r"r.csv.xz: cannot be read as a table, "):
            [*read_table(tmp_path / "r.csv.xz")]
