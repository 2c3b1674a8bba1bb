"""A text with tables and figures: Markdown, and one HTML file made of it."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from scripts.experiment.paths import make_folder
from scripts.experiment.wording import table

CSS = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 80rem; margin: 0 auto; padding: 1rem 1rem 4rem; overflow-wrap: anywhere; }
p, li, blockquote { max-width: 56rem; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.25rem; margin-top: 2.6rem; border-bottom: 1px solid #ddd;
     padding-bottom: .25rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
blockquote { font-size: 1.1rem; margin: 1rem 0; border-left: 4px solid #0072B2;
             padding-left: .9rem; }
.scroll { overflow-x: auto; overflow-wrap: normal; margin: 1rem 0; scrollbar-width: auto;
          scrollbar-color: #767676 #e6e6e6; padding-bottom: .3rem;
          background: linear-gradient(to right, #fff 30%, #fff0) left / 3rem 100% no-repeat local,
                      linear-gradient(to left, #fff 30%, #fff0) right / 3rem 100% no-repeat local,
                      linear-gradient(to left, #0004, #0000) right / .8rem 100% no-repeat scroll; }
.scroll::-webkit-scrollbar { height: 10px; background: #e6e6e6; }
.scroll::-webkit-scrollbar-thumb { background: #767676; border-radius: 5px; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; white-space: nowrap;
         border-bottom: 1px solid #e6e6e6; vertical-align: top; }
td:first-child, td:last-child { white-space: normal; min-width: 7.5rem; }
th { border-bottom: 2px solid #999; white-space: normal; vertical-align: bottom; }
img { display: block; width: 100%; max-width: 44rem; height: auto; margin: 1.2rem 0 .4rem; }
code { font-size: .9em; }
"""


class Page:
    """A text that grows from top to bottom.

    It is Markdown without HTML: what comes from elsewhere goes through `wording.plain`. In `out`
    are report.md, report.html and figures/ in the end.
    """

    def __init__(self, title: str, out: Path) -> None:
        self.title, self.out = title, out
        make_folder(out / "figures")
        self.parts = [f"# {title}"]
        self.pictures: dict[str, str] = {}  # file -> what the HTML shows in its place

    def heading(self, text: str, level: int = 2) -> None:
        """Begin a section."""
        self.parts.append(f"{'#' * level} {text}")

    def text(self, text: str) -> None:
        """A paragraph."""
        self.parts.append(text)

    def finding(self, text: str) -> None:
        """A paragraph that is set off."""
        self.parts.append(f"> {text}")

    def bullets(self, items: Sequence[str]) -> None:
        """A list, or nothing."""
        if items:
            self.parts.append("\n".join(f"- {item}" for item in items))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table, which scrolls by itself on a narrow screen; nothing without rows."""
        if rows:
            self.parts.append(table(header, rows))

    def figure(self, name: str, figure: Figure, caption: str) -> None:
        """Save the figure as PNG and SVG, and show it over its caption."""
        png, svg = (self.out / "figures" / f"{name}.{kind}" for kind in ("png", "svg"))
        figure.savefig(png, dpi=200)
        figure.set_layout_engine("none")  # it stays as it was laid out
        figure.savefig(svg, metadata={"Date": None})
        data = base64.b64encode(svg.read_bytes()).decode()
        self.pictures[f"figures/{png.name}"] = f"data:image/svg+xml;base64,{data}"
        self.parts += [f"![{caption.split('.')[0]}](figures/{png.name})", caption]

    def save(self) -> Path:
        """Write report.md and report.html, and return the latter."""
        text = "\n\n".join(self.parts) + "\n"
        (self.out / "report.md").write_text(text, encoding="utf-8")
        page = self.out / "report.html"
        page.write_text(
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(self.title)}</title>\n<style>{CSS}</style>\n</head>\n"
            f"<body>\n{self._html(text)}</body>\n</html>\n",
            encoding="utf-8",
        )
        return page

    def _html(self, text: str) -> str:
        markdown: Any = MarkdownIt("commonmark", {"html": False}).enable("table")
        tokens = markdown.parse(text.replace(" %", "\u00a0%"))
        for token in tokens:
            for part in token.children or ():
                if part.type == "image":
                    part.attrs["src"] = self.pictures[part.attrs["src"]]
        rules = markdown.renderer.rules
        rules["table_open"] = lambda *_: '<div class="scroll" tabindex="0"><table>\n'
        rules["table_close"] = lambda *_: "</table></div>\n"
        return str(markdown.renderer.render(tokens, markdown.options, {}))
