"""A SuperNode that looks soon for its next message: ``python -m secateur.flower.supernode``.

It takes what ``flower-supernode`` takes and is that, in all but its waits. Flower's own looks for a message every 3 s,
which on a fast link is most of a round. Here the first look after a message comes half a second later, and later ones
ever more rarely, up to those 3 s, so that a SuperLink with many nodes that wait for one is not asked more often.
Beside it a ``warm`` process waits for the first message of a run, unless the node's configuration says
``resident=false``.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from typing import Any

from secateur.errors import MissingExtraError, install
from secateur.flower import warm
from secateur.flower.asked import RESIDENT
from secateur.flower.resident import UnavailableError

_FIRST, _GROWTH = 0.5, 1.5  # seconds to the first look for a message, and by how much each next wait is longer
_SHORT = 0.1  # seconds between two looks for a reply, which is this machine's alone to answer
_WITHOUT = re.compile(rf"\b{RESIDENT}\s*=\s*false\b")  # in --node-config
_POLL = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.2"  # seconds until a message that came is worked on; Flower's: 1


class Waits:
    """Stands where a SuperNode's code says ``time``: the module, with other sleeps.

    Args:
        longest: the seconds of Flower's own wait for a message; shorter sleeps are those for the reply to one.
    """

    def __init__(self, longest: float = 3.0) -> None:
        self._longest, self._next = longest, _FIRST

    def sleep(self, seconds: float) -> None:
        """Sleep in place of so many seconds."""
        if seconds < self._longest:
            self._next = _FIRST
            time.sleep(min(seconds, _SHORT))
            return
        time.sleep(min(seconds, self._next))
        self._next = min(seconds, _GROWTH * self._next)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def main() -> None:
    """Run Flower's SuperNode with these waits; where its code waits otherwise, it is said, and left as it is.

    Raises:
        MissingExtraError: Flower is not installed.
    """
    try:
        from flwr.supernode import start_client_internal as waiting  # noqa: PLC0415 -- of no public module
        from flwr.supernode.cli import flower_supernode  # noqa: PLC0415
    except ImportError as missing:
        install_line = install("flower", upgrade=True)
        raise MissingExtraError(f"this needs Flower as of 1.41 ({missing}): {install_line}") from missing
    os.environ.setdefault(*_POLL)
    if getattr(waiting, "time", None) is time:
        setattr(waiting, "time", Waits())  # noqa: B010 -- a module of another type
    else:
        sys.stderr.write("secateur: this Flower waits for messages in another way, which is left as it is\n")
    if hasattr(socket, "AF_UNIX") and not any(map(_WITHOUT.search, sys.argv)):
        try:
            warm.keep()
        except UnavailableError as broken:
            sys.stderr.write(f"secateur: {broken}; the first message of a run waits for imports\n")
    sys.argv[0] = "flower-supernode"
    flower_supernode()


if __name__ == "__main__":
    main()
