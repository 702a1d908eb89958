"""Data sources: a specification such as ``idx:FOLDER`` is loaded as arrays with a training and a test part.

The part before the colon names a format, a module of ``secateur.data.formats``.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from secateur.data import formats
from secateur.data.raw_table import RawTable
from secateur.data.schema import MOST_NUMBERS
from secateur.errors import DataError, SecateurError, unknown

Kind = Literal["image", "tokens", "tabular"]


@dataclass(frozen=True)
class Source:
    """A data set as arrays.

    Attributes:
        name: the specification that it was loaded from.
        x_train, x_test: rows; images uint8 (n, channels, height, width), tokens uint8 (n, characters),
            features float32 (n, features).
        y_train, y_test: int64 classes, or float32 values for regression.
        ids: the natural client of each training row, or None.
        outputs: number of classes, or 1 for regression.
        kind: how a row becomes a model's input.
        scale: the number that image values are divided by.
        task: what is learnt: ``classification``, ``regression``, or your own ``module:Class`` of ``learning.task``.
        target_scale: what a difference of stored targets is multiplied by to be in the target's own unit.
        table: the rows as they were read, in place of ``x_train``, which is empty then: the sites agree on a schema
            before rows are made of them, and hold out test rows of their own.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    ids: np.ndarray | None
    outputs: int
    kind: Kind = "image"
    scale: float = 255.0
    task: str = "classification"
    target_scale: float = 1.0
    table: RawTable | None = None

    @classmethod
    def of_table(cls, name: str, table: RawTable) -> Source:
        """Return a source whose rows wait for a schema; its classes are for partitions by class."""
        x, target = np.zeros((len(table.ids), 0), np.float32), table.target
        values, labels = np.unique(target.values, return_inverse=True)
        classes = bool(target.categories) or len(values) <= MOST_NUMBERS
        y = labels.astype(np.int64) if classes else target.values.astype(np.float32)
        ids = table.ids if len(table.sites) > 1 else None
        return cls(name, x, y, x[:0], y[:0], ids, len(values) if classes else 1, "tabular", 1.0, table=table)


@dataclass(frozen=True)
class DataInfo:
    """A data format: what to type for it, one line on it, and its reference."""

    name: str
    summary: str
    reference: str


def names() -> dict[str, DataInfo]:
    """Return the formats of this package by name, those that need no folder first."""
    infos = {}
    for module in pkgutil.iter_modules(formats.__path__):
        doc = inspect.cleandoc(_format(module.name).__doc__ or "")
        summary, _, rest = doc.partition("\n")
        written, _, text = summary.partition(": ")
        reference = " ".join(rest.partition("Reference: ")[2].split())
        infos[module.name] = DataInfo(written.strip("`"), text, reference)
    return dict(sorted(infos.items(), key=lambda item: (_needs_place(item[1]), item[0])))


def embedded() -> frozenset[str]:
    """Return the names of the formats that read no file of the user's."""
    return frozenset(name for name, info in names().items() if not _needs_place(info))


def recommended(spec: str) -> Mapping[str, Mapping[str, Any]]:
    """Return the settings, by section, that a format recommends where a study does not set them itself."""
    name = spec.partition(":")[0]
    if name not in {module.name for module in pkgutil.iter_modules(formats.__path__)}:
        return {}
    return getattr(importlib.import_module(f"{formats.__name__}.{name}"), "RECOMMENDED", {})


def _needs_place(info: DataInfo) -> bool:
    return ":" in info.name


def _format(name: str) -> Callable[[str, int], Source]:
    """Return the loader of one of this package's formats."""
    load_format: Callable[[str, int], Source] = importlib.import_module(f"{formats.__name__}.{name}").load
    return load_format


def load(spec: str, *, seed: int, whole: bool = True) -> Source:
    """Return the data set that a specification names.

    Args:
        spec: a name of ``names``, with the folder or file that it needs, such as ``digits`` or ``idx:FOLDER``; or your
            own ``module:function:FOLDER``, whose function gets (folder, seed) and returns a ``Source``.
        seed: the seed that draws a test part where the data set has none.
        whole: refuse a data set without a test part; a single node's own rows need none.

    Raises:
        DataError: unknown format, or files that are missing or malformed.
        MissingExtraError: a package that the format needs is not installed.
    """
    name, _, argument = spec.partition(":")
    known = names()
    if name in known:
        if _needs_place(known[name]) and not argument:
            raise DataError(f"data {spec!r}: say where it is, as {known[name].name}")
        source = _format(name)(argument, seed)
    elif argument:
        source = _load_with(name, *argument.partition(":")[::2], seed)
    else:
        raise unknown("data source", name, known, error=DataError)
    if not len(source.x_train) or (whole and source.table is None and not len(source.x_test)):
        raise DataError(f"data {spec!r} has {len(source.x_train)} training and {len(source.x_test)} test rows")
    if source.x_train.shape[1:] != source.x_test.shape[1:]:
        shapes = f"{source.x_train.shape[1:]} and {source.x_test.shape[1:]}"
        raise DataError(f"data {spec!r} has training and test rows of different shapes: {shapes}")
    return source


def _load_with(module: str, function: str, folder: str, seed: int) -> Source:
    """Return what a user's own loader returns; an error of any kind is raised as a DataError that names the loader."""
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name != module.partition(".")[0]:
            raise DataError(f"data {module}:{function}: {missing}") from missing
        raise unknown("data source", module, names(), error=DataError) from missing
    try:
        source = getattr(loaded, function)(folder, seed)
    except SecateurError:
        raise
    except Exception as broken:
        raise DataError(
            f"data {module}:{function}: {type(broken).__name__}: {' '.join(str(broken).split())}"
        ) from broken
    if not isinstance(source, Source):
        raise DataError(f"data {module}:{function} returned {type(source).__name__}, not a secateur.data.Source")
    return source


def folder_of(argument: str, name: str) -> Path:
    """Return the folder that the argument of a format names.

    Raises:
        DataError: there is no such folder.
    """
    folder = Path(argument).expanduser()
    if not folder.is_dir():
        raise DataError(f"data {name}:{argument}: there is no such folder")
    return folder
