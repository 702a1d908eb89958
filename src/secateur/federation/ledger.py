"""The ledger: a run's records as the lines of a file, each of which carries the digest of itself and all before it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError
from secateur.federation import checkpoint
from secateur.federation.records import Row

CHAIN = "chain"
"""The last key of each line: the digest of the chain of the line before, and of the line without it."""

_SIZE = 8
_BEGIN, _END = f', "{CHAIN}": "', '"}'
_LENGTH = len(_BEGIN) + 2 * _SIZE + len(_END)

Mark = Mapping[str, int | str]
"""The length of the records in bytes, and the chain of the last of them, as a checkpoint keeps them."""


@dataclass(frozen=True)
class _Line:
    row: Row
    end: int
    chain: str


class Ledger:
    """The records of a run, which grow by a line at a time; at first, those of a run that begins.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._length, self._chain = path, 0, ""

    def go_on(self, mark: Mark) -> None:
        """Go on behind the records that a checkpoint knows of.

        Raises:
            CheckpointError: they are missing or damaged.
        """
        read(self._path, mark)
        self._length, self._chain = int(mark["length"]), str(mark[CHAIN])

    def cut(self) -> None:
        """Delete what was written behind these records: the exchanges it tells of are made again."""
        if self._path.exists():
            os.truncate(self._path, self._length)

    def append(self, row: Row) -> None:
        """Append a record durably.

        Raises:
            CheckpointError: it cannot be written.
        """
        text = json.dumps(row)
        self._chain = _linked(self._chain, text.encode())
        self._length = checkpoint.append(self._path, f"{text[:-1]}{_BEGIN}{self._chain}{_END}")

    @property
    def mark(self) -> Mark:
        """Return what a checkpoint keeps of the records."""
        return {"length": self._length, CHAIN: self._chain}


def read(path: Path, mark: Mark | None = None) -> list[Row]:
    """Return the records that a file holds, each with its chain checked.

    A line that is not at its end yet is left out: a run is writing it, or was killed while it did.

    Args:
        path: of the file; if it is missing, there are none.
        mark: what a checkpoint says that there must be.

    Raises:
        CheckpointError: they are damaged, or fewer than the checkpoint knows of.
    """
    known: Mark = {"length": 0, CHAIN: ""} if mark is None else mark
    lines = list(_lines(path))
    ends = {0: "", **{line.end: line.chain for line in lines}}
    length = int(known["length"])
    if length > max(ends):
        raise CheckpointError(
            f"{path} is shorter than its checkpoint says; the records of this run are lost: take the file from a copy"
        )
    if ends.get(length) != known[CHAIN]:
        raise CheckpointError(f"{path} is not of the run that its checkpoint is of: take both from one copy")
    return [line.row for line in lines]


def _lines(path: Path) -> Iterator[_Line]:
    try:
        data = path.read_bytes() if path.exists() else b""
    except OSError as broken:
        raise CheckpointError(f"cannot read {path}: {broken.strerror or broken}") from broken
    end, chain = 0, ""
    *whole, _ = data.split(b"\n")
    for number, line in enumerate(whole, 1):
        end += len(line) + 1
        chain = _linked(chain, line[:-_LENGTH] + b"}")
        if line[-_LENGTH:] != f"{_BEGIN}{chain}{_END}".encode():
            raise CheckpointError(f"{path} is damaged in line {number}: take it from a copy")
        row = parsed(path, number, line)
        del row[CHAIN]
        yield _Line(row, end, chain)


def parsed(path: Path, number: int, line: bytes | str) -> dict[str, Any]:
    """Return what a line of a file holds.

    Raises:
        CheckpointError: it is no JSON object.
    """
    try:
        row = json.loads(line)
    except ValueError as broken:
        raise CheckpointError(f"{path} is damaged in line {number} ({broken}): take it from a copy") from broken
    if not isinstance(row, dict):
        raise CheckpointError(f"{path} is damaged in line {number}: take it from a copy")
    return row


def _linked(before: str, text: bytes) -> str:
    return hashlib.blake2b(before.encode() + text, digest_size=_SIZE).hexdigest()
