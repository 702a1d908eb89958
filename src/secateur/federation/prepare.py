"""Making shards: for a simulated federation, for a node with its own data, and for a server without rows."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import secateur
from secateur.data import Source, load, names
from secateur.data.partition import partition
from secateur.data.schema import Schema
from secateur.data.shards import LAYOUT, Shape, Shards, make_shards
from secateur.data.targets import standardised
from secateur.errors import CheckpointError, ConfigError, DataError
from secateur.federation import checkpoint, tables
from secateur.learning.task import find
from secateur.streams import stream
from secateur.study.sections import DataSection
from secateur.study.study import Study

_ROWS = "secateur-rows-"
_SETTLED = 600.0  # seconds after which a folder that nobody holds is one that was left

_SHOWN = 8  # sites that a remark names

Marks = tuple[tuple[str, int, int, str], ...]


@contextlib.contextmanager
def federation(study: Study) -> Iterator[Path]:
    """Load and partition a study's data into a folder of shards, which is deleted at the end of the block.

    Raises:
        DataError: the data cannot be read, or the partition leaves clients empty.
    """
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=_ROWS))
    try:
        with contextlib.ExitStack() as held:
            _write(lambda: held.enter_context(checkpoint.alone(folder)), folder)
            _write(lambda: _simulated(study, folder), folder)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep() -> None:
    """Delete rows that commands of this user left behind when they were killed: nobody holds their lock any more."""
    for left in Path(tempfile.gettempdir()).glob(f"{_ROWS}*"):
        with contextlib.suppress(OSError, CheckpointError):  # somebody else's, at work, or gone meanwhile
            facts = left.stat()
            if facts.st_uid == os.getuid() and time.time() - facts.st_mtime > _SETTLED:
                with checkpoint.alone(left):
                    shutil.rmtree(left, ignore_errors=True)


def simulated(study: Study, cache: Path) -> Path:
    """Return a folder with the shards of ``federation``, kept in ``cache`` for all processes of this machine.

    They are made again if what a file of the data holds changes, and are of one path: two files of one relative name
    share nothing.
    """
    key = [study.data.model_dump(mode="json"), study.seed, marks(*places(study.data.source))]
    return _once(cache, key, lambda folder: _simulated(study, folder))


def own(study: Study, client: int, folder: str, schema: Schema | None = None) -> Shards:
    """Return shards in memory, in which one client has the rows of ``folder`` and all others have none.

    Nothing of them is written anywhere. The last ones are kept in this process until a file of the folder changes.

    Args:
        study: the study.
        client: whose rows they are.
        folder: where they lie.
        schema: by which rows are made of a table.

    Raises:
        ConfigError: there is no such folder, or it is empty.
        DataError: its rows cannot be used.
    """
    text = schema.to_json() if schema else ""
    return _own(study.model_dump_json(), client, *_found(client, folder), text)


def own_source(study: Study, client: int, folder: str) -> Source:
    """Return what a node's folder holds, as it was read; kept as the rows of ``own`` are.

    Raises:
        ConfigError: there is no such folder, or it is empty.
        DataError: its rows cannot be used.
    """
    return _own_source(study.data.model_dump_json(), study.seed, *_found(client, folder))


def alone(study: Study, client: int, rows: np.ndarray) -> list[np.ndarray]:
    """Return the rows of each client where one has all of them."""
    return [rows if k == client else rows[:0] for k in range(study.data.clients)]


def _found(client: int, folder: str) -> tuple[Path, Marks]:
    place = Path(folder).expanduser()
    _check_within(place)
    found = marks(place) if place.is_dir() else ()
    if not found:
        state = "is empty" if place.is_dir() else "does not exist"
        raise ConfigError(f"client {client}: its data folder {place} {state}; set data=... in --node-config")
    return place, found


@functools.lru_cache(maxsize=1)
def _own_source(section: str, seed: int, place: Path, found: Marks) -> Source:
    del found  # a part of the key: what the folder's files hold
    data = DataSection.model_validate_json(section)
    return load(f"{data.source}:{place}", seed=seed, whole=False, task=data.task, options=data.reading)


@functools.lru_cache(maxsize=1)
def _own(text: str, client: int, place: Path, found: Marks, schema: str) -> Shards:
    study = Study.model_validate_json(text)
    source = _own_source(study.data.model_dump_json(), study.seed, place, found)
    if source.table is not None:
        source = tables.made_by(Schema.from_json(schema), source, source.table, study)
    return make_shards(
        source, alone(study, client, np.arange(len(source.y_train))), test_fraction=study.data.test_fraction,
        seed=study.seed, folder=None, validation_fraction=study.data.validation_fraction,
    )  # fmt: skip


def _check_within(folder: Path) -> None:
    """Refuse a data folder with a link that leads out of it, to what its owner has not named.

    Raises:
        DataError: there is such a link.
    """
    root = folder.resolve()
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise DataError(
                f"{path} is a link that leads out of the data folder, to {path.resolve()}: put the file itself there, "
                "or name the folder that it leads to as data"
            )


def bare(study: Study, shape: Shape, folder: Path) -> Path:
    """Write shards without any rows into ``folder``, for a server whose clients hold the data."""
    x = np.zeros((0, *shape.input_shape), np.float32 if shape.kind == "tabular" else np.uint8)
    y = torch.zeros(0, dtype=find(shape.task).dtype).numpy()
    source = Source(
        "the nodes' own",
        x,
        y,
        x,
        y,
        None,
        shape.outputs,
        kind=shape.kind,
        scale=shape.scale,
        task=shape.task,
        target_scale=shape.target_scale,
        unit=shape.unit,
        target_mean=shape.target_mean,
        classes=shape.classes,
    )
    folder.mkdir(parents=True, exist_ok=True)
    empty = [np.arange(0)] * study.data.clients
    _write(lambda: make_shards(source, empty, test_fraction=0.0, seed=study.seed, folder=folder), folder)
    return folder


def places(source: str) -> list[Path]:
    """Return the paths that a data specification may hold, and the file of a loader of one's own."""
    head, _, given = source.partition(":")
    texts = [given, given.partition(":")[2]]
    cut = [text[:end] for text in texts for end in _ends(text)]
    found = [Path(text).expanduser() for text in cut if text]
    if head not in names():
        with contextlib.suppress(ImportError, ValueError):  # it is refused when it is loaded
            spec = importlib.util.find_spec(head)
            found += [Path(spec.origin)] if spec and spec.origin else []
    return [place for place in found if place.exists()]


