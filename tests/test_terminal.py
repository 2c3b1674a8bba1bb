import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from scripts import posthoc, train
from scripts.experiment.terminal import unfailing_output
from tests.test_resume import COMMAND


class Dead(io.StringIO):
    """A stream that fails as a full disk, a closed pipe or a closed terminal does."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


ERRORS = [
    OSError(28, "full"),
    BrokenPipeError(32, "pipe"),
    OSError(5, "gone"),
    ValueError("closed"),
]


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_a_run_whose_output_cannot_be_shown_keeps_everything_and_ends_with_its_own_code(
    error, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "stdout", Dead(error))
    monkeypatch.setattr(sys, "stderr", Dead(error))
    assert train.main([*COMMAND, "--runs-dir", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    assert {"policy.pt", "timeline.pt", "checkpoint"} <= {path.name for path in folder.iterdir()}


def test_an_error_that_cannot_be_shown_has_its_exit_code_all_the_same(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Dead(OSError(28, "full")))
    assert train.main(["dqn", "--gamma", "2"]) == 2


def test_what_a_terminal_has_no_letters_for_is_shown_in_others(monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    with unfailing_output():
        print("━ run")
    assert ascii_only.buffer.getvalue() == b"\\u2501 run\n"


def test_a_process_without_any_output_prints_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with unfailing_output():
        print("nothing")
    assert sys.stdout is None


PROGRAM = """
import sys
from scripts.experiment.terminal import unfailing_output
with unfailing_output():
    print("x" * 100_000)
    print("an error", file=sys.stderr)
sys.exit(7)
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("where", ["full", "closed pipe", "no descriptor"])
def test_the_exit_code_of_a_process_survives_its_last_flush(where):
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "wb") as full, os.fdopen(write, "wb") as pipe:
        out = {"full": full, "closed pipe": pipe, "no descriptor": None}[where]
        command = [sys.executable, "-c", PROGRAM]
        if out is None:
            command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
        root = Path(__file__).parent.parent
        assert subprocess.run(command, stdout=out, stderr=out, cwd=root).returncode == 7


@pytest.mark.parametrize("command", ["compare", "train", "draw_rules"])
def test_a_package_that_is_missing_is_one_sentence_with_the_group_that_has_it(command, tmp_path):
    absent = "raise ModuleNotFoundError(\"No module named 'tyro'\", name='tyro')"
    (tmp_path / "tyro.py").write_text(absent)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)])
    done = subprocess.run(
        [sys.executable, "-m", f"scripts.{command}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: No module named 'tyro': pip install -c constraints.txt ")
    assert done.stderr.count("\n") == 1


def test_a_table_of_averages_shows_long_rules_whole_in_a_terminal_of_80_columns(capsys):
    rule = "polynomial:gamma=16.97,start=25000"
    returns = {"last": np.array([500.0, 499.0]), rule: np.array([12.5, 12.0])}
    Console(width=80).print(posthoc.table(returns, "a run"))
    assert rule in capsys.readouterr().out
