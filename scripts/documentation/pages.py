"""The pages of docs/ as HTML.

Links to other pages, to modules of the library and to pictures are those of the checkout, so that
the sources can be read there too. Names of the library become links to where they are explained.
"""

import html
import inspect
import re
import shutil
from pathlib import Path
from string import Template
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

import polyak_rl
from polyak_rl import sb3

ROOT = Path(__file__).parent.parent.parent
TEMPLATE = Path(__file__).parent / "page.html"
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
    "scripts/results/exploratory/report.md": "Report",
    "scripts/results/exploratory/choice.md": "Choosing, replayed",
    "scripts/results/registration.md": "Registration",
}
FORMATTER = HtmlFormatter(nowrap=True)
UNBROKEN = re.compile(r"(?<=\d) (?=(?:µs|ms|MiB)\b)|(?<=\d,) (?=[-+\u2212\d.]+\])")  # spaces


def build_pages(folder: Path) -> None:
    """Write the pages as HTML, with the pictures that they show."""
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    for source, title in PAGES.items():
        path = ROOT / source
        nav = "".join(
            f'<a href="{Path(page).stem}.html"{" class=here" * (page == source)}>{name}</a>\n'
            for page, name in PAGES.items()
        )
        text = template.substitute(
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

    markdown.add_render_rule("table_open", lambda *_: '<div class="table"><table>')
    markdown.add_render_rule("table_close", lambda *_: "</table></div>")
    return str(markdown.renderer.render(tokens, markdown.options, {}))


def link_to(href: str, path: Path) -> str:
    """Where a link of the checkout leads in what is built; what is not built keeps its link."""
    if urlsplit(href).scheme or href.startswith("#"):
        return href
    target, _, anchor = href.partition("#")
    place = (path.parent / target).resolve()
    if place.suffix == ".md":
        page = f"{place.stem}.html"
    elif place.parent == ROOT / "polyak_rl":
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
