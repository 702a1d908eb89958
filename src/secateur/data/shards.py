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

from secateur.data.sources import Kind, Source, Task
from secateur.errors import DataError
from secateur.streams import stream

_META = "meta.json"
_ARRAYS = ("x_train", "y_train", "x_local", "y_local", "x_test", "y_test", "x_public", "y_public")


@dataclass(frozen=True)
class Meta:
    """What the arrays mean.

    Attributes:
        source, outputs, kind, scale, task: as in ``Source``.
        train, local: where each client's rows begin, and the end.
        test: rows of the server's test set.
        public: rows that the server may train on.
    """

    source: str
    outputs: int
    kind: Kind
    scale: float
    task: Task
    train: tuple[int, ...]
    local: tuple[int, ...]
    test: int
    public: int


@dataclass(frozen=True)
class Shape:
    """What must be known of rows, without seeing one, to build a model for them; see ``Source`` for the fields."""

    input_shape: tuple[int, ...]
    outputs: int
    kind: Kind
    scale: float
    task: Task

    @classmethod
    def of(cls, shards: Shards) -> Shape:
        """Return the shape of some shards' rows."""
        return cls(shards.input_shape, shards.outputs, shards.kind, shards.scale, shards.task)


class Shards:
    """The rows of every client, for training and for a test of its own, and the server's: a test set, public rows."""

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
    def task(self) -> Task:
        """Return what is learnt."""
        return self.meta.task

    def fingerprint(self) -> str:
        """Return a digest of who holds which targets; it differs when the data or its partition changed."""
        running = hashlib.blake2b(json.dumps(asdict(self.meta)).encode(), digest_size=8)
        for name in ("y_train", "y_local", "y_test", "y_public"):
            running.update(self._tensors[name].numpy().tobytes())
        return running.hexdigest()

    def train(self, client: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a client's training rows and targets, as views."""
        return self._cut("train", self.meta.train, client)

    def test(self, client: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a client's local test rows and targets, as views."""
        return self._cut("local", self.meta.local, client)

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
    public: np.ndarray | None = None,
) -> Shards:  # fmt: skip
    """Write the shards of a partition, and the server's ``public`` rows, into ``folder`` and open them.

    Each client's local test split is ``test_fraction`` of its rows, drawn from its own stream; at least one
    row stays for training.
    """
    train, local = [], []
    for client, rows in enumerate(parts):
        order = torch.randperm(len(rows), generator=stream(seed, "split", client)).numpy()
        held = max(0, min(len(rows) - 1, round(test_fraction * len(rows))))
        local.append(rows[np.sort(order[:held])])
        train.append(rows[np.sort(order[held:])])
    all_train, all_local = np.concatenate(train), np.concatenate(local)
    shared = np.arange(0) if public is None else np.sort(public)
    arrays = {
        "x_train": source.x_train[all_train], "y_train": source.y_train[all_train],
        "x_local": source.x_train[all_local], "y_local": source.y_train[all_local],
        "x_test": source.x_test, "y_test": source.y_test,
        "x_public": source.x_train[shared], "y_public": source.y_train[shared],
    }  # fmt: skip
    bounds = [tuple(np.cumsum([0, *map(len, split)]).tolist()) for split in (train, local)]
    meta = Meta(
        source.name, source.outputs, source.kind, source.scale, source.task,
        bounds[0], bounds[1], len(source.x_test), len(shared),
    )  # fmt: skip
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / _META).write_text(json.dumps(asdict(meta)))
    return open_shards(folder)


def _rows(name: str, meta: dict[str, Any]) -> int:
    return int({**meta, "train": meta["train"][-1], "local": meta["local"][-1]}[name[2:]])


def open_shards(folder: Path) -> Shards:
    """Map the shards in ``folder``; pages are shared between processes and copied only if written to.

    Raises:
        DataError: the folder holds no shards, or their files are damaged.
    """
    try:
        meta = json.loads((folder / _META).read_text())
        meta["train"], meta["local"] = tuple(meta["train"]), tuple(meta["local"])
        arrays = {}
        for name in _ARRAYS:
            path = folder / f"{name}.npy"
            # an array without rows cannot be mapped
            arrays[name] = np.load(path, mmap_mode="c" if _rows(name, meta) else None)
        return Shards(Meta(**meta), arrays)
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError) as broken:
        message = " ".join(str(broken).split())
        raise DataError(f"{folder} holds no complete shards ({message}): make them again from the data") from broken
