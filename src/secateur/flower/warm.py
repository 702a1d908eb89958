"""A warm process has imported torch, and waits to become its node's resident participant.

``supernode`` starts it beside Flower's processes, so that the first message of a run does not wait for imports. It
listens on a socket in the same folder as residents, becomes what the first process of its own version and place asks
for, and ends with the node if nobody has.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from secateur.flower import resident
from secateur.flower.resident import GREETING, LOOKS, WARM, address, lives, origin, same_user

_MOST = 2**20  # bytes of an order
_AFTER = 1.0  # seconds until the first one is started: a SuperNode that is refused its flags has ended by then
_ENDED = 5.0  # seconds within which a warm process that has ended cannot be had


def keep() -> None:
    """Have a warm process from now on, and a new one when it has ended as a resident; tell where it listens.

    Raises:
        UnavailableError: its socket has no place.
    """
    place = address(f"warm-{os.getpid()}")
    os.environ[WARM] = str(place)
    threading.Thread(target=_keep, args=(place,), name="secateur-warm", daemon=True).start()


def _keep(place: Path) -> None:
    time.sleep(_AFTER)
    while True:
        began = time.monotonic()
        command = [sys.executable, "-m", __name__, str(place)]
        subprocess.run(command, stdin=subprocess.DEVNULL, start_new_session=True, check=False)  # noqa: S603 -- ours
        if time.monotonic() < began + _ENDED:
            return


def main() -> None:
    """Wait at the address that is the command's only argument, then be what was asked for."""
    parent, place = os.getppid(), Path(sys.argv[1])
    if parent == 1:
        return
    from secateur.flower import node  # noqa: PLC0415 -- torch comes with it

    del node
    place.unlink(missing_ok=True)  # of a process with this one's parent's number, long ago
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place))
        listening.listen()
        begin, connection = _ordered(listening, parent)
        place.unlink(missing_ok=True)
    if connection is None:
        return
    with connection:
        resident.be(begin, connection.sendall)


def _ordered(listening: socket.socket, parent: int) -> tuple[dict[str, Any], socket.socket | None]:
    """Return the order of the first process of this version and place, and its connection; None: the parent ended."""
    with selectors.DefaultSelector() as ready:
        ready.register(listening, selectors.EVENT_READ)
        while lives(parent):
            if not ready.select(LOOKS):
                continue
            connection, _ = listening.accept()
            connection.settimeout(GREETING)
            begin = _order(connection)
            if begin.get("of") == origin():
                connection.settimeout(None)
                return begin, connection
            connection.close()
    return {}, None


def _order(connection: socket.socket) -> dict[str, Any]:
    """Return what a connection asks for; nothing: it is another user's, or says nothing of that kind."""
    try:
        with connection.makefile("rb") as lines:
            said = json.loads(lines.readline(_MOST)) if same_user(connection) else {}
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


if __name__ == "__main__":
    main()
