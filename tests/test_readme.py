"""What the README says is true; `test_docs.py` looks at its links and commands too."""

import re
from pathlib import Path

import polyak_rl

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def test_its_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    scope = {}
    for block in blocks:
        exec(block, scope)
    assert scope["q_target"].clock == 1
    assert (tmp_path / "averaged.zip").exists()


def test_it_is_a_page():
    assert len(README.splitlines()) <= 120


def test_it_says_of_each_target_what_the_makefile_says():
    said = dict(re.findall(r"^make ([\w-]+) +# (.+)$", README, re.MULTILINE))
    assert len(said) >= 6
    meant = dict(re.findall(r"^([\w-]+):.*?## (.+)$", MAKEFILE, re.MULTILINE))
    assert said == {target: meant[target] for target in said}


def test_each_variable_of_the_makefile_that_it_gives_is_one():
    for name in re.findall(r"\bmake [\w-]+ ([A-Z_]+)=", README):
        assert name in MAKEFILE


def test_it_names_nothing_the_library_does_not_export():
    imported = re.findall(r"from polyak_rl import ([\w, ]+)", README)
    for name in ", ".join(imported).split(", "):
        assert name in polyak_rl.__all__
