"""Making shards on disk: for a simulated federation, for a node with its own data, and for a server without rows."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from secateur.data import Source, load
from secateur.data.partition import partition
from secateur.data.shards import LAYOUT, Shape, make_shards
from secateur.errors import DataError
from secateur.federation import tables
from secateur.learning.task import find
from secateur.streams import stream
from secateur.study.study import Study


@contextlib.contextmanager
def federation(study: Study) -> Iterator[Path]:
    """Load and partition a study's data into a folder of shards, which is deleted at the end of the block.

    Raises:
        DataError: the data cannot be read, or the partition leaves clients empty.
    """
    folder = Path(tempfile.mkdtemp(prefix="secateur-"))
    try:
        _write(lambda: _simulated(study, folder), folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def simulated(study: Study, cache: Path) -> Path:
    """Return a folder with the shards of ``federation``, kept in ``cache`` for all processes of this machine.

    They are made again if a file of the data changes.
    """
    key = [study.data.model_dump(mode="json"), study.seed, _marks(*_places(study.data.source))]
    return _once(cache, key, lambda folder: _simulated(study, folder))


def own(study: Study, client: int, folder: str, cache: Path) -> Path:
    """Return a folder of shards in which one client has the rows of ``folder`` and all others have none.

    They are made again if a file of the folder changes.

    Raises:
        DataError: there is no such folder, it is empty, or its rows cannot be used.
    """
    place = Path(folder).expanduser()
    marks = _marks(place) if place.is_dir() else []
    if not marks:
        state = "is empty" if place.is_dir() else "does not exist"
        raise DataError(f"client {client}: its data folder {place} {state}; set data=... in --node-config")
    key = [study.data.model_dump(mode="json"), study.seed, client, marks]

    def make(into: Path) -> None:
        source = _learnt(study, load(f"{study.data.source}:{place}", seed=study.seed, whole=False))
        rows = np.arange(len(source.y_train))
        parts = [rows if k == client else rows[:0] for k in range(study.data.clients)]
        make_shards(
            source, parts, test_fraction=study.data.test_fraction, seed=study.seed, folder=into,
            validation_fraction=study.data.validation_fraction,
        )  # fmt: skip

    return _once(cache, key, make)


def bare(study: Study, shape: Shape, folder: Path) -> Path:
    """Write shards without any rows into ``folder``, for a server whose clients hold the data."""
    x = np.zeros((0, *shape.input_shape), np.float32 if shape.kind == "tabular" else np.uint8)
    y = torch.zeros(0, dtype=find(shape.task).dtype).numpy()
    source = Source(
        "the nodes' own", x, y, x, y, None, shape.outputs, kind=shape.kind, scale=shape.scale, task=shape.task
    )
    folder.mkdir(parents=True, exist_ok=True)
    empty = [np.arange(0)] * study.data.clients
    _write(lambda: make_shards(source, empty, test_fraction=0.0, seed=study.seed, folder=folder), folder)
    return folder


def _learnt(study: Study, source: Source) -> Source:
    """Return the source with the study's task, if the study names one."""
    return replace(source, task=study.data.task) if study.data.task else source


def _places(source: str) -> list[Path]:
    """Return the paths that a data specification may hold: after the first colon, or the second for a user's loader."""
    given = source.partition(":")[2].partition("#")[0]
    return [Path(text).expanduser() for text in (given, given.partition(":")[2]) if text]


def _marks(*places: Path) -> list[tuple[str, int, int]]:
    """Return name, size and modification time of each file under some paths, which show if a file changed."""
    files = [p for place in places for p in ([place] if place.is_file() else sorted(place.rglob("*"))) if p.is_file()]
    return [(str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def _simulated(study: Study, folder: Path) -> None:
    source = _learnt(study, load(study.data.source, seed=study.seed))
    section, count = study.data, len(source.y_train)
    if section.public and section.public > count - section.clients:
        raise DataError(f"data.public = {section.public} leaves fewer rows than clients: there are {count}")
    order = (
        torch.randperm(count, generator=stream(study.seed, "public")).numpy() if section.public else np.arange(count)
    )
    public, rest = order[: section.public], np.sort(order[section.public :])
    ids = None if source.ids is None else source.ids[rest]
    drawn = partition(source.y_train[rest], ids, section.partition, clients=section.clients, seed=study.seed)
    parts = [rest[part] for part in drawn]
    if source.table is not None:
        source, agreed = tables.simulated(study, source, source.table, parts)
        tables.write(folder, agreed.schema, agreed.rows)
    make_shards(
        source, parts, test_fraction=section.test_fraction, seed=study.seed, folder=folder,
        validation_fraction=section.validation_fraction, public=public,
    )  # fmt: skip


def _once(cache: Path, key: object, make: Callable[[Path], None]) -> Path:
    name = hashlib.sha256(json.dumps([importlib.metadata.version("secateur"), LAYOUT, key]).encode()).hexdigest()[:16]
    folder = cache / name
    if folder.exists():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix="making-", dir=cache))
    except OSError as broken:
        raise DataError(f"cannot keep the clients' rows in {cache}: {broken.strerror}") from broken
    try:
        _write(lambda: make(made), made)
        with contextlib.suppress(OSError):  # another process was first: its rows are the same
            made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _write(make: Callable[[], object], folder: Path) -> None:
    try:
        make()
    except OSError as broken:
        raise DataError(f"cannot write the clients' rows to {folder}: {broken.strerror}; set TMPDIR") from broken
