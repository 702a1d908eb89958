"""The script that this process runs, kept out of the processes that it starts.

A process that is forked from a clean one, or spawned, first runs its parent's main script again, so that it finds what
is defined there. A script without ``if __name__ == "__main__":`` would start its whole run once more, and Python stops
it. Workers need the script only where what they are given is defined in it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from types import ModuleType

_MAIN = "__main__"


def needed(given: object) -> bool:
    """Return whether what a process is given names this process's main script."""
    return _MAIN.encode() in bytes(ForkingPickler.dumps(given))


@contextlib.contextmanager
def spared(given: object) -> Iterator[None]:
    """Have processes that are started inside the block not run the main script again, unless ``given`` needs it."""
    if needed(given):
        yield
        return
    script = sys.modules[_MAIN]
    sys.modules[_MAIN] = ModuleType(_MAIN)  # what starts processes looks here for the script's path
    try:
        yield
    finally:
        sys.modules[_MAIN] = script
