"""Shards: the rows of a federation as memory-mapped arrays, which all workers share without copying them.

A node's own rows are held in its memory instead: nothing is written of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from secateur.data.schema import Schema
from secateur.data.sources import Kind, Source
from secateur.errors import DataError
from secateur.streams import stream

SCHEMA = "schema.json"
"""The file beside the rows of a table that has their schema; a run's folder has one of this name too."""

_META = "meta.json"
_PARTS = ("train", "local", "validation", "test", "public")
_ARRAYS = tuple(f"{kind}_{part}" for part in _PARTS for kind in "xy")
_OF_CLIENTS = ("train", "local", "validation")
_BOUNDS = "bounds"  # where each client's rows begin in the array of each part, and the end of the last
_BLOCK = 2**20
LAYOUT = 4
"""The number of the files' layout; kept shards of another one are made again."""


@dataclass(frozen=True)
class Meta:
    """The description of the arrays.

    Attributes:
        source, outputs, kind, scale, task, target_scale, target_mean, unit, classes: see ``Source``.
        test: number of rows of the server's test set.
        public: number of rows that the server may train on.
        remarks: see ``Source``.
    """

    source: str
    outputs: int
    kind: Kind
    scale: float
    task: str
    test: int
    public: int
    remarks: tuple[str, ...] = ()
    target_scale: float = 1.0
    unit: str = ""
    target_mean: float = 0.0
    classes: str = ""


@dataclass(frozen=True)
class Shape:
    """The shape and kind of rows, which is all that building a model needs; see ``Source`` for the fields."""

    input_shape: tuple[int, ...]
    outputs: int
    kind: Kind
    scale: float
    task: str
    target_scale: float = 1.0
    unit: str = ""
    target_mean: float = 0.0
    classes: str = ""

    @classmethod
    def of(cls, shards: Shards) -> Shape:
        """Return the shape of some shards' rows."""
        meta = shards.meta
        return cls(
            shards.input_shape, meta.outputs, meta.kind, meta.scale, meta.task, meta.target_scale, meta.unit,
            meta.target_mean, meta.classes,
        )  # fmt: skip


