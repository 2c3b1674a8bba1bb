"""The API reference from the docstrings.

pdoc reads the docstrings as they are; formulas become MathML, which browsers draw themselves, where
it would load a script from elsewhere.
"""

import re
import warnings
from pathlib import Path

import jinja2
import pdoc
import pdoc.render_helpers

import polyak_rl
from scripts.documentation.links import attributes

PACKAGE = Path(polyak_rl.__file__).parent
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
