"""Tables: rows of numbers in CSV files, by site."""

from __future__ import annotations

import csv
import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from secateur.data.hold import hold_out
from secateur.errors import DataError

_MISSING = {"", "?", "NA", "NaN", "nan"}
_MOST_CLASSES = 20


@dataclass(frozen=True)
class Table:
    """A table's rows, with a test part.

    Attributes:
        x_train, x_test: features, each scaled by the training rows' mean and standard deviation; a missing one is 0,
            and a column of its own says so. float32.
        y_train, y_test: int64 classes, or float32 values.
        ids: site of each training row.
        outputs: classes; 1 for values.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    ids: np.ndarray
    outputs: int

    @property
    def task(self) -> str:
        """Return what is learnt."""
        return "classification" if self.outputs > 1 else "regression"

    @property
    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the arrays, in this order."""
        return self.x_train, self.y_train, self.x_test, self.y_test, self.ids


def table(argument: str, seed: int) -> Table:
    """Read ``FILE#TARGET#SITE``, or ``FOLDER#TARGET`` where each file is a site; see ``secateur list``.

    Columns go by their names, or by their numbers from 1 where files have no header. Columns that hold words are left
    out. A target is a class where it has at most 20 values, all of them whole; ``TARGET>N`` asks whether it is above N.

    Raises:
        DataError: no such file or column, or nothing that can be learnt.
    """
    place, *names = argument.split("#")
    path = Path(place).expanduser()
    files = sorted(p for p in path.iterdir() if ".csv" in p.name or p.suffix == ".data") if path.is_dir() else [path]
    wanted = 1 if path.is_dir() else 2
    if len(names) != wanted:
        raise DataError(f"data 'table:{argument}': write table:FILE#TARGET#SITE, or table:FOLDER#TARGET")
    rows, sites = list[dict[str, str]](), list[str]()
    for file in files:
        found = _read(file)
        rows += found
        sites += [file.name] * len(found) if path.is_dir() else [row.get(names[1], "") for row in found]
    target, above, limit = names[0].partition(">")
    if not rows or target not in rows[0] or (not path.is_dir() and names[1] not in rows[0]):
        known = ", ".join(list(rows[0])[:8]) if rows else "none"
        raise DataError(f"data 'table:{argument}': no such column; the first ones are: {known}")
    y = _numbers([row[target] for row in rows])
    if y is None or np.isnan(y).any():
        raise DataError(f"data 'table:{argument}': {target} has rows that are no numbers")
    y = (y > float(limit)).astype(float) if above else y
    dropped = {target, *names[1:]}
    columns = [_numbers([row[name] for row in rows]) for name in rows[0] if name not in dropped]
    features = np.stack([column for column in columns if column is not None], axis=1)
    return _split(features, y, np.unique(sites, return_inverse=True)[1], seed)


def _split(features: np.ndarray, y: np.ndarray, ids: np.ndarray, seed: int) -> Table:
    """Hold a fifth of each site out, and scale by what is left."""
    train, test = hold_out(ids, seed)
    with np.errstate(invalid="ignore"):
        mean, spread = np.nanmean(features[train], axis=0), np.nanstd(features[train], axis=0)
    missing = np.isnan(features)
    scaled = np.where(missing, 0.0, (features - mean) / np.where(spread > 0, spread, 1.0))
    x = np.concatenate([scaled, missing[:, missing.any(axis=0)]], axis=1).astype(np.float32)
    values = np.unique(y)
    if len(values) <= _MOST_CLASSES and (values == values.round()).all():
        y, outputs = np.searchsorted(values, y).astype(np.int64), len(values)
    else:
        y, outputs = y.astype(np.float32), 1
    return Table(x[train], y[train], x[test], y[test], ids[train].astype(np.int64), outputs)


def _read(path: Path) -> list[dict[str, str]]:
    """Return a file's rows by column; without a header columns are numbered from 1."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            lines = [line for line in csv.reader(file) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as broken:
        raise DataError(f"cannot read the table {path}: {broken}") from broken
    if not lines:
        return []
    bare = _numbers(lines[0]) is not None
    names = [str(n) for n in range(1, len(lines[0]) + 1)] if bare else lines[0]
    body = lines if bare else lines[1:]
    wrong = next((n for n, line in enumerate(body, start=1) if len(line) != len(names)), None)
    if wrong is not None:
        raise DataError(f"{path}: row {wrong} has {len(body[wrong - 1])} cells, {len(names)} are expected")
    return [dict(zip(names, line, strict=True)) for line in body]


def _numbers(cells: list[str]) -> np.ndarray | None:
    """Return cells as numbers, missing ones as NaN; None where one of them is a word."""
    try:
        return np.array([np.nan if cell.strip() in _MISSING else float(cell) for cell in cells])
    except ValueError:
        return None
