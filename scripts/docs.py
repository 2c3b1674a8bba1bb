"""Build the API reference from the docstrings, and check the links inside it.

python -m scripts.docs [build/docs]

pdoc reads the docstrings as they are. The pages are plain files that need no server and no network:
formulas are written as MathML, which browsers draw themselves, where pdoc would load MathJax.
"""

import re
import sys
import warnings
from pathlib import Path
from urllib.parse import unquote, urlsplit

import jinja2
import pdoc
import pdoc.render_helpers

PACKAGE = Path(__file__).parent.parent / "polyak_rl"
TEMPLATES = {
    # Every page leads to every module. Members that say nothing are left out, since "Args" and
    # "Attributes" of their class do, and so is what Python says of named tuples.
    "module.html.jinja2": """
{% extends "default/module.html.jinja2" %}
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


def build(folder: Path) -> None:
    """Write the reference of polyak_rl and all its modules as HTML."""
    names = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
    pdoc.render_helpers.markdown_extensions["latex"] = None  # $$...$$ becomes MathML
    pdoc.render.configure(docformat="google")
    pdoc.render.env.loader = jinja2.ChoiceLoader(
        [jinja2.DictLoader(TEMPLATES), pdoc.render.env.loader]
    )
    with warnings.catch_warnings():
        # Members that torch makes, and the fields of named tuples, have no source.
        warnings.filterwarnings("ignore", "Cannot determine where polyak_rl.*_is_param")
        warnings.filterwarnings("ignore", r"Error parsing type annotation ForwardRef\(.*Tensor")
        pdoc.pdoc("polyak_rl", *(f"polyak_rl.{name}" for name in names), output_directory=folder)
    for path in folder.rglob("*.html"):
        _tidy(path)


def broken_links(folder: Path) -> list[str]:
    """The links of a folder's pages that lead nowhere in it; those to other sites are not tried."""
    paths = sorted(folder.resolve().rglob("*.html"))
    pages = {path: path.read_text(encoding="utf-8") for path in paths}
    anchors = {path: _attributes(page, "id") for path, page in pages.items()}
    broken = []
    for path, page in pages.items():
        for link in sorted(_attributes(page, "href|src")):
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.is_file() or (anchor and anchor not in anchors[target]):
                broken.append(f"{path.name}: {link}")
    return broken


def _attributes(page: str, names: str) -> set[str]:
    """The values of these attributes; quotes of the text itself are written as entities."""
    markup = re.sub(r"(<script[^>]*>).*?</script>", r"\1", page, flags=re.DOTALL)
    return set(re.findall(rf'\s(?:{names})="([^"]+)"', markup))


def _tidy(path: Path) -> None:
    """Unlink words that are members of a class but not shown; ``torch.nn.Module`` for its home."""
    text = path.read_text(encoding="utf-8")
    anchors = _attributes(text, "id")

    def keep(link: re.Match[str]) -> str:
        return link[0] if link[1] in anchors else link[2]

    text = re.sub(r'<a href="#([^"]+)">(.*?)</a>', keep, text)
    dot = '<span class="o">.</span>'
    text = text.replace(
        f'<span class="n">modules</span>{dot}<span class="n">module</span>{dot}', ""
    )
    path.write_text(text, encoding="utf-8")


def main() -> int:
    """The command line; returns the exit code."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs")
    build(folder)
    if broken := broken_links(folder):
        print("links that lead nowhere:", *broken, sep="\n  ", file=sys.stderr)
        return 1
    print(folder / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
