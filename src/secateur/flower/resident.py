"""The resident participant of a node: a process that stays between messages, with torch, model and rows in memory.

Flower starts a process for every message, which would import torch each time before it could begin. With the first
message of a run that process starts another one, hands it the bytes, and only passes on what comes back; the next
messages find it there. It ends with the process that starts Flower's (the SuperNode or its SuperExec), with the first
message of another run, and when whoever waits for its answer is gone. It listens on a socket in a folder of its owner's
alone, serves one message at a time, and keeps to the same limits of the node's owner as any. Where a ``warm`` process
waits, that one becomes the resident, and nothing has to be imported first.

Where it cannot be had, the process that Flower started does the work itself, as it does when a resident dies of it:
the bits are the same. An owner who wants none says ``resident = false`` in ``--node-config``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import selectors
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import secateur
from secateur.errors import SecateurError, WireError
from secateur.flower.asked import RESIDENT, Answer, Asked, receive_answer, receive_asked, send_answer, send_asked

WARM = "SECATEUR_WARM"
"""The environment's variable that holds the address of a node's warm process."""
GREETING = 10.0
"""Seconds for the first bytes of a connection."""
LOOKS = 0.3
"""Seconds between two looks whether the parent lives."""

_FLOWERS = "flwr-clientapp"  # the command that Flower starts for a message
_READY, _BUSY, _OTHER = b"r", b"b", b"o"
_KEY = 32
_STARTING = 300.0  # seconds for the import of torch, on a busy machine
_LONGEST = 100  # bytes of a socket's address that every system takes
_TRIES = 3
_SETTLED = 600.0  # seconds after which a socket on which nobody listens is one that was left
_STARTED: list[subprocess.Popen[bytes]] = []  # whom this process leaves behind
_GRACE = 1.0  # seconds in which a message is done with whose answer has just been read


class UnavailableError(SecateurError):
    """There is no resident participant, or it has died; its text says why."""


def wanted(asked: Asked) -> bool:
    """Return whether a message is to be handed on: Flower has started this process for it, and its owner agrees."""
    return (
        Path(sys.argv[0]).stem == _FLOWERS
        and asked.node.config.get(RESIDENT, True) is not False
        and hasattr(socket, "AF_UNIX")
        and os.getppid() > 1
    )


def answered(asked: Asked) -> Answer:
    """Return the answer of this node's resident participant, which is started if there is none.

    What it keeps is written back to the node.

    Raises:
        UnavailableError: it cannot be had, is at work on another message, or has died at work.
    """
    parent = os.getppid()
    place = address(hashlib.sha256(f"{asked.node.id} {parent}".encode()).hexdigest()[:16])
    try:
        with _connected(place, parent, _key(asked)) as connection:
            send_asked(connection, asked)
            answer, kept = receive_answer(connection)
    except (OSError, WireError) as broken:
        raise UnavailableError(f"the resident participant has ended at work ({broken})") from broken
    asked.node.kept.clear()
    asked.node.kept.update(kept)
    return answer


def address(name: str) -> Path:
    """Return the address of a socket of this user's.

    Raises:
        UnavailableError: there is no folder for it, or it is too long for a socket.
    """
    place = folder() / f"{name}.sock"
    if len(os.fsencode(place)) > _LONGEST:
        raise UnavailableError(f"{place} is too long for a socket: give this node a shorter TMPDIR")
    return place


def folder() -> Path:
    """Return the folder of this user's sockets, which nobody else may enter.

    Raises:
        UnavailableError: it cannot be made, or it is another user's.
    """
    place = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"secateur-{os.geteuid()}"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = place.lstat()
    except OSError as broken:
        raise UnavailableError(f"{place} cannot be made: {broken.strerror}") from broken
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
        raise UnavailableError(f"{place} is not a folder of this user's alone; delete it, or set XDG_RUNTIME_DIR")
    return place


def _key(asked: Asked) -> bytes:
    """Return what a resident must have been started for: this run, this version, and code from the same places."""
    made_of = [secateur.__version__, sys.executable, asked.node.run, asked.node.id, sys.path, str(Path.cwd())]
    return hashlib.sha256(json.dumps(made_of).encode()).digest()


@contextlib.contextmanager
def _connected(place: Path, parent: int, key: bytes) -> Iterator[socket.socket]:
    """Yield a connection to a resident that is ready.

    Raises:
        UnavailableError: there is none.
        OSError: the socket fails.
    """
    import fcntl  # noqa: PLC0415 -- Windows, where no resident is wanted, has none

    for _ in range(_TRIES):
        with place.with_suffix(".lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two messages at a time one starts it
            connection = _door(place) or _started(place, parent, key)
        with connection:
            connection.settimeout(GREETING)
            connection.sendall(key)
            said = connection.recv(1)
            if said == _READY:
                connection.settimeout(None)
                yield connection
                return
            if said == _BUSY:
                raise UnavailableError("the resident participant is at work on another message")
            connection.recv(1)  # one of another run or version ends
    raise UnavailableError("the resident participant is of another run or version, and does not end")


def _door(place: Path) -> socket.socket | None:
    """Return a connection to who listens at a place, if that is this user; None: nobody does."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(place))
    except OSError:
        connection.close()
        return None
    if not same_user(connection):
        connection.close()
        raise UnavailableError(f"another user listens on {place}")
    return connection


