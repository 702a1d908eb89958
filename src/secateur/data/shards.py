"""Shards: the federation's rows as memory-mapped arrays, made once, shared by all workers, never copied."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.data.sources import Kind, Source
from secateur.errors import DataError
from secateur.streams import stream

_META = "meta.json"
_PARTS = ("train", "local", "validation", "test", "public")
_ARRAYS = tuple(f"{kind}_{part}" for part in _PARTS for kind in "xy")
_OF_CLIENTS = ("train", "local", "validation")


@dataclass(frozen=True)
class Meta:
    """What the arrays mean.

    Attributes:
        source, outputs, kind, scale, task: as in ``Source``.
        train, local, validation: where each client's rows begin, and the end.
        test: rows of the server's test set.
        public: rows that the server may train on.
    """

    source: str
    outputs: int
    kind: Kind
    scale: float
    task: str
    train: tuple[int, ...]
    local: tuple[int, ...]
    validation: tuple[int, ...]
    test: int
    public: int


@dataclass(frozen=True)
class Shape:
    """What must be known of rows, without seeing one, to build a model for them; see ``Source`` for the fields."""

    input_shape: tuple[int, ...]
    outputs: int
    kind: Kind
    scale: float
    task: str

    @classmethod
    def of(cls, shards: Shards) -> Shape:
        """Return the shape of some shards' rows."""
        return cls(shards.input_shape, shards.outputs, shards.kind, shards.scale, shards.task)


class Shards:
    """The rows of every client, for training, validation and a test of its own; the server's test set and public rows.

    What chooses anything (a setting, an epoch, a round) looks at validation rows; what is reported is of test rows.
    """

    def __init__(self, meta: Meta, arrays: dict[str, np.ndarray]) -> None:
        self.meta = meta
        self._tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}

    @property
    def clients(self) -> int:
        """Return K."""
        return len(self.meta.train) - 1

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Return the shape of one row."""
        return tuple(self._tensors["x_train"].shape[1:])

    @property
    def outputs(self) -> int:
        """Return the number of classes, 1 for regression."""
        return self.meta.outputs

    @property
    def kind(self) -> Kind:
        """Return how rows become model inputs."""
        return self.meta.kind

    @property
    def scale(self) -> float:
        """Return what image values are divided by."""
        return self.meta.scale

    @property
    def task(self) -> str:
        """Return what is learnt."""
        return self.meta.task

    def fingerprint(self) -> str:
        """Return a digest of who holds which rows; it differs when the data or its partition changed."""
        running = hashlib.blake2b(json.dumps(asdict(self.meta)).encode(), digest_size=8)
        for name in _ARRAYS:
            array = self._tensors[name].numpy()
            if array.size:
                running.update(np.ascontiguousarray(array).data.cast("B"))
        return running.hexdigest()

    def train(self, client: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a client's training rows and targets, as views."""
        return self._cut("train", self.meta.train, client)

    def test(self, client: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a client's local test rows and targets, as views."""
        return self._cut("local", self.meta.local, client)

    def validation(self, client: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a client's validation rows and targets, as views."""
        return self._cut("validation", self.meta.validation, client)

    def server_validation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all clients' validation rows and targets: what a server that simulates them may choose by."""
        return self._tensors["x_validation"], self._tensors["y_validation"]

    def server_test(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the server's test rows and targets."""
        return self._tensors["x_test"], self._tensors["y_test"]

    def public(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows and targets that the server may train on; no client has them."""
        return self._tensors["x_public"], self._tensors["y_public"]

    def _cut(self, part: str, bounds: tuple[int, ...], client: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = slice(bounds[client], bounds[client + 1])
        return self._tensors[f"x_{part}"][rows], self._tensors[f"y_{part}"][rows]


def make_shards(
    source: Source, parts: Sequence[np.ndarray], *, test_fraction: float, seed: int, folder: Path,
    validation_fraction: float = 0.0, public: np.ndarray | None = None,
) -> Shards:  # fmt: skip
    """Write the shards of a partition, and the server's ``public`` rows, into ``folder`` and open them.

    Each client's local test split is ``test_fraction`` of its rows, its validation split ``validation_fraction``, each
    drawn from a stream of its own: the test rows are the same whatever is held out for validation. At least one row
    stays for training.
    """
    found: dict[str, list[np.ndarray]] = {part: [] for part in _OF_CLIENTS}
    for client, rows in enumerate(parts):
        rest, local = _split(rows, test_fraction * len(rows), seed, "split", client)
        train, validation = _split(rest, validation_fraction * len(rows), seed, "validation", client)
        for part, taken in zip(_OF_CLIENTS, (train, local, validation), strict=True):
            found[part].append(taken)
    chosen = {part: np.concatenate(taken) for part, taken in found.items()}
    chosen["public"] = np.arange(0) if public is None else np.sort(public)
    arrays = {f"x_{part}": source.x_train[rows] for part, rows in chosen.items()}
    arrays |= {f"y_{part}": source.y_train[rows] for part, rows in chosen.items()}
    arrays |= {"x_test": source.x_test, "y_test": source.y_test}
    bounds = {part: tuple(np.cumsum([0, *map(len, taken)]).tolist()) for part, taken in found.items()}
    meta = Meta(
        source.name, source.outputs, source.kind, source.scale, source.task,
        **bounds, test=len(source.x_test), public=len(chosen["public"]),
    )  # fmt: skip
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / _META).write_text(json.dumps(asdict(meta)))
    return open_shards(folder)


def _split(rows: np.ndarray, share: float, seed: int, label: str, client: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that stay, at least one of any, and those held out, each in their order."""
    held = max(0, min(len(rows) - 1, round(share)))
    order = torch.randperm(len(rows), generator=stream(seed, label, client)).numpy()
    return rows[np.sort(order[held:])], rows[np.sort(order[:held])]


def _rows(name: str, meta: dict[str, Any]) -> int:
    count = meta[name[2:]]
    return int(count[-1] if name[2:] in _OF_CLIENTS else count)


def open_shards(folder: Path) -> Shards:
    """Map the shards in ``folder``; pages are shared between processes and copied only if written to.

    Raises:
        DataError: the folder holds no shards, or their files are damaged.
    """
    try:
        meta = json.loads((folder / _META).read_text())
        meta |= {part: tuple(meta[part]) for part in _OF_CLIENTS}
        arrays = {}
        for name in _ARRAYS:
            path = folder / f"{name}.npy"
            # an array without rows cannot be mapped
            arrays[name] = np.load(path, mmap_mode="c" if _rows(name, meta) else None)
        return Shards(Meta(**meta), arrays)
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError) as broken:
        message = " ".join(str(broken).split())
        raise DataError(f"{folder} holds no complete shards ({message}): make them again from the data") from broken
