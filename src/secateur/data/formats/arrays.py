"""Arrays of numpy."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from secateur.data.hold import hold_out
from secateur.data.outline import MOST_NUMBERS
from secateur.data.pictures import channels_first
from secateur.data.source import Kind, Source, named
from secateur.errors import DataError

_ROWS_OF_A_CLASS = 5  # with fewer, more than 20 whole numbers may be values
_WHOLE, _SPLIT = {"x", "y"}, {"x_train", "y_train", "x_test", "y_test"}


@dataclass(frozen=True)
class ArrayOptions:
    """What arrays do not say of themselves; what is empty is found out.

    Attributes:
        kind: what a row is; four dimensions are images, others tabular.
        task: what is learnt; words are classes, so are whole numbers unless nearly every row has its own, and whole
            numbers written as floats if there are at most 20; other numbers are values.
        classes: how many there are, where these rows may not hold the last one.
        scale: the number that image values are divided by; 255 for bytes, 1 for others.
        channels: where an image has its channels.
    """

    kind: Literal["", "image", "tokens", "tabular"] = ""
    task: Literal["", "classification", "regression"] = ""
    classes: int = 0
    scale: float = 0.0
    channels: Literal["first", "last"] = "first"


def load(argument: str, seed: int, options: ArrayOptions) -> Source:
    """`arrays:FILE.npz`: arrays x_train, y_train, x_test, y_test, or x and y; natural ids of training rows as ids.

    Without a test part a seeded fifth of each class, or of each id, is the test set. Images are (n, channels, height,
    width), or (n, height, width) if they are grey; features are not scaled.

    Reference: none
    """
    path = _file(Path(argument).expanduser())
    return made(read_arrays(path), str(path), f"arrays:{path.name}", seed, options)


def made(
    held: Mapping[str, np.ndarray], path: str, name: str, seed: int, options: ArrayOptions,
    remarks: tuple[str, ...] = (),
) -> Source:  # fmt: skip
    """Return arrays by name as a source; see ``load``.

    Args:
        held: the arrays.
        path: where they are from, for messages.
        name: of the source.
        seed: the seed that draws a test part where there is none.
        options: what the arrays do not say.
        remarks: the first of the source's remarks.

    Raises:
        DataError: they do not fit together.
    """
    held = dict(held)
    ids = held.pop("ids", None)
    split = _SPLIT if held.keys() == _SPLIT else _WHOLE
    if held.keys() != split:
        raise DataError(
            f"{path} holds {', '.join(sorted(held)) or 'nothing'}: name them x_train, y_train, x_test and y_test, "
            "or x and y; and ids, if there are natural clients"
        )
    x, y = ([held[name] for name in sorted(split, reverse=True) if name[0] == letter] for letter in "xy")
    _check_lengths(path, x, y, ids)
    y, words = _coded(path, y)
    remarks += (f"{path}: classes are {_numbered(words)}",) if words else ()
    task = options.task or _task(path, y)
    grey = x[0].ndim == 3 and x[0].dtype == np.uint8
    kind: Kind = options.kind or ("image" if x[0].ndim == 4 or grey else "tabular")
    if kind == "image":
        x = [channels_first(part) if options.channels == "last" or part.ndim == 3 else part for part in x]
    if split is _WHOLE:
        train, test = hold_out(_groups(y[0], ids, len(x[0]), task), seed)
        x, y = [x[0][train], x[0][test]], [y[0][train], y[0][test]]
        ids = None if ids is None else ids[train]
    outputs = 1 if task == "regression" else options.classes or _classes(path, y)
    scale = options.scale or (255.0 if x[0].dtype == np.uint8 else 1.0)
    return Source(
        name,
        x[0],
        y[0],
        x[1],
        y[1],
        ids,
        outputs,
        kind,
        scale,
        task,
        remarks,
        classes=named(words) if words else "",
    )


def _task(path: str, y: list[np.ndarray]) -> str:
    """Return what targets are learnt as, where nobody says it.

    Raises:
        DataError: they are whole numbers that may be either.
    """
    both = np.concatenate([part.reshape(-1) for part in y])
    few = len(values := np.unique(both)) <= MOST_NUMBERS
    if both.dtype.kind == "f":
        return "classification" if few and values[0] == 0 and (values == values.round()).all() else "regression"
    if both.dtype.kind in "iu" and (
        values[0] not in {0, 1} or (not few and len(both) < _ROWS_OF_A_CLASS * len(values))
    ):
        raise DataError(
            f"{path}: y holds {len(values)} whole numbers, {values[0]} to {values[-1]}: if they are values, set "
            "data.options.task=regression; if they are classes, number them from 0 and set "
            "data.options.task=classification"
        )
    return "classification"


def _file(path: Path) -> Path:
    """Return the file, or the only one in a folder."""
    found = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if len(found) != 1:
        raise DataError(f"{path} holds {len(found)} .npz files: give the path of one")
    return found[0]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file by name.

    Raises:
        DataError: it is none, or holds objects of Python.
    """
    try:
        with path.open("rb") as file:
            held = np.load(file, allow_pickle=False)
            if isinstance(held, np.ndarray):
                raise DataError(f"{path} is a single array: write x and y with numpy.savez({path.stem!r}, x=x, y=y)")
            return dict(held)
    except (OSError, EOFError, ValueError, TypeError, KeyError, zlib.error, zipfile.BadZipFile) as broken:
        pickled = "it is no .npz file, or holds objects of Python" if "allow_pickle" in str(broken) else ""
        line = pickled or getattr(broken, "strerror", "") or " ".join(str(broken).split())[:200]
        raise DataError(f"cannot read the arrays {path}: {line}; write them with numpy.savez, as numbers") from broken