def _sweep(sockets: Path) -> None:
    """Delete the sockets of residents that were killed, with their locks; one that is being made is left alone."""
    for left in sockets.glob("*.sock"):
        with contextlib.suppress(OSError, UnavailableError):  # gone meanwhile, or somebody else's
            if time.time() - left.stat().st_mtime < _SETTLED:
                continue
            connection = _door(left)
            if connection is not None:
                connection.close()
                continue
            left.unlink()
            left.with_suffix(".lock").unlink(missing_ok=True)


def same_user(connection: socket.socket) -> bool:
    """Return whether the other side is a process of this user; where the system does not tell, the folder decides."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(user == os.geteuid())


def _started(place: Path, parent: int, key: bytes) -> socket.socket:
    """Start a resident, wait until it listens, and return a connection to it."""
    _sweep(place.parent)
    place.unlink(missing_ok=True)  # of one that was killed
    begin = {"place": str(place), "parent": parent, "key": key.hex(), "path": sys.path, "folder": str(Path.cwd())}
    if not _warmed(begin):
        _spawn(begin)
    connection = _door(place)
    if connection is None:
        raise UnavailableError("the resident participant has ended at once")
    return connection


def origin() -> list[str]:
    """Return what a warm process must have in common with who asks it: the version and place of this code."""
    return [secateur.__version__, str(secateur.__file__), sys.executable]


def _warmed(begin: Mapping[str, Any]) -> bool:
    """Return whether this node's warm process, if there is one, has become the resident that ``begin`` tells of."""
    place = os.environ.get(WARM)
    connection = _door(Path(place)) if place else None
    if connection is None:
        return False
    with connection, contextlib.suppress(OSError):
        connection.settimeout(_STARTING)
        connection.sendall(json.dumps({**begin, "of": origin()}).encode() + b"\n")
        return connection.recv(1) == _READY
    return False


