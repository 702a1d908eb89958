"""CSV files of numbers."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np

from secateur.data.raw_table import Column, RawTable
from secateur.data.sources import Source
from secateur.errors import DataError

_MISSING = {"", "?", "NA", "NaN", "nan"}


RECOMMENDED = {"data": {"partition": "natural"}, "model": {"name": "mlp"}, "training": {"clip": 1.0}}
"""Settings for tables where a study does not say: a client for each site, and steps that no outlier blows up."""


def load(argument: str, seed: int) -> Source:
    """`table:FILE#TARGET#SITE`: numbers in a CSV file, sites as natural ids; or `table:FOLDER#TARGET`, a file each.

    Reference: none
    """
    del seed
    return Source.of_table("table", _read_table(argument))


def _read_table(argument: str) -> RawTable:
    """Return the table of ``FILE#TARGET#SITE``, or of ``FOLDER#TARGET`` with a file for each site.

    Columns are named by the header, or by their numbers from 1 without one. Columns of words are dropped. A target with
    at most 20 values, all of them whole, is a class; ``TARGET>N`` makes two classes of whether it is above N.

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
    columns = tuple(_column(name, [row[name] for row in rows]) for name in rows[0] if name not in dropped)
    names, ids = np.unique(sites, return_inverse=True)
    return RawTable(columns, Column(target, y), tuple(map(str, names)), ids.astype(np.int64))


def _column(name: str, cells: list[str]) -> Column:
    numbers = _numbers(cells)
    if numbers is not None:
        return Column(name, numbers)
    words = sorted({cell for cell in cells if cell.strip() not in _MISSING})
    place = {word: code for code, word in enumerate(words)}
    return Column(name, np.array([place.get(cell, -1) for cell in cells]), tuple(words))


def _read(path: Path) -> list[dict[str, str]]:
    """Return the columns of a file by name; without a header they are numbered from 1."""
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
    """Return cells as numbers, missing ones as NaN; None if one of them is a word."""
    try:
        return np.array([np.nan if cell.strip() in _MISSING else float(cell) for cell in cells])
    except ValueError:
        return None
