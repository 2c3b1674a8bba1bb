"""Which way imports run: polyak_rl <- agents <- scripts <- tests."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "polyak_rl": {"polyak_rl"},
    "agents": {"polyak_rl", "agents"},
    "scripts": {"polyak_rl", "agents", "scripts"},
}
FILES = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
}


def package(path):
    return path.relative_to(ROOT).parts[0]


def imported(path):
    """The names of modules that a file imports, and of what it imports from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    ours = {"polyak_rl", "agents", "scripts", "tests"}
    tops = {name.split(".")[0] for name in imported(path)}
    assert tops & ours <= ALLOWED[package(path)]


@pytest.mark.parametrize("path", [path for path in FILES if package(path) == "polyak_rl"], ids=str)
def test_the_library_needs_torch_alone(path):
    known = {*sys.stdlib_module_names, "torch", "polyak_rl"}
    if path.name == "sb3.py":
        known |= {"stable_baselines3", "gymnasium", "numpy"}
    assert {name.split(".")[0] for name in imported(path)} <= known
    assert "polyak_rl.sb3" not in set(imported(path))


def without_leaves(graph):
    """What is left of a graph of imports once what imports nothing is removed, again and again."""
    while leaves := {name for name, needs in graph.items() if not needs & graph.keys()}:
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
    return graph


@pytest.mark.parametrize("top", ALLOWED)
def test_there_is_no_circle_among_the_modules_of(top):
    graph = {name: {*imported(path)} for name, path in MODULES.items() if package(path) == top}
    assert len(graph) > 10
    assert without_leaves(graph) == {}


def test_a_circle_would_be_found():
    circle = {"a": {"b", "torch"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"math"}}
    assert without_leaves(circle).keys() == {"a", "b", "c", "d"}


def test_importing_the_library_brings_no_heavy_part_of_torch():
    """Compiler and DTensor support cost 0.8 s each; whoever does not use them does not pay."""
    code = "import torch, sys; before = set(sys.modules); import polyak_rl; "
    code += "print(*sorted(set(sys.modules) - before))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    new = result.stdout.split()
    heavy = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "numpy", "gymnasium")
    assert not [name for name in new if name.startswith(heavy)]
    assert "polyak_rl.target" in new


def test_the_wheel_holds_the_library_only():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"] == ["polyak_rl"]
    assert project["project"]["dependencies"] == ["torch>=2.11"]
    assert (ROOT / "polyak_rl" / "py.typed").is_file()