def _spawn(begin: Mapping[str, Any]) -> None:
    """Start a process that is the resident, and wait until it listens."""
    reads, writes = os.pipe()
    with os.fdopen(reads, "rb", buffering=0) as told:
        try:
            process = subprocess.Popen(  # noqa: S603 -- this interpreter, and no text of anyone else
                [sys.executable, "-m", __name__, json.dumps({**begin, "ready": writes})],
                stdin=subprocess.DEVNULL, pass_fds=[writes], start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(writes)
        _STARTED.append(process)
        with selectors.DefaultSelector() as ready:
            ready.register(told, selectors.EVENT_READ)
            if not ready.select(_STARTING) or told.read(1) != _READY:
                process.kill()
                raise UnavailableError("the resident participant did not start; see the lines before this one")


class _Door(threading.Thread):
    """Lets one message in at a time, and ends the process with its parent or with whoever waits for an answer.

    Args:
        listening: the socket.
        place: its address.
        parent: the process with which this one ends.
        key: what this one was started for.
    """

    def __init__(self, listening: socket.socket, place: Path, parent: int, key: bytes) -> None:
        super().__init__(name="secateur-door", daemon=True)
        self.let_in: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        self._listening, self._place, self._parent, self._key = listening, place, parent, key
        self._watched: socket.socket | None = None
        self._busy = threading.Lock()

    def watch(self, connection: socket.socket) -> None:
        """End the process from now on if the other side of a connection ends."""
        self._watched = connection

    def watch_no_more(self) -> None:
        """Let the other side end."""
        self._watched = None

    def out(self, connection: socket.socket) -> None:
        """Let the next one in."""
        self._watched = None
        connection.close()
        self._busy.release()

    def run(self) -> None:
        """Look after the door for as long as the process lasts."""
        while True:
            watched = self._watched
            with selectors.DefaultSelector() as ready:
                ready.register(self._listening, selectors.EVENT_READ)
                if watched is not None and watched.fileno() >= 0:
                    ready.register(watched, selectors.EVENT_READ)
                due = [key.fileobj for key, _ in ready.select(LOOKS)]
            if not lives(self._parent) or (watched in due and watched is self._watched):
                self._end()
            if self._listening in due:
                with contextlib.suppress(OSError):  # who knocked is gone, or too many files are open: the next look
                    self._greet(self._listening.accept()[0])

    def _greet(self, connection: socket.socket) -> None:
        connection.settimeout(GREETING)
        try:
            key = connection.recv(_KEY) if same_user(connection) else b""
            if len(key) != _KEY:
                connection.close()
            elif not self._busy.acquire(timeout=_GRACE):
                connection.sendall(_BUSY)
                connection.close()
            elif key != self._key:
                self._place.unlink(missing_ok=True)
                connection.sendall(_OTHER)
                self._end()
            else:
                connection.sendall(_READY)
                connection.settimeout(None)
                self.let_in.put(connection)
        except OSError:
            connection.close()

    def _end(self) -> None:
        self._place.unlink(missing_ok=True)
        os._exit(0)


def lives(process: int) -> bool:
    """Return whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True


def main() -> None:
    """Be the resident participant that the command's only argument tells of."""
    begin = json.loads(sys.argv[1])

    def ready(said: bytes) -> None:
        os.write(begin["ready"], said)
        os.close(begin["ready"])

    be(begin, ready)


def be(begin: Mapping[str, Any], ready: Callable[[bytes], object]) -> None:
    """Be a resident participant until this process ends.

    Args:
        begin: its ``place``, its ``parent``, its ``key``, and the ``path`` and ``folder`` of the process that wants it.
        ready: called with a byte for that process once it can be spoken to.
    """
    sys.path[:] = begin["path"]
    os.chdir(begin["folder"])
    from secateur.flower import node  # noqa: PLC0415 -- torch comes with it
    from secateur.flower.messages import LOG  # noqa: PLC0415

    LOG.info("process %d is the resident participant of this node", os.getpid())
    place = Path(begin["place"])
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place))
        listening.listen()
        door = _Door(listening, place, int(begin["parent"]), bytes.fromhex(begin["key"]))
        door.start()
        ready(_READY)
        while True:
            _serve(door.let_in.get(), door, node.answer)


def _serve(connection: socket.socket, door: _Door, answer: Callable[[Asked], Answer]) -> None:
    try:
        asked = receive_asked(connection)
        door.watch(connection)
        said = answer(asked)
        door.watch_no_more()
        send_answer(connection, said, asked.node.kept)
    except (OSError, WireError):
        return  # whoever asked is gone
    finally:
        door.out(connection)


if __name__ == "__main__":
    main()
