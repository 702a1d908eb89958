"""What clients keep between rounds: opaque bytes by client, in memory, spilled to disk beyond a budget."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import MutableMapping
from pathlib import Path

from secateur.engines.files import Files
from secateur.errors import CheckpointError


class StateStore:
    """Client states; written durably by ``commit``, so that a run can go on from its last checkpoint.

    Args:
        folder: where states are written; None: a temporary folder that ``close`` removes.
        budget: bytes held in memory; the least recently used go to disk beyond it.
    """

    def __init__(self, folder: Path | None = None, budget: int = 256 * 2**20) -> None:
        self._temporary = folder is None
        self.folder = Path(tempfile.mkdtemp(prefix="secateur-clients-")) if folder is None else folder
        self.budget = budget
        self._names: MutableMapping[int, str] = {}
        self._memory: OrderedDict[int, bytes] = OrderedDict()
        self._dirty: set[int] = set()
        self._held = 0
        self._files = self._opened()

    def get(self, client: int) -> bytes | None:
        """Return a client's state, None if it keeps nothing.

        Raises:
            CheckpointError: its file is missing or damaged.
        """
        if client in self._memory:
            self._memory.move_to_end(client)
            return self._memory[client]
        name = self._names.get(client)
        if name is None:
            return None
        data = self._read(client, name)
        self._remember(client, data)
        return data

    def put(self, client: int, data: bytes) -> None:
        """Replace a client's state; durable only after ``commit``."""
        self._dirty.add(client)
        self._remember(client, data)

    def commit(self) -> None:
        """Write what changed; names are those of the files."""
        for client in sorted(self._dirty):
            self._write(client)
        self._files.commit()

    def restore(self, names: MutableMapping[int, str]) -> None:
        """Forget everything else and continue from these files.

        Raises:
            CheckpointError: a file is missing.
        """
        self._memory.clear()
        self._dirty.clear()
        self._held = 0
        self._names, self._files = names, self._opened()
        if self._files.count() < len(names):
            client = next(client for client in names if not (self.folder / names[client]).exists())
            raise CheckpointError(f"state of client {client}: {self.folder / names[client]} is missing")

    def collect(self) -> None:
        """Delete the files of states that were replaced."""
        self._files.collect()

    def lost(self) -> list[int]:
        """Return nobody: a file that is missing or damaged stops the run."""
        return []

    def resent(self) -> dict[int, tuple[int, int]]:
        """Return nothing: clients on this machine read what they share from its disk."""
        return {}

    def close(self) -> None:
        """Remove the folder if it is a temporary one."""
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _remember(self, client: int, data: bytes) -> None:
        self._held += len(data) - len(self._memory.pop(client, b""))
        self._memory[client] = data
        while self._held > self.budget and self._memory:
            oldest = next(iter(self._memory))
            if oldest in self._dirty:
                self._write(oldest)
            self._held -= len(self._memory.pop(oldest))

    def _write(self, client: int) -> None:
        data = self._memory[client]
        name = f"{client}-{hashlib.sha256(data).hexdigest()[:16]}.state"
        before = self._names.get(client)
        if name != before:
            self._files.write(name, data, before=before)
            self._names[client] = name
        self._dirty.discard(client)

    def _opened(self) -> Files:
        return Files(self.folder, self._wanted, "client state")

    def _wanted(self, name: str) -> bool:
        client = name.partition("-")[0]
        return client.isdecimal() and self._names.get(int(client)) == name

    def _read(self, client: int, name: str) -> bytes:
        path = self.folder / name
        try:
            data = path.read_bytes()
        except OSError as broken:
            raise CheckpointError(f"state of client {client}: cannot read {path}: {broken.strerror}") from broken
        if hashlib.sha256(data).hexdigest()[:16] not in path.name:
            raise CheckpointError(f"state of client {client}: {path} is damaged")
        return data
