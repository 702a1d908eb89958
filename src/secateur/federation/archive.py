"""The archive: tensors of single clients on disk, one file for each entry, read when they are used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from urllib.parse import quote, unquote

from safetensors import torch as safetensors

from secateur.engines.files import Files
from secateur.errors import CheckpointError
from secateur.federation import checkpoint
from secateur.pruning.mask import Tensors

_END = ".safetensors"


class Archive(MutableMapping[str, Tensors]):
    """Tensors by key in files, so that memory stays O(model); entries may be replaced and deleted.

    The file of a replaced or deleted entry stays until ``collect``, which is called after a checkpoint that no longer
    needs it is written.

    Args:
        folder: the folder of the files.
        digests: the digest of each entry, kept with the checkpoint; it names the entry's current file and shows damage.
    """

    def __init__(self, folder: Path, digests: MutableMapping[str, str] | None = None) -> None:
        self.folder = folder
        self.digests: MutableMapping[str, str] = {} if digests is None else digests
        self._before: dict[str, str | None] = {}
        self._files = Files(folder, self._wanted, "archive entry")

    def __setitem__(self, key: str, tensors: Tensors) -> None:
        """Write an entry; the file of one that it replaces stays for now."""
        # safetensors keeps its own order: the names' order travels in the header
        data = safetensors.save(dict(tensors), {"order": json.dumps(list(tensors))})
        digest, before = hashlib.sha256(data).hexdigest(), self.digests.get(key)
        if digest == before:
            return
        self._before.setdefault(key, before)
        self._files.write(_name(key, digest), data, before=None if before is None else _name(key, before))
        self.digests[key] = digest

    def __getitem__(self, key: str) -> Tensors:
        """Read an entry, and check it against its digest.

        Raises:
            CheckpointError: its file is missing or damaged.
        """
        digest = self.digests[key]
        path = self.folder / _name(key, digest)
        data = checkpoint.read(path)
        if hashlib.sha256(data).hexdigest() != digest:
            raise CheckpointError(f"archive entry {path} is damaged; start the run again from its study.toml")
        tensors = safetensors.load(data)
        length = int.from_bytes(data[:8], "little")
        order = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["order"])
        return {name: tensors[name] for name in order}

    def __contains__(self, key: object) -> bool:
        """Return whether there is an entry of this key, without reading it."""
        return key in self.digests

    def __delitem__(self, key: str) -> None:
        """Delete an entry; its file stays for now."""
        self._before.setdefault(key, self.digests[key])
        self._files.drop(_name(key, self.digests[key]))
        del self.digests[key]

    def __iter__(self) -> Iterator[str]:
        """Iterate over keys."""
        return iter(self.digests)

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self.digests)

    def check(self) -> None:
        """Check that the file of every entry exists, by its name.

        Raises:
            CheckpointError: a file is missing; the text names it.
        """
        if self._files.count() < len(self.digests):
            paths = (self.folder / _name(key, digest) for key, digest in self.digests.items())
            raise CheckpointError(f"archive entry {next(path for path in paths if not path.exists())} is missing")

    def revert(self) -> None:
        """Put back the entries of the last commit."""
        for key, digest in self._before.items():
            if key in self.digests and self.digests[key] != digest:
                self._files.drop(_name(key, self.digests[key]))
                del self.digests[key]
            if digest is not None:
                self.digests[key] = digest
        self._before = {}

    def commit(self) -> None:
        """Sync the written files to disk, so that they survive a power cut."""
        self._before = {}
        self._files.commit()

    def collect(self) -> None:
        """Delete the files of replaced and deleted entries."""
        self._files.collect()

    def _wanted(self, name: str) -> bool:
        key, _, digest = name.removesuffix(_END).rpartition(".")
        return name.endswith(_END) and self.digests.get(unquote(key), "")[:16] == digest


def _name(key: str, digest: str) -> str:
    return f"{quote(key, safe='')}.{digest[:16]}{_END}"
