"""A text with tables and figures, written as Markdown and as one HTML file at once."""

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

CSS = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 70rem; margin: 0 auto; padding: 1rem 1rem 4rem; overflow-wrap: anywhere; }
p, ul, figure { max-width: 46rem; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2.6rem; border-bottom: 1px solid #ddd; padding-bottom: .25rem; }
p.finding { font-size: 1.1rem; border-left: 4px solid #0072B2; padding-left: .9rem; }
.scroll { overflow-x: auto; overflow-wrap: normal; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem .3rem 0; text-align: left; white-space: nowrap;
         border-bottom: 1px solid #e6e6e6; vertical-align: top; }
td:last-child { white-space: normal; min-width: 7rem; }
th { border-bottom: 2px solid #999; white-space: normal; vertical-align: bottom; }
figure { margin: 1.2rem 0; }
figure img { width: 100%; max-width: 38rem; height: auto; }
figcaption, .caption { color: #444; font-size: .9rem; }
code { font-size: .9em; }
"""


class Page:
    """One text, written as Markdown and as HTML at once; `**bold**` and `code` mean the same."""

    def __init__(self, title: str, out: Path) -> None:
        self.out = out
        (out / "figures").mkdir(parents=True, exist_ok=True)
        self.title = title
        self.markdown = [f"# {title}"]
        self.html = [f"<h1>{self.inline(title)}</h1>"]

    @staticmethod
    def inline(text: str) -> str:
        """The text with its two kinds of mark-up as HTML."""
        text = html.escape(text, quote=False).replace(" %", "&nbsp;%")
        text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
        return re.sub(r"`(.+?)`", r"<code>\1</code>", text)

    def heading(self, text: str) -> None:
        """Begin a section."""
        self.markdown.append(f"## {text}")
        self.html.append(f"<h2>{self.inline(text)}</h2>")

    def text(self, text: str, finding: bool = False) -> None:
        """A paragraph, set off where it is the finding."""
        self.markdown.append(f"**{text}**" if finding else text)
        self.html.append(f"<p{' class=finding' * finding}>{self.inline(text)}</p>")

    def bullets(self, items: Sequence[str]) -> None:
        """A list, or nothing."""
        if items:
            self.markdown.append("\n".join(f"- {item}" for item in items))
            rows = "\n".join(f"<li>{self.inline(item)}</li>" for item in items)
            self.html.append(f"<ul>\n{rows}\n</ul>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table, which scrolls by itself on a narrow screen."""
        cells = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
        cells.insert(1, ["---"] * len(header))
        self.markdown.append("\n".join(f"| {' | '.join(row)} |" for row in cells))
        head = "".join(f"<th>{self.inline(cell)}</th>" for cell in header)
        body = "\n".join(
            "<tr>" + "".join(f"<td>{self.inline(cell)}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        self.html.append(
            f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody></table></div>"
        )

    def figure(self, name: str, figure: Figure, caption: str) -> None:
        """Save the figure as PNG and SVG, and embed the latter."""
        png, svg = (self.out / "figures" / f"{name}.{kind}" for kind in ("png", "svg"))
        figure.savefig(png, dpi=200)
        figure.savefig(svg, metadata={"Date": None})
        self.markdown.append(f"![{re.split('[.,:;]', caption)[0]}](figures/{png.name})")
        self.markdown.append(caption)
        data = base64.b64encode(svg.read_bytes()).decode()
        self.html.append(
            f'<figure><img alt="{html.escape(caption)}" src="data:image/svg+xml;base64,{data}">\n'
            f"<figcaption>{self.inline(caption)}</figcaption></figure>"
        )

    def save(self) -> None:
        """Write report.md and report.html."""
        (self.out / "report.md").write_text("\n\n".join(self.markdown) + "\n", encoding="utf-8")
        body = "\n".join(self.html)
        (self.out / "report.html").write_text(
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(self.title)}</title>\n<style>{CSS}</style>\n</head>\n"
            f"<body>\n{body}\n</body>\n</html>\n",
            encoding="utf-8",
        )
