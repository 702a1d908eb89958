"""Pipes between the server and its worker processes: small items through the pipe, large results through memory."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

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


def send(pipe: Connection, items: Sequence[Item]) -> None:
    """Send items; texts and states as they are, without a copy."""
    packed = [_ITEM.pack(kind, who, text is not None, state is not None) for kind, who, text, state in items]
    pipe.send_bytes(b"".join(packed))
    for _, _, *parts in items:
        for part in parts:
            if part is not None:
                pipe.send_bytes(part)


def receive(pipe: Connection) -> list[Item]:
    """Return the items that were sent."""
    return [
        (kind, who, pipe.recv_bytes() if text else None, pipe.recv_bytes() if state else None)
        for kind, who, text, state in _ITEM.iter_unpack(pipe.recv_bytes())
    ]


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
        view, at, views = memoryview(self._mapped(sum(map(_room, sizes)))), 0, []
        for size in sizes:
            views.append(view[at : at + size])
            at += _room(size)
        return views

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


def receive_result(pipe: Connection, room: Room) -> list[memoryview]:
    """Return a result; its memory is the room's if it is large."""
    where, *sizes = (number for (number,) in _PLACE.iter_unpack(pipe.recv_bytes()))
    if where < 0:
        return room.read(sizes)
    view, at, views = memoryview(bytearray(pipe.recv_bytes())), 0, []
    for size in sizes:
        views.append(view[at : at + size])
        at += _room(size)
    return views


def _room(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
