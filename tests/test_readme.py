"""What the README says is true."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_its_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    scope = {}
    for block in blocks:
        exec(block, scope)
    assert scope["q_target"].clock == 1
    assert (tmp_path / "averaged.zip").exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\b(\w+\.py)\b", README))))
def test_each_file_it_names_is_there(path):
    assert [*ROOT.glob(f"*/{path}")]


def test_each_picture_it_shows_is_there():
    for picture in re.findall(r"\]\(([^)]+\.(?:png|svg))\)", README):
        assert (ROOT / picture).is_file()


def test_each_command_it_names_can_be_run():
    for module in set(re.findall(r"python -m (scripts\.\w+)", README)):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z][\w-]*)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_it_names_nothing_the_library_does_not_export():
    import polyak_rl

    imported = re.findall(r"from polyak_rl import ([\w, ]+)", README)
    for name in ", ".join(imported).split(", "):
        assert name in polyak_rl.__all__