def _check_lengths(path: str, x: list[np.ndarray], y: list[np.ndarray], ids: np.ndarray | None) -> None:
    sizes = [(len(one) if one.ndim else 0, len(other) if other.ndim else 0) for one, other in zip(x, y, strict=True)]
    wrong = next(((one, other) for one, other in sizes if one != other or not one), None)
    if wrong:
        raise DataError(f"{path} has {wrong[0]} rows in x and {wrong[1]} in y; each row needs both")
    if ids is not None and ids.shape != x[0].shape[:1]:
        raise DataError(f"{path} has ids of shape {ids.shape} for {len(x[0])} rows of x; one each is expected")


def _coded(path: str, y: list[np.ndarray]) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Return targets as numbers, and the words whose places among the sorted ones they are, if they were words."""
    words = [part.dtype.kind == "U" for part in y]
    if not any(words):
        return y, ()
    if not all(words):
        raise DataError(f"{path} has words in one of y_train and y_test, and numbers in the other: give both the same")
    names, codes = np.unique(np.concatenate(y), return_inverse=True)
    return np.split(codes.reshape(-1), [len(y[0])])[: len(y)], tuple(names.tolist())


def _numbered(names: tuple[str, ...]) -> str:
    return ", ".join(f"{code} {name}" for code, name in enumerate(names[:20]))


def _groups(y: np.ndarray, ids: np.ndarray | None, rows: int, task: str) -> np.ndarray:
    """Return what the test part is drawn from evenly: the classes, the natural ids, or all rows."""
    if task == "classification" and y.shape in {(rows,), (rows, 1)}:
        return y.reshape(-1)
    return np.zeros(rows, np.int64) if ids is None else ids


def _classes(path: str, y: list[np.ndarray]) -> int:
    both = np.concatenate([part.reshape(-1) for part in y])
    if not np.isfinite(both).all() or both.min() != 0:
        raise DataError(f"{path}: the least class in y is {both.min()}, and must be 0: give y - y.min()")
    return int(both.max()) + 1
