"""Build the documentation: the pages of docs/, and the API reference from the docstrings.

    python -m scripts.docs [build/docs]

What comes out are plain files that need no server and no network. They are checked for links that
lead nowhere.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from scripts.documentation.links import broken_links
from scripts.documentation.pages import build_pages
from scripts.documentation.reference import build_reference
from scripts.experiment.paths import make_folder


@dataclass(frozen=True)
class Options:
    """Build the documentation."""

    folder: tyro.conf.Positional[Path] = Path("build/docs")
    """where it is written"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = tyro.cli(Options, args=argv, prog="python -m scripts.docs", description=__doc__)
    try:
        make_folder(options.folder)
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


if __name__ == "__main__":
    sys.exit(main())
