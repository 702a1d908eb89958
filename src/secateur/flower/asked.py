"""What a node is asked, in plain types, and how it is written to the node's resident participant.

Neither torch nor Flower is imported here: the process that Flower starts for a message needs no more than this, where a
``resident`` does the work.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.errors import WireError

About = dict[str, Any]
Records = dict[str, dict[str, bytes]]

RESIDENT = "resident"
"""The key in ``--node-config`` by which an owner wants no resident participant."""

_HEAD = struct.Struct("<I")
_LONGEST = 2**26  # bytes of what a frame says of its parts
_CHUNK = 2**20


@dataclass
class Node:
    """What Flower says of a node, and what it keeps there.

    Attributes:
        id: the node's number on its SuperLink.
        run: the number of Flower's run.
        config: the node's configuration.
        settings: the run's configuration.
        kept: records of bytes by name, which last as long as the run; whoever answers may change them.
    """

    id: int
    run: int
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    kept: Records = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """A message to a node.

    Attributes:
        kind: its message type.
        about: the facts in it.
        payload: the bytes in it, if there are any.
        node: which is asked.
    """

    kind: str
    about: About
    payload: bytes | None
    node: Node


@dataclass(frozen=True)
class Answer:
    """What a node answers; a failure is facts too, see ``codes``.

    Attributes:
        about: the facts.
        payload: the bytes, if there are any.
    """

    about: About
    payload: bytes | None = None


def send_asked(connection: socket.socket, asked: Asked) -> None:
    """Write a message to a connection."""
    node = asked.node
    head = {"kind": asked.kind, "id": node.id, "run": node.run, "config": dict(node.config)}
    _send(connection, {**head, "settings": dict(node.settings)}, asked.about, asked.payload, node.kept)


def receive_asked(connection: socket.socket) -> Asked:
    """Read a message from a connection.

    Raises:
        WireError: the connection ended, or something else came.
    """
    head, about, payload, kept = _receive(connection)
    try:
        node = Node(int(head["id"]), int(head["run"]), dict(head["config"]), dict(head["settings"]), kept)
        return Asked(str(head["kind"]), about, payload, node)
    except (KeyError, TypeError, ValueError) as broken:
        raise WireError(f"a message over the resident participant's socket lacks {broken}") from broken


def send_answer(connection: socket.socket, answer: Answer, kept: Records) -> None:
    """Write an answer to a connection, with what the node keeps now."""
    _send(connection, {}, answer.about, answer.payload, kept)


def receive_answer(connection: socket.socket) -> tuple[Answer, Records]:
    """Read an answer from a connection, and what the node keeps now.

    Raises:
        WireError: the connection ended, or something else came.
    """
    _, about, payload, kept = _receive(connection)
    return Answer(about, payload), kept


def _send(
    connection: socket.socket, head: Mapping[str, Any], about: About, payload: bytes | None, kept: Records
) -> None:
    sizes = {record: {name: len(data) for name, data in held.items()} for record, held in kept.items()}
    told = {"head": head, "about": about, "payload": None if payload is None else len(payload), "kept": sizes}
    text = json.dumps(told, default=str).encode()  # bytes among a server's facts are nothing that we ask for
    connection.sendall(_HEAD.pack(len(text)) + text)
    for part in _parts(payload, kept):
        connection.sendall(part)


def _parts(payload: bytes | None, kept: Records) -> Iterator[bytes]:
    yield payload or b""
    for held in kept.values():
        yield from held.values()


def _receive(connection: socket.socket) -> tuple[dict[str, Any], About, bytes | None, Records]:
    try:
        (length,) = _HEAD.unpack(_exactly(connection, _HEAD.size))
        if length > _LONGEST:
            raise WireError(f"a frame of {length} bytes")
        told = json.loads(_exactly(connection, length))
        payload = None if told["payload"] is None else _exactly(connection, told["payload"])
        kept = {
            record: {name: _exactly(connection, size) for name, size in held.items()}
            for record, held in told["kept"].items()
        }
        return dict(told["head"]), dict(told["about"]), payload, kept
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as broken:
        raise WireError(f"what came over the resident participant's socket cannot be read: {broken}") from broken


def _exactly(connection: socket.socket, size: int) -> bytes:
    held = bytearray(size)
    view = memoryview(held)
    done = 0
    while done < size:
        got = connection.recv_into(view[done : done + _CHUNK])
        if not got:
            raise WireError("the other side ended")
        done += got
    return bytes(held)
