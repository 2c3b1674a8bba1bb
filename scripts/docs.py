"""Build the documentation: the pages of docs/, and the API reference from the docstrings.

    python -m scripts.docs [build/docs]

The pages are plain files that need no server and no network. pdoc reads the docstrings as they are;
formulas become MathML, which browsers draw themselves. In the pages, links to other pages, to
modules of the library and to pictures are those of the checkout, so that they can be read there
too; the names of the library become links. What was built is checked for links that lead nowhere.
"""

import html
import inspect
import re
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import unquote, urlsplit

import jinja2
import pdoc
import pdoc.render_helpers
import tyro
from markdown_it import MarkdownIt
from markdown_it.token import Token
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

import polyak_rl
from polyak_rl import sb3

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "polyak_rl"
PAGES = {  # in the order in which they are read
    "docs/index.md": "Overview",
    "docs/targets.md": "Targets",
    "docs/averages.md": "Averages",
    "docs/shipping.md": "Shipping",
    "docs/stable_baselines3.md": "Stable-Baselines3",
    "docs/environment.md": "Your environment",
    "docs/agents.md": "Agents",
    "docs/speed.md": "Speed and survival",
    "docs/optimizers.md": "Optimizers",
    "docs/results.md": "Results",
    "scripts/results/report.md": "Report",
    "scripts/results/registration.md": "Registration",
}
FORMATTER = HtmlFormatter(nowrap=True)
UNBROKEN = re.compile(r"(?<=\d) (?=(?:µs|ms|MiB)\b)|(?<=\d,) (?=[-+\u2212\d.]+\])")  # spaces
PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title - polyak_rl</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #212529; margin: 0; display: flex; }
nav { flex: none; width: 13rem; padding: 1.5rem; background: #f7f7f7; min-height: 100vh; }
nav a { display: block; padding: .15rem 0; }
nav a.here { color: inherit; font-weight: 600; }
main { flex: auto; min-width: 0; max-width: 62rem; padding: 1rem 2rem 4rem; }
p, li, pre { max-width: 46rem; box-sizing: border-box; }
a { color: #0a58ca; text-decoration: none; }
a:hover { text-decoration: underline; }
img { max-width: 100%; }
code { font-size: .875em; overflow-wrap: break-word; }
pre, .table { overflow-x: auto; }
pre { background: #f7f7f7; padding: .75rem 1rem; line-height: 1.4; }
.table { background:  /* a shadow on the side to which there is more */
  linear-gradient(90deg, #fff 2rem, #fff0) left / 4rem 100% no-repeat local,
  linear-gradient(-90deg, #fff 2rem, #fff0) right / 4rem 100% no-repeat local,
  linear-gradient(90deg, #0003, #0000) left / .8rem 100% no-repeat,
  linear-gradient(-90deg, #0003, #0000) right / .8rem 100% no-repeat; }
table { border-collapse: collapse; font-size: .9em; }
td, th { border-bottom: 1px solid #dee2e6; padding: .3rem .7rem .3rem 0; text-align: left;
  vertical-align: top; }
th { white-space: nowrap; }
td:first-child { min-width: 8rem; }
@media (max-width: 800px) {
  body { display: block; }
  nav { width: auto; min-height: 0; padding: .75rem 1rem; }
  nav a { display: inline-block; margin-right: .9rem; }
  main { padding: 0 1rem 3rem; }
}
$style
</style>
<nav>$nav</nav>
<main>$body</main>
</html>
""")
TEMPLATES = {
    # Every page leads to the overview and to every module. Members that say nothing are left out,
    # since "Args" and "Attributes" of their class do, and so is what Python says of named tuples.
    "module.html.jinja2": """
{% extends "default/module.html.jinja2" %}
{% block module_list_link %}
<a class="pdoc-button" href="{{ "../" * module.modulename.count(".") }}index.html">Overview</a>
{% endblock %}
{% block nav_submodules %}
<h2>Modules</h2>
<ul>{% for name in all_modules %}<li>{{ (name, "") | link(text=name) }}</li>{% endfor %}</ul>
{% endblock %}
{% macro is_public(doc) %}
{% if (doc.docstring or doc.name == "__init__") and "Create new instance" not in doc.docstring %}
{{ default_is_public(doc) }}
{% endif %}
{% endmacro %}
{% macro docstring(doc) %}
{% if not doc.docstring.startswith("Alias for field") %}{{ default_docstring(doc) }}{% endif %}
{% endmacro %}
""",
    "custom.css": """
.pdoc .signature.multiline .param { white-space: normal; padding-left: 4ch; text-indent: -2ch; }
.pdoc .docstring math[display="block"] { font-size: 1.25em; margin: 0.75rem 0; }
""",
}


@dataclass(frozen=True)
class Options:
    """Build the documentation."""

    folder: tyro.conf.Positional[Path] = Path("build/docs")
    """where it is written"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = tyro.cli(Options, args=argv, prog="python -m scripts.docs", description=__doc__)
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        build_reference(options.folder)
        build_pages(options.folder)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if broken := broken_links(options.folder):
        print("links that lead nowhere:", *broken, sep="\n  ", file=sys.stderr)
        return 1
    print(options.folder / "index.html")
    return 0


# --- pages -------------------------------------------------------------------------------------


def build_pages(folder: Path) -> None:
    """Write the pages as HTML, with the pictures that they show."""
    for source, title in PAGES.items():
        path = ROOT / source
        nav = "".join(
            f'<a href="{Path(page).stem}.html"{" class=here" * (page == source)}>{name}</a>\n'
            for page, name in PAGES.items()
        )
        text = PAGE.substitute(
            title=title,
            style=FORMATTER.get_style_defs("pre"),
            nav=nav + '<a href="polyak_rl.html">API reference</a>',
            body=render(path, folder),
        )
        (folder / f"{path.stem}.html").write_text(text, encoding="utf-8")


def render(path: Path, folder: Path) -> str:
    """The body of a page; pictures are copied to the folder."""
    names = reference_of_names()
    markdown = MarkdownIt("commonmark", {"highlight": highlighted}).enable("table")
    tokens = markdown.parse(path.read_text(encoding="utf-8"))
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            token.attrSet("id", re.sub(r"\W+", "-", tokens[i + 1].content.lower()).strip("-"))
        inside = ""
        for child in token.children or ():
            if child.type == "text":
                child.content = UNBROKEN.sub("\u00a0", child.content)
            elif child.type == "link_open":
                inside = link_to(str(child.attrs["href"]), path)
                child.attrSet("href", inside)
            elif child.type == "link_close":
                inside = ""
            elif child.type == "image":
                picture = path.parent / str(child.attrs["src"])
                shutil.copy(picture, folder)
                child.attrSet("src", picture.name)
            elif child.type == "code_inline" and child.content in names and not inside:
                child.type, child.children = "html_inline", []
                code = f"<code>{html.escape(child.content)}</code>"
                child.content = f'<a href="{names[child.content]}">{code}</a>'

    def table(_: Any, tokens: Sequence[Token], i: int, *rest: Any) -> str:
        return '<div class="table"><table>' if tokens[i].nesting > 0 else "</table></div>"

    for kind in ("table_open", "table_close"):
        markdown.add_render_rule(kind, table)
    return str(markdown.renderer.render(tokens, markdown.options, {}))


def link_to(href: str, path: Path) -> str:
    """Where a link of the checkout leads in what is built; what is not built keeps its link."""
    if urlsplit(href).scheme or href.startswith("#"):
        return href
    target, _, anchor = href.partition("#")
    place = (path.parent / target).resolve()
    if place.suffix == ".md":
        page = f"{place.stem}.html"
    elif place.parent == PACKAGE:
        page = "polyak_rl.html" if place.stem == "__init__" else f"polyak_rl/{place.stem}.html"
    else:
        page = target
    return page + (f"#{anchor}" if anchor else "")


def highlighted(code: str, language: str, _: str) -> str:
    """Code in colours."""
    return str(highlight(code, get_lexer_by_name(language or "text"), FORMATTER))


def reference_of_names() -> dict[str, str]:
    """Where each public name of the library is explained."""
    names = {name: f"polyak_rl.html#{name}" for name in polyak_rl.__all__}
    for name, member in vars(sb3).items():
        if getattr(member, "__module__", "") == sb3.__name__ and not inspect.ismodule(member):
            names.setdefault(name, f"polyak_rl/sb3.html#{name}")
    return names | {"polyak_rl.sb3": "polyak_rl/sb3.html"}


# --- the API reference -------------------------------------------------------------------------


def build_reference(folder: Path) -> None:
    """Write the reference of polyak_rl and all its modules as HTML."""
    # A module that shares its name with a public function comes with the package itself.
    come_along = {"__init__", *polyak_rl.__all__}
    names = sorted({path.stem for path in PACKAGE.glob("*.py")} - come_along)
    pdoc.render_helpers.markdown_extensions["latex"] = None  # $$...$$ becomes MathML
    pdoc.render.configure(docformat="google")
    loaders = [jinja2.DictLoader(TEMPLATES), pdoc.render.env.loader]
    pdoc.render.env.loader = jinja2.ChoiceLoader([loader for loader in loaders if loader])
    with warnings.catch_warnings():
        # Members that torch makes, and the fields of named tuples, have no source.
        warnings.filterwarnings("ignore", "Cannot determine where polyak_rl.*_is_param")
        warnings.filterwarnings("ignore", r"Error parsing type annotation ForwardRef\(.*Tensor")
        pdoc.pdoc("polyak_rl", *(f"polyak_rl.{name}" for name in names), output_directory=folder)
    for path in folder.rglob("*.html"):
        tidy(path)


def tidy(path: Path) -> None:
    """Unlink words that are members of a class but not shown; ``torch.nn.Module`` for its home."""
    text = path.read_text(encoding="utf-8")
    anchors = attributes(text, "id")

    def keep(link: re.Match[str]) -> str:
        return link[0] if link[1] in anchors else link[2]

    text = re.sub(r'<a href="#([^"]+)">(.*?)</a>', keep, text)
    dot = '<span class="o">.</span>'
    text = text.replace(
        f'<span class="n">modules</span>{dot}<span class="n">module</span>{dot}', ""
    )
    path.write_text(text, encoding="utf-8")


# --- links -------------------------------------------------------------------------------------


def broken_links(folder: Path) -> list[str]:
    """The links of a folder's pages that lead nowhere in it; those to other sites are not tried."""
    paths = sorted(folder.resolve().rglob("*.html"))
    pages = {path: path.read_text(encoding="utf-8") for path in paths}
    anchors = {path: attributes(page, "id") for path, page in pages.items()}
    broken = []
    for path, page in pages.items():
        for link in sorted(attributes(page, "href|src")):
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.is_file() or (anchor and anchor not in anchors[target]):
                broken.append(f"{path.name}: {link}")
    return broken


def attributes(page: str, names: str) -> set[str]:
    """The values of these attributes; quotes of the text itself are written as entities."""
    markup = re.sub(r"(<script[^>]*>).*?</script>", r"\1", page, flags=re.DOTALL)
    return set(re.findall(rf'\s(?:{names})="([^"]+)"', markup))


if __name__ == "__main__":
    sys.exit(main())
