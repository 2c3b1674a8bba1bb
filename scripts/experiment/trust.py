"""Whose code a run folder may have imported: none, unless whoever started this trusts it."""

import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path


def require_trusted(name: str, run: Path, *, trust: bool) -> None:
    """Refuse a name of the form `module:Name` whose module a run folder should not have imported.

    The module is looked for without importing anything, its packages neither.

    With `trust` whoever started this trusts the folder; a module inside it is refused all the same.

    Raises:
        ValueError: The module is in the folder, or it is not trusted.
    """
    module, colon, _ = name.partition(":")
    if not colon:
        return
    places = [place.resolve() for place in _places(module)]
    if inside := [place for place in places if place.is_relative_to(run.resolve())]:
        raise ValueError(
            f"{run} names {name!r}, whose module lies in that folder itself ({inside[0]}): "
            "it is not imported"
        )
    where = f"the module {module!r} ({', '.join(map(str, places)) or 'which is not found here'})"
    if not trust:
        raise ValueError(
            f"{run} names {name!r}, which imports {where}: add --trust if you trust that folder"
        )
    print(f"importing {where} for {name!r}", file=sys.stderr)


def _places(module: str) -> list[Path]:
    """Where a module and the packages around it would be imported from."""
    places: list[Path] = []
    search: Sequence[str] | None = None
    for part in module.split("."):
        # By its last name alone: of a whole one, Python looks for the parents among the imported.
        spec = PathFinder.find_spec(part, search)
        if spec is None:
            break
        search = spec.submodule_search_locations
        places += [Path(each) for each in search or ()]
        places += [Path(spec.origin)] if spec.has_location and spec.origin else []
        if search is None:
            break
    return places
