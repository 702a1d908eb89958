"""A spool of tensors for the time of one exchange: in memory up to a budget, beyond it in files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from safetensors import torch as safetensors

from secateur.errors import CheckpointError
from secateur.pruning.mask import Tensors

_BUDGET = 64 * 2**20


@dataclass(frozen=True)
class _Entry:
    shapes: Mapping[str, tuple[int, ...]]
    held: Tensors | None
    path: Path | None


class Spool:
    """Stores tensors by handle; a context manager, which deletes everything when it ends.

    Args:
        folder: the folder in which a folder for the files is made; None: the system's temporary folder.
        budget: the number of bytes that stay in memory; tensors beyond it are written to files.
    """

    def __init__(self, folder: Path | None = None, budget: int = _BUDGET) -> None:
        self._parent, self._left = folder, budget
        self._folder: Path | None = None
        self._entries: dict[int, _Entry] = {}

    def put(self, tensors: Tensors) -> int:
        """Store tensors; return their handle.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        flat = {name: tensor.detach().reshape(-1).clone() for name, tensor in tensors.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        size = sum(tensor.numel() * tensor.element_size() for tensor in flat.values())
        handle = len(self._entries)
        if size <= self._left:
            self._left -= size
            self._entries[handle] = _Entry(shapes, flat, None)
        else:
            self._entries[handle] = _Entry(shapes, None, self._write(handle, flat))
        return handle

    def get(self, handle: int) -> dict[str, torch.Tensor]:
        """Return the tensors of a handle, in the order in which they were stored."""
        entry = self._entries[handle]
        flat = safetensors.load_file(entry.path) if entry.path else entry.held or {}
        return {name: flat[name].reshape(shape) for name, shape in entry.shapes.items()}

    def sizes(self, handle: int) -> dict[str, int]:
        """Return how many entries each tensor of a handle has."""
        return {name: torch.Size(shape).numel() for name, shape in self._entries[handle].shapes.items()}

    def part(self, handle: int, name: str, entries: slice) -> torch.Tensor:
        """Return some entries of a flattened tensor, without reading the others."""
        entry = self._entries[handle]
        if entry.path is None:
            return (entry.held or {})[name][entries]
        with safe_open(entry.path, framework="pt") as file:
            part: torch.Tensor = file.get_slice(name)[entries]
        return part

    def close(self) -> None:
        """Delete all stored tensors and their files."""
        self._entries = {}
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Delete all stored tensors and their files."""
        self.close()

    def _write(self, handle: int, flat: Tensors) -> Path:
        try:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="spool-", dir=self._parent))
            path = self._folder / f"{handle}.safetensors"
            path.write_bytes(safetensors.save(dict(flat)))
        except OSError as broken:
            where = self._folder or self._parent or tempfile.gettempdir()
            raise CheckpointError(
                f"cannot store replies in {where}: {broken.strerror or broken}; free some space, then resume the run"
            ) from broken
        return path


class Kept(Mapping[int, Tensors]):
    """Single replies by client, in the order of the ask; each is read from the spool when it is used."""

    def __init__(self, spool: Spool, entries: Mapping[int, int]) -> None:
        self._spool, self._entries = spool, entries

    def __getitem__(self, client: int) -> dict[str, torch.Tensor]:
        """Read a client's reply."""
        return self._spool.get(self._entries[client])

    def __iter__(self) -> Iterator[int]:
        """Iterate over the clients."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Return the number of replies."""
        return len(self._entries)

    def blocks(self, size: int = 2**20) -> Iterator[tuple[str, slice, torch.Tensor]]:
        """Yield all replies in blocks of coordinates: a tensor's name, a slice of its flat entries, and the values.

        Values have the shape (clients, entries). At most ``size`` numbers, or one entry of all clients, are read at a
        time, so that a rule that compares clients at each coordinate needs little memory. Tensors that some client did
        not send are left out.
        """
        handles = list(self._entries.values())
        if not handles:
            return
        sizes = self._spool.sizes(handles[0])
        step = max(1, size // len(handles))
        for name, count in sizes.items():
            if any(self._spool.sizes(handle).get(name) != count for handle in handles):
                continue
            for start in range(0, count, step):
                part = slice(start, min(count, start + step))
                yield name, part, torch.stack([self._spool.part(handle, name, part) for handle in handles])