def _ends(text: str) -> list[int]:
    """Return where a path may end: at any ``#``, which may be part of it, or at the end."""
    return [at for at, letter in enumerate(text) if letter == "#"] + [len(text)]


def marks(*given: Path) -> Marks:
    """Return path, size, modification time and digest of each file under some paths: what shows that one changed.

    Raises:
        DataError: one of them cannot be read.
    """
    try:
        files = [p for at in given for p in ([at] if at.is_file() else sorted(at.rglob("*"))) if p.is_file()]
        return tuple(_mark(path.absolute()) for path in files)
    except OSError as broken:
        raise DataError(f"cannot read {broken.filename}: {broken.strerror}") from broken


def _mark(path: Path) -> tuple[str, int, int, str]:
    facts = path.stat()
    stamp = (facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)
    return str(path), facts.st_size, facts.st_mtime_ns, _digest(path, stamp)


@functools.lru_cache(maxsize=2**16)
def _digest(path: Path, stamp: tuple[int, ...]) -> str:
    del stamp  # a part of the key: a file is read again when it was touched
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _simulated(study: Study, folder: Path) -> None:
    section = study.data
    source = load(section.source, seed=study.seed, task=section.task, options=section.reading)
    count = len(source.y_train)
    if section.public and section.public > count - max(section.clients, 1):
        raise DataError(f"data.public = {section.public} leaves fewer rows than clients: there are {count}")
    order = (
        torch.randperm(count, generator=stream(study.seed, "public")).numpy() if section.public else np.arange(count)
    )
    public, rest = order[: section.public], np.sort(order[section.public :])
    ids = None if source.ids is None else source.ids[rest]
    drawn = partition(source.y_train[rest], ids, section.partition, clients=section.clients, seed=study.seed)
    parts = [rest[part] for part in drawn]
    if section.partition == "natural" and ids is not None:
        sites = source.table.sites if source.table else None
        source = replace(source, remarks=(*source.remarks, *_dropped(ids, drawn, sites)))
    if source.table is not None:
        source, agreed = tables.simulated(study, source, source.table, parts)
        tables.write(folder, agreed.schema, agreed.rows)
    else:
        source = standardised(source, np.concatenate(tables.held_out(study, parts)["train"]))
    make_shards(
        source, parts, test_fraction=section.test_fraction, seed=study.seed, folder=folder,
        validation_fraction=section.validation_fraction, public=public,
    )  # fmt: skip


def _dropped(ids: np.ndarray, drawn: Sequence[np.ndarray], sites: Sequence[str] | None) -> list[str]:
    """Return a remark that names the natural clients of which a partition drops all rows, or nothing.

    Args:
        ids: the natural client of each row.
        drawn: the rows of each client.
        sites: the name of each natural client, by its id; None: the id is the name.
    """
    kept = np.unique(np.concatenate([ids[part] for part in drawn]))
    gone = np.setdiff1d(ids, kept)
    if not len(gone):
        return []
    names = [str(one) if sites is None else sites[one] for one in gone[:_SHOWN]]
    more = f" and {len(gone) - _SHOWN} more" if len(gone) > _SHOWN else ""
    return [f"data.clients = {len(kept)} leaves out the smallest sites: {', '.join(names)}{more}"]


def _once(cache: Path, key: object, make: Callable[[Path], None]) -> Path:
    name = hashlib.sha256(json.dumps([secateur.__version__, LAYOUT, key]).encode()).hexdigest()[:16]
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
