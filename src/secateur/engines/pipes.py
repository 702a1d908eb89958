"""Pipes between the server and its worker processes: small items through the pipe, large results through memory.

A worker waits for the server. The server never waits for a worker: one that is stopped, swapped out or killed in the
middle of a message costs its own clients their round, at the deadline, and nobody else anything.
"""

from __future__ import annotations

import mmap
import os
import selectors
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeVar

READY, OK, RAISED, BROKEN, JOB, GATHER, MADE = range(7)
"""The kinds of items: a worker is ready; a request or a reply; a client's code raised; the worker cannot serve; the
description of a job follows; requests of that job follow; what was made of them follows."""

Item = tuple[int, int, bytes | None, bytes | None]
"""A kind, a client's number, a text and a state."""

Buffer = bytes | bytearray | memoryview

_ITEM = struct.Struct("<Bq??")
_SMALL = 2**18
_PLACE = struct.Struct("<q")
_ALIGNED = 64


Heard = tuple[list[Item], list[memoryview]]
"""Items, and the result that was made of them; see ``MADE``."""

_Found = TypeVar("_Found")
_Steps = Generator[None, bytes | bytearray, _Found]

_POLLS = os.name == "posix"  # a pipe can be asked whether it takes more

# how ``Connection`` writes a message: its length, or -1 and its length in more bytes; then the message
_LENGTH, _LONG = struct.Struct("!i"), struct.Struct("!Q")
_MOST_SHORT = 0x7FFFFFFF
_PARTS = 16


def messages(items: Sequence[Item]) -> list[Buffer]:
    """Return items as the messages that ``receive`` reads; texts and states as they are, without a copy."""
    packed = [_ITEM.pack(kind, who, text is not None, state is not None) for kind, who, text, state in items]
    return [b"".join(packed), *(part for _, _, *parts in items for part in parts if part is not None)]


def send(pipe: Connection, items: Sequence[Item]) -> None:
    """Send items."""
    for message in messages(items):
        pipe.send_bytes(message)


def receive(pipe: Connection) -> list[Item]:
    """Return the items that were sent."""
    steps = _items()
    try:
        next(steps)
        while True:
            steps.send(pipe.recv_bytes())
    except StopIteration as done:
        items: list[Item] = done.value
        return items


def _items() -> _Steps[list[Item]]:
    """Return items; each message that they are made of is sent to this generator."""
    items = list[Item]()
    for kind, who, text, state in _ITEM.iter_unpack((yield)):
        items.append((kind, who, bytes((yield)) if text else None, bytes((yield)) if state else None))
    return items


def _heard(room: Callable[[], Room]) -> _Steps[Heard]:
    """Return what a worker says; as ``_items``."""
    items = yield from _items()
    if not items or items[-1][0] != MADE:
        return items, []
    here = room()  # the next in turn, also where the result is small enough for the pipe
    where, *sizes = (number for (number,) in _PLACE.iter_unpack((yield)))
    return items[:-1], here.read(sizes) if where < 0 else _apart(memoryview((yield)), sizes)


class Channel:
    """The server's end of a worker's pipe, which never waits for the worker.

    On systems whose pipes cannot be asked whether they take more (Windows), it does.

    Args:
        pipe: the server's end; closed with the channel.
        room: called for each result; returns where it lies if it is large.
    """

    def __init__(self, pipe: Connection, room: Callable[[], Room]) -> None:
        self.pipe = pipe
        self._room = room
        self._waits = not _POLLS
        self._out = deque[memoryview]()
        self._steps: _Steps[Heard] | None = None
        self._length = _LENGTH
        self._message, self._got = bytearray(_LENGTH.size), 0  # of a length first, then of what is so long
        self._body = False
        if not self._waits:
            os.set_blocking(pipe.fileno(), False)

    @property
    def full(self) -> bool:
        """Return whether some of what was said still waits for the pipe to take it; see ``flush``."""
        return bool(self._out)

    def say(self, parts: Iterable[Buffer]) -> None:
        """Send messages, as much of them as the pipe takes now.

        Raises:
            OSError: the worker is gone.
        """
        for part in parts:
            if self._waits:
                self.pipe.send_bytes(part)
                continue
            view = memoryview(part).cast("B")
            short = len(view) <= _MOST_SHORT
            head = _LENGTH.pack(len(view)) if short else _LENGTH.pack(-1) + _LONG.pack(len(view))
            self._out += [memoryview(head), view] if view else [memoryview(head)]
        self.flush()

    def flush(self) -> None:
        """Send more of what was said.

        Raises:
            OSError: the worker is gone.
        """
        while self._out:
            try:
                sent = os.writev(self.pipe.fileno(), [self._out[k] for k in range(min(_PARTS, len(self._out)))])
            except BlockingIOError:
                return
            while sent >= len(self._out[0]) if self._out else False:
                sent -= len(self._out.popleft())
            if sent:
                self._out[0] = self._out[0][sent:]

    def hear(self) -> Heard | None:
        """Return what the worker has said; None as long as it has not come to its end.

        The memory of a result is used again for what is made two tasks later.

        Raises:
            OSError, EOFError: the worker is gone.
        """
        while (message := self._next()) is not None:
            if self._steps is None:
                self._steps = _heard(self._room)
                next(self._steps)
            try:
                self._steps.send(message)
            except StopIteration as done:
                self._steps = None
                found: Heard = done.value
                return found
        return None

    def _next(self) -> bytes | bytearray | None:
        """Return the next message; None if it is not all there."""
        if self._waits:
            return self.pipe.recv_bytes() if self._steps is not None or self.pipe.poll() else None
        while self._filled():
            whole = self._message
            if self._body:
                self._expect(_LENGTH, _LENGTH.size, body=False)
                return whole
            (length,) = self._length.unpack(whole)
            if length < 0:
                self._expect(_LONG, _LONG.size, body=False)
            else:
                self._expect(_LENGTH, length, body=True)
        return None

    def _expect(self, length: struct.Struct, size: int, *, body: bool) -> None:
        self._length, self._message, self._got, self._body = length, bytearray(size), 0, body

    def _filled(self) -> bool:
        """Read what has come of the part that is expected; return whether it is all there."""
        while self._got < len(self._message):
            try:
                came = os.readv(self.pipe.fileno(), [memoryview(self._message)[self._got :]])
            except BlockingIOError:
                return False
            if not came:
                raise EOFError
            self._got += came
        return True

    def close(self) -> None:
        """Close the pipe."""
        self.pipe.close()


