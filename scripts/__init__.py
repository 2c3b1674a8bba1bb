"""The command lines of the checkout, and in packages what they are made of."""

import sys
from types import TracebackType


def _name_the_group(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if isinstance(error, ModuleNotFoundError):
        install = "pip install -c constraints.txt -e . --group compare"
        print(f"error: {error}: {install} (dev: for every command)", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # Python looks for a command here, which needs more than the library
    sys.excepthook = _name_the_group
