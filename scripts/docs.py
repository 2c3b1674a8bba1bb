"""Build the documentation: the pages of docs/, and the API reference from the docstrings.

    python -m scripts.docs [build/docs]

What comes out are plain files that need no server and no network. They are checked for links that
lead nowhere.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from scripts.documentation.links import broken_links
from scripts.documentation.pages import build_pages
from scripts.documentation.reference import build_reference
from scripts.experiment.paths import make_folder
from scripts.experiment.terminal import command_line


@dataclass(frozen=True)
class Options:
    """Build the documentation."""

    folder: tyro.conf.Positional[Path] = Path("build/docs")
    """where it is written"""


@command_line("docs", Options, __doc__)
def main(options: Options) -> int:
    """Build it, and look at its links."""
    make_folder(options.folder)
    build_reference(options.folder)
    build_pages(options.folder)
    if broken := broken_links(options.folder):
        print("links that lead nowhere:", *broken, sep="\n  ", file=sys.stderr)
        return 1
    print(options.folder / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
