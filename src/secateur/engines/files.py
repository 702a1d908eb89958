"""Files that are written together, made durable together, and deleted once a checkpoint needs them no more."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from secateur.errors import CheckpointError

_AT_ONCE = 16


class Files:
    """The files of a folder, each of which is named by its content and so never changes.

    Args:
        folder: made when the first file is written.
        wanted: says of a name whether the file is still needed.
        what: a file is, for errors.
    """

    def __init__(self, folder: Path, wanted: Callable[[str], bool], what: str) -> None:
        self.folder = folder
        self._wanted, self._what = wanted, what
        self._new: set[str] = set()
        self._old: set[str] = set()
        self._swept = False

    def write(self, name: str, data: bytes, *, before: str | None = None) -> None:
        """Write a file, which is durable after ``commit``; ``before`` names the one that it replaces.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        path = self.folder / name
        with self._named(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(name + ".tmp")
            temporary.write_bytes(data)
            temporary.replace(path)
        self._new.add(name)
        if before is not None:
            self.drop(before)

    def drop(self, name: str) -> None:
        """Delete a file once the next checkpoint is written, unless it is needed again by then."""
        self._old.add(name)

    def commit(self) -> None:
        """Make what was written, and its names, survive a power cut."""
        names = [name for name in sorted(self._new) if self._wanted(name)]
        with self._named(self.folder), ThreadPoolExecutor(_AT_ONCE) as pool:
            # at once, since a file system settles many files hardly slower than one
            list(pool.map(_sync, (self.folder / name for name in names)))
            if names and os.name == "posix":
                _sync(self.folder)
        self._new.clear()

    def collect(self) -> None:
        """Delete what was dropped; the first time, also what a kill left behind."""
        for name in self._old if self._swept else self._names():
            if not self._wanted(name):
                (self.folder / name).unlink(missing_ok=True)
        self._old.clear()
        self._swept = True

    def count(self) -> int:
        """Return how many files are there that are needed; all names of the folder are looked at."""
        return sum(map(self._wanted, self._names()))

    def _names(self) -> Iterator[str]:
        if self.folder.exists():
            with os.scandir(self.folder) as entries:
                yield from (entry.name for entry in entries)

    @contextlib.contextmanager
    def _named(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as broken:
            raise CheckpointError(
                f"cannot write {self._what} {path}: {broken.strerror or broken}; free some space or mend the folder's "
                f"permissions, then: secateur resume {self.folder.parent}"
            ) from broken


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