class Ended(Protocol):
    """What ``ready`` watches: a channel, and what tells that the process at its other end has ended."""

    @property
    def channel(self) -> Channel:
        """Return the channel."""

    @property
    def sentinel(self) -> int:
        """Return what can be waited for until the process ends."""


_Watched = TypeVar("_Watched", bound=Ended)


def ready(watched: Sequence[_Watched], timeout: float | None) -> list[_Watched]:
    """Wait until some of these have said something, take more, or have ended; return them.

    A process that somebody's code left behind may hold a dead worker's pipe open: the worker's end is watched too.
    """
    if not _POLLS:
        found = wait([part for one in watched for part in (one.channel.pipe, one.sentinel)], timeout)
        return [one for one in watched if one.channel.pipe in found or one.sentinel in found]
    kind = getattr(selectors, "PollSelector", selectors.SelectSelector)
    with kind() as selector:
        for number, one in enumerate(watched):
            writes = selectors.EVENT_WRITE if one.channel.full else 0
            selector.register(one.channel.pipe.fileno(), selectors.EVENT_READ | writes, number)
            selector.register(one.sentinel, selectors.EVENT_READ, number)
        return [watched[number] for number in sorted({key.data for key, _ in selector.select(timeout)})]


def one_line(error: BaseException) -> bytes:
    """Return an exception as one line."""
    # a text may hold what UTF-8 cannot (lone surrogates of a file name): it must not cost the worker
    return f"{type(error).__name__}: {' '.join(str(error).split())}".encode(errors="backslashreplace")


class Room:
    """Memory that a worker and the server share, for results too large for a pipe; it grows as needed.

    It has no name in any file system and ends with the processes that hold it. Where the system has no such memory,
    all results go through the pipe.

    Args:
        handle: the file descriptor of the memory; None: there is none.
    """

    def __init__(self, handle: int | None) -> None:
        self._handle = handle
        self._map: mmap.mmap | None = None

    @classmethod
    def make(cls) -> Room:
        """Return a new room."""
        return cls(os.memfd_create("secateur") if hasattr(os, "memfd_create") else None)

    def __reduce__(self) -> tuple[Any, ...]:
        """Hand the memory to a process that is being started."""
        return _opened, (None if self._handle is None else reduction.DupFd(self._handle),)

    def write(self, buffers: Sequence[Buffer], sizes: Sequence[int]) -> bool:
        """Write buffers; return whether they are too large for a pipe, so that they were written here."""
        total = sum(map(_room, sizes))
        if self._handle is None or total < _SMALL:
            return False
        if os.fstat(self._handle).st_size < total:
            os.ftruncate(self._handle, total)
        view, at = memoryview(self._mapped(total)), 0
        for buffer, size in zip(buffers, sizes, strict=True):
            view[at : at + size] = memoryview(buffer).cast("B")
            at += _room(size)
        return True

    def read(self, sizes: Sequence[int]) -> list[memoryview]:
        """Return views of what was written last; they are overwritten by what is written next."""
        return _apart(memoryview(self._mapped(sum(map(_room, sizes)))), sizes)

    def close(self) -> None:
        """Give the memory back, once no view of it is used."""
        self._map = None
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _mapped(self, size: int) -> mmap.mmap:
        if self._map is None or len(self._map) < size:
            self._map = mmap.mmap(self._handle or 0, os.fstat(self._handle or 0).st_size)
        return self._map


def _opened(handle: Any) -> Room:
    return Room(None if handle is None else handle.detach())


def send_result(pipe: Connection, room: Room, buffers: Sequence[Buffer]) -> None:
    """Send a result: its sizes and, unless it is large, its bytes."""
    sizes = [memoryview(buffer).nbytes for buffer in buffers]
    written = room.write(buffers, sizes)
    pipe.send_bytes(b"".join([_PLACE.pack(-1 if written else len(sizes)), *map(_PLACE.pack, sizes)]))
    if not written:
        padding = (bytes(_room(size) - size) for size in sizes)
        pipe.send_bytes(b"".join(part for pair in zip(buffers, padding, strict=True) for part in pair))


def _apart(view: memoryview, sizes: Sequence[int]) -> list[memoryview]:
    """Return a result that came through the pipe as its parts."""
    at, views = 0, []
    for size in sizes:
        views.append(view[at : at + size])
        at += _room(size)
    return views


def _room(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
