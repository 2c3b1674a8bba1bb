"""Wheel and sdist, as somebody gets them who has torch and nothing else."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
from importlib.metadata import distribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent

# Two files of a user: the first is right, the second has one mistake a line.
RIGHT = """
from typing import assert_type

import torch
from polyak_rl import AverageBank, TargetNetwork, Uniform, soft_update

q, q_target = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
soft_update(q_target, q, tau=0.005)
target = TargetNetwork(q, tau=0.005)
assert_type(target.clock, int)
bank = AverageBank(q, {"uniform": Uniform()})
assert_type(bank.average("uniform"), dict[str, torch.Tensor])
with bank.applied("uniform") as network:
    assert_type(network, torch.nn.Module)
"""
WRONG = """
from polyak_rl import soft_update, Uniform
soft_update("target", 3)
Uniform(start="the beginning")
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("source") / "polyak_rl"
    unwanted = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=unwanted)
    return folder


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (built,) = folder.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built of the sdist, as an installer does."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sdist)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of an environment that has the wheel, torch and what torch needs."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    interpreter = folder / "bin" / "python"
    pip("--python", interpreter, "install", "--no-deps", wheel)
    packages = Path(run(interpreter, "import sysconfig; print(sysconfig.get_path('purelib'))"))
    for name in with_requirements("torch"):
        files = distribution(name)
        for top in {file.parts[0] for file in files.files or () if file.parts[0] != ".."}:
            if top != "__pycache__":
                (packages / top).symlink_to(files.locate_file(top))
    return interpreter


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def run(interpreter, code):
    """What a program prints that sees this environment only; its warnings are errors."""
    remark = "ignore:Failed to initialize NumPy"  # torch's own, which works without
    command = [interpreter, "-I", "-W", "error", "-W", remark, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def with_requirements(name, seen=()):
    """A distribution and, without extras, all that it requires here."""
    found = [name]
    for line in distribution(name).requires or ():
        requirement = Requirement(line)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and requirement.name not in (*seen, *found):
            found += with_requirements(requirement.name, (*seen, *found))
    return list(dict.fromkeys(found))


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {
        "polyak_rl/py.typed",
        *(f"polyak_rl/{path.name}" for path in (ROOT / "polyak_rl").glob("*.py")),
    }


def test_the_sdist_holds_what_the_wheel_is_built_of_and_no_half_of_the_tests(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tops = {name.partition("/")[0] for name in names} - {"", "polyak_rl.egg-info"}
    assert tops == {
        *("polyak_rl", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"),
        *("PKG-INFO", "setup.cfg"),  # setuptools' own
    }
    assert {f"polyak_rl/{path.name}" for path in (ROOT / "polyak_rl").glob("*.py")} < names


def test_the_extras_of_the_wheel_are_those_of_the_library(wheel):
    """agents and scripts are not in it, and what they need is a group of the checkout."""
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = archive.read(name).decode()
    assert re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE) == ["sb3"]
    requirements = map(Requirement, re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE))
    assert {requirement.name for requirement in requirements} == {"torch", "stable-baselines3"}


def test_an_index_would_take_both(wheel, sdist):
    command = [sys.executable, "-m", "twine", "check", "--strict", wheel, sdist]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_each_group_that_a_text_names_is_one_and_no_text_names_an_extra_that_is_none():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    files = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md")]
    for package in ("polyak_rl", "agents", "scripts"):
        files += [*(ROOT / package).rglob("*.py"), *(ROOT / package).glob("*.ipynb")]
    for path in files:
        text = path.read_text()
        for name in re.findall(r"--group (\w+)", text):
            assert name in project["dependency-groups"] or name == "NAME", f"{path.name}: {name}"
        for names in re.findall(r"(?:polyak-rl|'\.)\[([\w, ]+)\]", text):
            assert set(names.split(",")) <= project["project"]["optional-dependencies"].keys(), (
                f"{path.name}: {names}"
            )


def test_the_citation_has_the_version_of_the_package():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_it_runs_with_torch_alone(python):
    """Every example of the library, but those of sb3.py, and nothing that torch does not need."""
    others = ["numpy", "gymnasium", "stable_baselines3", "tensorboard", "scipy", "agents", "pytest"]
    code = f"""
import doctest, importlib, importlib.util, pkgutil, polyak_rl
present = [name for name in {others} if importlib.util.find_spec(name)]
assert not present, present
tried = 0
for module in pkgutil.iter_modules(polyak_rl.__path__, "polyak_rl."):
    if module.name != "polyak_rl.sb3":
        results = doctest.testmod(importlib.import_module(module.name))
        assert not results.failed
        tried += results.attempted
print(tried, polyak_rl.__file__)
"""
    tried, _, home = run(python, code).partition(" ")
    assert int(tried) > 50
    assert Path(home).is_relative_to(python.parent.parent)


def test_a_user_without_stable_baselines3_is_told_so(python):
    code = """
try:
    import polyak_rl.sb3
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert run(python, code) in ("gymnasium", "numpy", "stable_baselines3")


@pytest.mark.full  # mypy reads all of torch first, 15 seconds and more
def test_a_strict_user_sees_its_types(python, tmp_path):
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    options = ["--strict", "--no-pretty", "--cache-dir", tmp_path / "cache"]
    command = [sys.executable, "-m", "mypy", *options, "--python-executable", python, "."]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    errors = [line for line in result.stdout.splitlines() if ": error:" in line]
    assert {line.partition(": error:")[0] for line in errors} == {"wrong.py:3", "wrong.py:4"}
    assert all("[arg-type]" in line for line in errors), result.stdout
    assert len(errors) == 3  # two of them in soft_update's line
