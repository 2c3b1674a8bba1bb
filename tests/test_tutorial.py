"""The notebook holds what it prints, and runs."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
PATH = ROOT / "scripts" / "tutorial.ipynb"
SKIPPED = "skip-execution"  # nbclient passes over cells with this tag: they start a server


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def code(notebook):
    """The cells that are executed."""
    tags = [(cell, cell.metadata.get("tags", [])) for cell in notebook.cells]
    return [cell for cell, tag in tags if cell.cell_type == "code" and SKIPPED not in tag]


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def test_it_was_executed_once_from_top_to_bottom(notebook):
    nbformat.validate(notebook)
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_it_is_small_and_says_nothing_of_where_it_was_executed():
    assert PATH.stat().st_size < 400_000
    assert not re.search(r"/(home|root|tmp|work)/", PATH.read_text())


def test_the_numbers_in_its_prose_are_those_it_printed(notebook):
    """It says how far the last iterate and the EMA swing in the second half of the run."""
    (table,) = (printed(cell) for cell in code(notebook) if "'ema'" in printed(cell))
    (prose,) = (cell.source for cell in notebook.cells if cell.source.startswith("The dashed line"))
    lines = table.splitlines()
    for name in ("last", "ema"):
        scores = [float(re.search(rf"'{name}': ([\d.]+)", line)[1]) for line in lines]
        for bound in (min(scores[5:]), max(scores[5:])):
            assert str(bound) in prose


@pytest.mark.full  # half a minute
def test_it_runs_without_network_or_browser(notebook, tmp_path):
    before = printed(code(notebook)[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path / "ipython")}
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}})
    client.execute(env=environment)
    assert printed(code(notebook)[1]) == before == "0.100\n0.190\n0.271\n"
    assert any("image/png" in o.get("data", {}) for cell in code(notebook) for o in cell.outputs)
    assert [*tmp_path.glob("runs/tutorial/events.out.tfevents.*")]