class Shards:
    """The training, validation and test rows of every client, and the server's test set and public rows.

    Settings, epochs and rounds are chosen by validation rows; reported figures are of test rows.

    Args:
        meta: the description.
        bounds: where each client's rows begin, (3, clients + 1).
        arrays: the rows by name.
        folder: where they are mapped from; None: they are in memory.
    """

    def __init__(self, meta: Meta, bounds: np.ndarray, arrays: Mapping[str, np.ndarray], folder: Path | None) -> None:
        self.meta = meta
        self._bounds, self._folder = dict(zip(_OF_CLIENTS, bounds, strict=True)), folder
        self._tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}

    @property
    def clients(self) -> int:
        """Return K."""
        return len(self._bounds["train"]) - 1

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
        """Return how a row becomes a model's input."""
        return self.meta.kind

    @property
    def scale(self) -> float:
        """Return the number that image values are divided by."""
        return self.meta.scale

    @property
    def task(self) -> str:
        """Return the name of the task."""
        return self.meta.task

    @property
    def target_scale(self) -> float:
        """Return what differences of stored targets are multiplied by to be in the target's own unit."""
        return self.meta.target_scale

    @property
    def unit(self) -> str:
        """Return the name of the target's unit; empty: unknown, or a class."""
        return self.meta.unit

    @property
    def schema(self) -> Schema | None:
        """Return the schema by which rows were made of a table; None if they were not.

        Raises:
            DataError: its file is damaged.
        """
        path = None if self._folder is None else self._folder / SCHEMA
        return Schema.from_json(path.read_text("utf-8")) if path and path.exists() else None

    def fingerprint(self) -> str:
        """Return a digest of the rows and of who holds them; it changes with the data and with the partition."""
        later = {name for name in ("target_mean", "classes") if not getattr(self.meta, name)}  # runs from before go on
        facts = {name: value for name, value in asdict(self.meta).items() if name not in {"remarks", *later}}
        running = hashlib.blake2b(json.dumps(facts).encode(), digest_size=8)
        for name in (_BOUNDS, *_ARRAYS):
            for block in self._blocks(name):
                running.update(block)
        return running.hexdigest()

    def _blocks(self, name: str) -> Iterator[bytes]:
        if self._folder is None:
            held = np.stack(list(self._bounds.values())) if name == _BOUNDS else self._tensors[name].numpy()
            yield f"{held.dtype} {held.shape} ".encode() + held.tobytes()
            return
        with (self._folder / f"{name}.npy").open("rb") as file:  # mapped pages would stay in this process
            while block := file.read(_BLOCK):
                yield block

    def train(self, client: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a client's training rows and targets, as views."""
        return self._cut("train", client)

    def test(self, client: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a client's local test rows and targets, as views."""
        return self._cut("local", client)

    def validation(self, client: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a client's validation rows and targets, as views."""
        return self._cut("validation", client)

    def server_validation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the validation rows and targets of all clients, which only a simulating server has."""
        return self._tensors["x_validation"], self._tensors["y_validation"]

    def server_test(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the server's test rows and targets."""
        return self._tensors["x_test"], self._tensors["y_test"]

    def public(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows and targets that the server may train on; no client has them."""
        return self._tensors["x_public"], self._tensors["y_public"]

    def count(self, client: int, kind: Literal["train", "test", "validation"]) -> int:
        """Return how many rows of a kind a client has."""
        bounds = self._bounds["local" if kind == "test" else kind]
        return int(bounds[client + 1] - bounds[client])

    @property
    def empty(self) -> bool:
        """Return whether no client has a row here: they lie where the clients are."""
        return not any(bounds[-1] for bounds in self._bounds.values())

    def _rows(self, part: str, client: int) -> slice:
        return slice(int(self._bounds[part][client]), int(self._bounds[part][client + 1]))

    def _cut(self, part: str, client: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self._rows(part, client)
        return self._tensors[f"x_{part}"][rows], self._tensors[f"y_{part}"][rows]


def make_shards(
    source: Source, parts: Sequence[np.ndarray], *, test_fraction: float, seed: int, folder: Path | None,
    validation_fraction: float = 0.0, public: np.ndarray | None = None,
) -> Shards:  # fmt: skip
    """Write the shards of a partition, and the server's ``public`` rows, into ``folder`` and open them.

    Without a folder they stay in memory. Each client's test split is ``test_fraction`` of its rows and its validation
    split ``validation_fraction``. Each is drawn from its own random stream, so that the test rows do not depend on the
    validation fraction. At least one row stays for training.
    """
    found = split(parts, test_fraction=test_fraction, validation_fraction=validation_fraction, seed=seed)
    chosen = {part: np.concatenate(taken) for part, taken in found.items()}
    chosen["public"] = np.arange(0) if public is None else np.sort(public)
    arrays = {f"x_{part}": source.x_train[rows] for part, rows in chosen.items()}
    arrays |= {f"y_{part}": source.y_train[rows] for part, rows in chosen.items()}
    arrays |= {"x_test": source.x_test, "y_test": source.y_test}
    bounds = np.stack([np.cumsum([0, *map(len, found[part])]) for part in _OF_CLIENTS])
    meta = Meta(
        source.name, source.outputs, source.kind, source.scale, source.task,
        test=len(source.x_test), public=len(chosen["public"]), remarks=source.remarks, target_scale=source.target_scale,
        unit=source.unit, target_mean=source.target_mean, classes=source.classes,
    )  # fmt: skip
    if folder is None:
        return Shards(meta, bounds, arrays, None)
    for name, array in {**arrays, _BOUNDS: bounds}.items():
        np.save(folder / f"{name}.npy", array)
    (folder / _META).write_text(json.dumps(asdict(meta)))
    return open_shards(folder)


def split(
    parts: Sequence[np.ndarray], *, test_fraction: float, validation_fraction: float, seed: int
) -> dict[str, list[np.ndarray]]:
    """Return the rows of each client in each part: ``train``, ``local`` (its test rows) and ``validation``."""
    found: dict[str, list[np.ndarray]] = {part: [] for part in _OF_CLIENTS}
    for client, rows in enumerate(parts):
        rest, local = _split(rows, test_fraction * len(rows), seed, "split", client)
        train, validation = _split(rest, validation_fraction * len(rows), seed, "validation", client)
        for part, taken in zip(_OF_CLIENTS, (train, local, validation), strict=True):
            found[part].append(taken)
    return found


def _split(rows: np.ndarray, share: float, seed: int, label: str, client: int) -> tuple[np.ndarray, np.ndarray]:
    """Split rows into those that stay, of which there is at least one, and those held out; both keep their order."""
    held = max(0, min(len(rows) - 1, round(share)))
    if not held:
        return rows, rows[:0]
    order = torch.randperm(len(rows), generator=stream(seed, label, client)).numpy()
    return rows[np.sort(order[held:])], rows[np.sort(order[:held])]


def open_shards(folder: Path) -> Shards:
    """Return the shards in ``folder``, memory-mapped: processes share their pages unless they write to them.

    Raises:
        DataError: the folder holds no shards, or their files are damaged.
    """
    try:
        meta = json.loads((folder / _META).read_text())
        bounds = np.load(folder / f"{_BOUNDS}.npy", mmap_mode="r").view(np.ndarray)  # plain views are read faster
        rows = dict(zip(_OF_CLIENTS, bounds[:, -1].tolist(), strict=True)) | {k: meta[k] for k in ("test", "public")}
        arrays = {}
        for name in _ARRAYS:
            # an array without rows cannot be mapped
            arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="c" if rows[name[2:]] else None)
        return Shards(Meta(**{**meta, "remarks": tuple(meta["remarks"])}), bounds, arrays, folder)
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError) as broken:
        message = " ".join(str(broken).split())
        raise DataError(f"{folder} holds no complete shards ({message}): make them again from the data") from broken
