"""Episodes that are played with a run that has ended: none twice, unless that is asked for.

Weights that are tried on the same episodes again and again are chosen on them in the end. So each
call of a script takes the episodes after those of all calls before it; a file in the run's folder
has their numbers.
"""

import json
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from agents.seeding import Purpose, evaluation_seeds
from polyak_rl.files import write_whole

CALLS = "episodes.json"
MOST = 10_000_000
"""Episodes of a run, which have to be counted through."""


def first_episode(folder: Path, again: int | None = None) -> int:
    """The first episode of the next call, or of the earlier one that is to be played once more.

    Raises:
        ValueError: There was no such call, or what was played is not known.
    """
    calls = _calls(folder)
    if again is None:
        return max((call["first"] + call["episodes"] for call in calls), default=0)
    if not 1 <= again <= len(calls):
        raise ValueError(f"{folder} has had {len(calls)} calls, got --again {again}")
    return int(calls[again - 1]["first"])


def note_call(folder: Path, by: str, first: int, episodes: int) -> int:
    """Write down what a call has played, before anybody sees it; the number of the call.

    Raises:
        OSError: It cannot be written.
    """
    calls = [*_calls(folder), {"by": by, "first": first, "episodes": episodes}]
    with write_whole(folder / CALLS) as file:
        file.write(json.dumps(calls, indent=1).encode() + b"\n")
    return len(calls)


def seeds_of(env_id: str, seed: int, episodes: range) -> NDArray[Any]:
    """The environment's seeds of these episodes of the run with this training seed."""
    if episodes.stop > MOST:
        raise ValueError(f"a run has {MOST:,} episodes, got number {episodes.stop:,}")
    return evaluation_seeds(env_id, seed, episodes.stop, Purpose.POSTHOC)[episodes.start :]


def _calls(folder: Path) -> list[dict[str, Any]]:
    place = folder / CALLS
    if not place.is_file():
        return []
    try:
        calls: list[dict[str, Any]] = json.loads(place.read_bytes())
        known = all(
            type(call[key]) is int and 0 <= call[key] <= MOST
            for call in calls
            for key in ("first", "episodes")
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        known = False
    if not known:
        raise ValueError(f"{place} is damaged: delete it if episodes may be played a second time")
    return calls
