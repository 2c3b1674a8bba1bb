"""Collects the results of the comparison's runs, and what became of every planned one."""

import csv
import dataclasses
import gzip
import io
import json
import lzma
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyak_rl.files import remove_partial, write_whole
from scripts.experiment.jobs import Job, read_job
from scripts.experiment.measurement import END, ending
from scripts.experiment.run_folder import TABLE
from scripts.experiment.tidy import COLUMNS as REQUIRED
from scripts.experiment.tidy import read_table, result_files

COLUMNS = (*REQUIRED[:4], "variant", *REQUIRED[4:])


def collect(out: Path, scores: Mapping[str, Sequence[float]] | None = None) -> None:
    """Write the results of all finished runs, and what became of every planned one.

    Nobody else writes to `out`, but for workers to the folders of their runs.

    `scores` are what 0 and 1 of normalised scores are, [random, reference] by environment; those
    that an earlier call was given stay beside them.

    Raises:
        OSError: They cannot be written; those that were there still are.
    """
    folder = out / "results"
    folder.mkdir(exist_ok=True)
    for place in (folder, out / "jobs"):
        remove_partial(place)
    records = []
    # No name and no time in the archive: the same runs give the same bytes.
    with (
        write_whole(folder / "results.csv.gz") as raw,
        gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed,
        io.TextIOWrapper(packed, "utf-8", newline="") as text,
    ):
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(COLUMNS)
        for path in sorted((out / "jobs").glob("*.json")):
            try:
                job = read_job(path)
            except ValueError as error:
                print(f"warning: {error}: its runs are left out", file=sys.stderr)
                continue
            for name, seed in zip(job.run_names(), job.seeds, strict=True):
                record = describe(job, name, seed, out)
                records.append(record)
                if record["status"] != "finished":
                    continue
                key = (name, job.env_id, job.algo, seed, job.variant)
                with (out / "runs" / name / TABLE).open(newline="") as rows:
                    for row in csv.DictReader(rows):
                        shown = f"{float(row['return']):.6g}"
                        lines.writerow((*key, row["scheme"], row["step"], row["episode"], shown))
    write_runs(folder, records, {**earlier_scores(folder), **(scores or {})})


def add(new: Path, kept: Path) -> None:
    """Put the rows of runs that have ended behind those that a folder keeps.

    They are the rows of `collect`, to the letter, in results.csv.xz, smaller than a .csv.gz by a
    third to a half, whose place it takes. What ended in a crash is kept in runs.json, until it has
    been done again; runs that are there already stay as they are.

    Raises:
        ValueError: One of the folders holds something else than what `collect` writes.
        OSError: They cannot be written; what was there still is.
    """
    folders = (kept, new)
    files = {folder: result_files([folder]) for folder in folders}
    source, records = dict[str, Path](), dict[str, Any]()
    for folder in folders:
        for record in json.loads((folder / "runs.json").read_bytes())["runs"]:
            name = record["run"]
            if name in records and records[name]["status"] == "finished":
                continue
            if record["status"] in ("finished", "crashed"):
                source[name], records[name] = folder, record
    with (
        write_whole(kept / "results.csv.xz") as raw,
        lzma.LZMAFile(raw, "wb", preset=9 | lzma.PRESET_EXTREME) as packed,
        io.TextIOWrapper(packed, "utf-8", newline="") as text,
    ):
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(COLUMNS)
        for folder in folders:
            for _, row in (row for path in files[folder] for row in read_table(path)):
                if source.get(row["run"]) == folder:
                    lines.writerow([row[column] for column in COLUMNS])
    write_runs(kept, [*records.values()], {**earlier_scores(kept), **earlier_scores(new)})
    for path in files[kept]:
        if path.name != "results.csv.xz":
            path.unlink()


def write_runs(folder: Path, records: Sequence[Any], scores: Mapping[str, Any]) -> None:
    """Write runs.json: what became of each planned run, the commits, and scores where given."""
    commits = sorted({record["commit"] for record in records} - {""})
    about: dict[str, Any] = {"commit": ", ".join(commits)} if commits else {}
    if scores:
        about["scores"] = scores
    with write_whole(folder / "runs.json") as file:
        file.write(json.dumps({**about, "runs": records}, indent=1).encode() + b"\n")


def earlier_scores(folder: Path) -> dict[str, Any]:
    """The scores in the runs.json that is there, if it has any."""
    try:
        return dict(json.loads((folder / "runs.json").read_bytes())["scores"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def describe(job: Job, name: str, seed: int, out: Path) -> dict[str, Any]:
    """A planned run and what became of it, for the report."""
    run = out / "runs" / name
    try:
        end = ending(run, job)
        status = "finished" if end else "damaged" if (run / END).exists() else ""
    except ValueError:
        end, status = None, "of other settings"
    crashed = (out / "jobs" / f"{job.run_names()[0]}.crashed").exists()
    key = {"run": name, "env": job.env_id, "algo": job.algo, "seed": seed, "variant": job.variant}
    known: dict[str, Any] = {"seconds": None, "evaluating": None, "commit": ""}
    known |= {name: end[name] for name in known if end and name in end}
    config = {"total_steps": job.steps(), **dataclasses.asdict(job.agent_config())}
    config |= {name: getattr(job, name) for name in ("lr_decay", "lr_decay_until", "lr_floor")}
    status = status or ("crashed" if crashed else "not run")
    return {**key, "status": status, **known, "config": config}
