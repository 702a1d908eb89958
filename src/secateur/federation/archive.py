"""The archive: tensors of single clients on disk, one file an entry, read back when they are wanted."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from urllib.parse import quote, unquote

from safetensors import torch as safetensors

from secateur.errors import CheckpointError
from secateur.federation import checkpoint
from secateur.pruning.mask import Tensors

_END = ".safetensors"


class Archive(MutableMapping[str, Tensors]):
    """Tensors by key, so that memory stays O(model) however many there are; entries may be replaced and deleted.

    The file of what was replaced or deleted stays until ``collect``, which is called once the checkpoint that no longer
    needs it is written.

    Args:
        folder: of the files.
        digests: of each entry, which tell damage, and which version of an entry is wanted; kept with the checkpoint.
    """

    def __init__(self, folder: Path, digests: MutableMapping[str, str] | None = None) -> None:
        self.folder = folder
        self.digests: MutableMapping[str, str] = {} if digests is None else digests
        self._old: set[Path] = set()
        self._written = self._swept = False

    def __setitem__(self, key: str, tensors: Tensors) -> None:
        """Write an entry, beside the one that it replaces."""
        # safetensors keeps its own order: the names' order travels in the header
        data = safetensors.save(dict(tensors), {"order": json.dumps(list(tensors))})
        digest, before = hashlib.sha256(data).hexdigest(), self.digests.get(key)
        if digest == before:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write(self._path(key, digest), data, folder=False)
        self.digests[key], self._written = digest, True
        if before is not None:
            self._old.add(self._path(key, before))

    def __getitem__(self, key: str) -> Tensors:
        """Read an entry, and check it against the digest of the time it was written.

        Raises:
            CheckpointError: its file is missing or damaged.
        """
        digest = self.digests[key]
        path = self._path(key, digest)
        data = checkpoint.read(path)
        if hashlib.sha256(data).hexdigest() != digest:
            raise CheckpointError(f"archive entry {path} is damaged; start the run again from its study.toml")
        tensors = safetensors.load(data)
        length = int.from_bytes(data[:8], "little")
        order = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["order"])
        return {name: tensors[name] for name in order}

    def __contains__(self, key: object) -> bool:
        """Return whether there is such an entry, without reading it."""
        return key in self.digests

    def __delitem__(self, key: str) -> None:
        """Forget an entry."""
        self._old.add(self._path(key, self.digests[key]))
        del self.digests[key]

    def __iter__(self) -> Iterator[str]:
        """Iterate over keys."""
        return iter(self.digests)

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self.digests)

    def commit(self) -> None:
        """Make what was written survive a power cut."""
        if self._written:
            checkpoint.sync_folder(self.folder)
            self._written = False

    def check(self) -> None:
        """Refuse to go on where a file is missing; all names are looked at.

        Raises:
            CheckpointError: which.
        """
        if sum(self._wanted(path) for path in self._files()) < len(self.digests):
            lost = (self._path(key, digest) for key, digest in self.digests.items())
            raise CheckpointError(f"archive entry {next(path for path in lost if not path.exists())} is missing")

    def collect(self) -> None:
        """Delete the files of what was replaced or deleted; the first time, also what a kill left behind."""
        for path in self._old if self._swept else self._files():
            if not self._wanted(path):
                path.unlink(missing_ok=True)
        self._old.clear()
        self._swept = True

    def _files(self) -> Iterator[Path]:
        if self.folder.exists():
            with os.scandir(self.folder) as entries:
                yield from (Path(entry.path) for entry in entries)

    def _path(self, key: str, digest: str) -> Path:
        return self.folder / f"{quote(key, safe='')}.{digest[:16]}{_END}"

    def _wanted(self, path: Path) -> bool:
        key, _, digest = path.name.removesuffix(_END).rpartition(".")
        return path.name.endswith(_END) and self.digests.get(unquote(key), "")[:16] == digest
