"""What happens to each tensor of a network: it is copied, averaged or kept, by name pattern."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias, TypeVar

from torch import Tensor

from polyak_rl.pairing import require_matches

Treatment: TypeAlias = Literal["copy", "average", "keep"]
"""What happens to a tensor: copied exactly, averaged, or left alone."""

Buffers: TypeAlias = Treatment | Mapping[str, Treatment]
"""One treatment of all buffers, or one per name pattern; the last pattern that matches counts."""

_T = TypeVar("_T")


def choose_treatments(
    tensors: Sequence[tuple[str, Tensor, bool]], buffers: Buffers
) -> dict[str, Treatment]:
    """What happens to each (name, tensor, is_buffer): parameters are averaged, integers never."""
    for treatment in buffers.values() if isinstance(buffers, Mapping) else [buffers]:
        if treatment not in ("copy", "average", "keep"):
            raise ValueError(f"buffers must be 'copy', 'average' or 'keep', got {treatment!r}")
    names = [name for name, _, is_buffer in tensors if is_buffer]
    if isinstance(buffers, Mapping):
        treatments = by_pattern("buffers", buffers, names, "copy")
    else:
        treatments = dict.fromkeys(names, buffers)
    for name, tensor, _ in tensors:
        treatment = treatments.setdefault(name, "average")
        if treatment == "average" and not (tensor.is_floating_point() or tensor.is_complex()):
            treatments[name] = "copy"
    return treatments


def keeps(buffers: Buffers) -> Callable[[str], bool]:
    """Says by name whether a buffer is left alone."""
    if not isinstance(buffers, Mapping):
        return lambda _: buffers == "keep"

    def kept(name: str) -> bool:
        found = [how for pattern, how in buffers.items() if fnmatchcase(name, pattern)]
        return found[-1:] == ["keep"]

    return kept


def by_pattern(
    argument: str, patterns: Mapping[str, _T], names: list[str], default: _T | None = None
) -> dict[str, _T]:
    """The value of the last pattern that matches each name.

    Raises:
        ValueError: a pattern matches no name, or, without a default, a name has no pattern.
    """
    require_matches(argument, patterns, names)
    values = {}
    for name in names:
        found = [value for pattern, value in patterns.items() if fnmatchcase(name, pattern)]
        if not found and default is None:
            raise ValueError(
                f"no {argument} pattern matches {name!r}; the patterns are {[*patterns]}"
            )
        values[name] = found[-1] if found else default
    return values  # type: ignore[return-value]
