"""Every public name is explained by an example that runs, and the reference built of them holds."""

import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import polyak_rl
import polyak_rl.optim
import polyak_rl.sb3
import polyak_rl.solver
from scripts.docs import broken_links

ROOT = Path(__file__).parent.parent
FILES = [p for p in sorted((ROOT / "polyak_rl").glob("*.py")) if p.stem != "__init__"]


def public_names():
    """What users import: ``__all__``, and the classes and functions of three more modules."""
    names = {f"polyak_rl.{name}": getattr(polyak_rl, name) for name in polyak_rl.__all__}
    for module in (polyak_rl.sb3, polyak_rl.optim, polyak_rl.solver):
        for name, member in vars(module).items():
            ours = getattr(member, "__module__", None) == module.__name__
            if (
                ours
                and not name.startswith("_")
                and (inspect.isclass(member) or inspect.isfunction(member))
            ):
                names.setdefault(f"{module.__name__}.{name}", member)
    return names


PUBLIC = public_names()


@pytest.mark.parametrize("name", PUBLIC)
def test_each_public_name_has_an_example_that_runs(name):
    text = PUBLIC[name].__doc__
    assert text, f"{name} has no docstring"
    assert re.search(r"^ *Example:$", text, re.MULTILINE), f"{name} has no Example"
    examples = doctest.DocTestParser().get_examples(text)
    assert [example for example in examples if doctest.SKIP not in example.options]


def test_each_cross_reference_in_a_docstring_names_something():
    references = 0
    for path in FILES:
        module = importlib.import_module(f"polyak_rl.{path.stem}")
        classes = [member for member in vars(module).values() if inspect.isclass(member)]
        for name in re.findall(r":(?:mod|class|func|meth):`([^`]+)`", path.read_text()):
            references += 1
            short = name.removeprefix("polyak_rl.")
            homes = [polyak_rl, module, *classes]
            assert any(_has(home, short) for home in homes), f"{path.name}: {name}"
    assert references > 40


def _has(home, name):
    for part in name.split("."):
        if not hasattr(home, part):
            return False
        home = getattr(home, part)
    return True


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The built pages by name. In a process of its own: building configures pdoc for good."""
    folder = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "scripts.docs", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return {path.stem: path.read_text() for path in folder.rglob("*.html")}


@pytest.mark.full  # building takes ten seconds, in each worker
def test_the_reference_has_a_page_for_each_module_and_each_page_leads_to_it(reference):
    names = {path.stem for path in FILES}
    assert reference.keys() == names | {"polyak_rl", "index"}
    for page in names | {"polyak_rl"}:
        for name in names:
            assert f"{name}.html" in reference[page] or page == name


@pytest.mark.full  # building takes ten seconds, in each worker
def test_the_reference_holds_each_public_name(reference):
    for name in PUBLIC:
        module, _, short = name.rpartition(".")
        assert f'<section id="{short}">' in reference[module.removeprefix("polyak_rl.")]


@pytest.mark.full  # building takes ten seconds, in each worker
def test_formulas_and_pages_need_no_network(reference):
    """Formulas are MathML, which browsers draw themselves, and nothing is loaded from elsewhere."""
    for path in FILES:
        page = reference[path.stem]
        assert page.count("<math") == path.read_text().count(".. math::")
        assert "$$" not in page
        assert not re.search(r"""<(script|link|img)[^>]+(src|href)=["']?(https?:)?//""", page)
    assert "<math" in reference["target"]


def test_broken_links_are_found(tmp_path):
    (tmp_path / "there.html").write_text('<p id="here"><a href="#here">')
    (tmp_path / "start.html").write_text(
        '<a href="there.html#here"><a href="https://example.org/unknown">'
        '<a href="there.html#gone"><a href="absent.html"><a href="#nowhere">'
    )
    assert broken_links(tmp_path) == [
        "start.html: #nowhere",
        "start.html: absent.html",
        "start.html: there.html#gone",
    ]
