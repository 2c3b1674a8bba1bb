"""Every public name is explained by an example that runs, and the pages built of them hold."""

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
from scripts import docs
from scripts.documentation.links import broken_links
from scripts.documentation.pages import PAGES, link_to

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
def test_there_is_a_page_for_each_module_and_each_source_and_each_leads_to_the_others(reference):
    names = {path.stem for path in FILES}
    pages = {Path(page).stem for page in PAGES}
    assert reference.keys() == names | pages | {"polyak_rl"}
    for page in names | {"polyak_rl"}:
        assert 'index.html">Overview<' in reference[page]
        for name in names:
            assert f"{name}.html" in reference[page] or page == name
    for page in pages:
        for name in pages | {"polyak_rl"}:
            assert f'href="{name}.html"' in reference[page]


@pytest.mark.full  # building takes ten seconds, in each worker
def test_the_pages_begin_with_an_overview_and_their_names_lead_to_the_reference(reference):
    assert "What to import when" in reference["index"]
    for page, link in {
        "index": '<a href="polyak_rl.html#soft_update"><code>soft_update</code></a>',
        "stable_baselines3": '<a href="polyak_rl/sb3.html#AveragedEvalCallback">',
        "results": '<a href="registration.html">',
    }.items():
        assert link in reference[page]


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
    assert "<math" in reference["target"]
    for page in reference.values():
        assert not re.search(r"""<(script|link|img)[^>]+(src|href)=["']?(https?:)?//""", page)


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


def test_every_page_of_the_folder_is_built():
    assert {f"docs/{path.name}" for path in (ROOT / "docs").iterdir()} <= PAGES.keys()


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_the_python_of_each_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks or not re.search(r"^import |^from ", (ROOT / page).read_text(), re.MULTILINE)
    scope = {}
    for block in blocks:
        exec(block, scope)


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_each_file_command_and_rule_that_a_page_names_is_there(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)#]+?)\)", text):
        assert "://" in link or ((ROOT / page).parent / link).is_file(), link
    for module in set(re.findall(r"python -m (scripts\.\w+)", text)):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    makefile = (ROOT / "Makefile").read_text()
    for target in set(
        re.findall(r"\bmake ([a-z][\w-]*)`|^make ([a-z][\w-]*) ", text, re.MULTILINE)
    ):
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target
    for rule in re.findall(r"--rule (\S+?)`? ", text):
        polyak_rl.parse_rule(rule.strip("`"))


def test_the_rules_of_the_table_are_all_and_can_be_typed():
    table = re.search(r"\| rule \|.*?\n\n", (ROOT / "docs/averages.md").read_text(), re.DOTALL)[0]
    for name, text in re.findall(r"^\| `(\w+)` \| `([^`]+)`", table, re.MULTILINE):
        assert type(polyak_rl.parse_rule(text)).__name__ == name
    named = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
    assert named == {rule.__name__ for rule in polyak_rl.rules.RULES.values()}


@pytest.mark.parametrize(
    ("link", "built"),
    [
        ("targets.md", "targets.html"),
        ("../scripts/results/exploratory/report.md#every-scheme", "report.html#every-scheme"),
        ("../polyak_rl/sb3.py", "polyak_rl/sb3.html"),
        ("../polyak_rl/__init__.py", "polyak_rl.html"),
        ("https://example.org/a.md", "https://example.org/a.md"),
    ],
)
def test_links_of_the_checkout_lead_to_what_is_built(link, built):
    assert link_to(link, ROOT / "docs" / "index.md") == built


def test_help_writes_nothing_and_a_folder_that_cannot_be_made_is_one_sentence(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        docs.main(["--help"])
    assert capsys.readouterr().out.startswith("usage: python -m scripts.docs ")
    with pytest.raises(SystemExit, match="2"):
        docs.main(["--unknown"])
    assert not [*tmp_path.iterdir()]
    (tmp_path / "file").touch()
    assert docs.main(["file"]) == 2
    assert "error: " in capsys.readouterr().err
