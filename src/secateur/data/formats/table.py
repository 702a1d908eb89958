"""Tables in CSV and Parquet files."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from secateur.data.columns import as_text, number_column, text_column
from secateur.data.delimited import Cells, read_delimited
from secateur.data.parquet import read_parquet
from secateur.data.raw_table import Column, RawTable
from secateur.data.source import Source
from secateur.data.table_options import TableOptions
from secateur.errors import DataError, need

_ENDINGS = (".csv", ".data", ".tsv", ".tab", ".txt", ".parquet")


RECOMMENDED: dict[str, dict[str, Any]] = {
    "data": {"partition": "natural"},
    "model": {"name": "mlp"},
    "training": {"lr": 0.03, "clip": 1.0},
}
"""Settings for tables where a study does not say: a client for each site, and steps that suit few rows and outliers."""


def load(argument: str, seed: int, options: TableOptions) -> Source:
    """`table:FILE#TARGET#SITE`: a CSV or Parquet file, sites as natural ids; or `table:FOLDER#TARGET`, a file each.

    The columns can be named apart instead: data.target and data.site.

    Reference: none; what clients hold out is the test set
    """
    del seed
    return Source.of_table("table", read(argument, options))


def read(argument: str, options: TableOptions) -> RawTable:
    """Return the table of ``FILE#TARGET#SITE``, or of ``FOLDER#TARGET`` with a file for each site.

    Columns are named by the header, or by their numbers from 1 without one. All files have the same columns, in any
    order. Names with ``#`` in them are given by the options.

    Raises:
        DataError: a file cannot be read, or not in one way; the text names file, row and column.
        MissingExtraError: there is no pyarrow.
    """
    path, options = place_of(argument, options)
    files = _files(path)
    tables = [
        read_parquet(file, options) if file.suffix == ".parquet" else read_delimited(file, options) for file in files
    ]
    return assembled(tables, options, [file.name for file in files], _others(path, files), str(path))


def assembled(
    tables: list[Cells], options: TableOptions, names: Sequence[str], told: Sequence[str], path: str
) -> RawTable:
    """Return the columns of several sites as one table.

    Args:
        tables: a site's each, or all rows where the options name a column of sites.
        options: which columns are what.
        names: the sites', where no column says them.
        told: the first remarks.
        path: where they are from, for messages.

    Raises:
        DataError: the text names file, row and column.
    """
    name, above, limit = _target(options.target, tables[0])
    used = _used(tables, name, options)
    ends = np.cumsum([len(table.rows) for table in tables])

    def where(row: int) -> str:
        number = int(np.searchsorted(ends, row, side="right"))
        return tables[number].where(row - (int(ends[number - 1]) if number else 0))

    columns, remarks = _columns(tables, used, where, options)
    remarks = [*told, *(remark for table in tables for remark in table.remarks), *remarks]
    absent = [name for name in options.drop if not any(name in table.dropped for table in tables)]
    if absent:
        remarks.append(
            f"{path} has no column {_some(absent)}, which data.options.drop names: nothing is left out by it"
        )
    target = columns.pop(name)
    _refuse_missing(
        target.missing, name, where, "a row without a target teaches nothing: delete the row, or fill it in"
    )
    if above:
        target = _above(target, limit)
    if options.site:
        sites, ids = _by_column(tables, options.site, where)
    else:
        sites = tuple(names)
        ids = np.repeat(np.arange(len(tables)), np.diff(ends, prepend=0))
    return RawTable(tuple(columns.values()), target, sites, ids.astype(np.int64), tuple(remarks))


def place_of(argument: str, options: TableOptions) -> tuple[Path, TableOptions]:
    """Return the path in an argument, and the options with the names that follow it behind ``#``.

    The path is the longest part before a ``#`` that exists.

    Raises:
        DataError: no part of it exists, or it and the options do not name one target.
    """
    pieces = argument.split("#")
    whole = ["#".join(pieces[:n]) for n in range(len(pieces), 0, -1)]
    place = next((text for text in whole if text and Path(text).expanduser().exists()), None)
    if place is None:
        raise DataError(f"cannot read the table {pieces[0]}: there is no such file or folder")
    names = argument[len(place) + 1 :].split("#") if len(place) < len(argument) else []
    if len(names) > 2 or (names and options.target) or (len(names) == 2 and options.site):
        raise DataError(
            f"data 'table:{argument}': write table:FILE#TARGET#SITE or table:FOLDER#TARGET, or name the columns with "
            "data.target and data.site if their names hold a #"
        )
    target, site = (*names, *["", ""][len(names) :])
    options = replace(options, target=target or options.target, site=site or options.site)
    if not options.target:
        raise DataError(f"data 'table:{argument}': name the column to learn, as data.target=NAME or table:FILE#NAME")
    return Path(place).expanduser(), options


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(
        file for file in path.iterdir()
        if file.is_file() and not file.name.startswith(".") and file.name.lower().removesuffix(".gz").endswith(_ENDINGS)
    )  # fmt: skip
    if not files:
        raise DataError(f"{path} holds no table: a site's file ends in {', '.join(_ENDINGS)}, gzipped or not")
    stems: dict[str, Path] = {}
    for file in files:
        other = stems.setdefault(file.name.lower().removesuffix(".gz").rpartition(".")[0], file)
        if other != file:
            raise DataError(
                f"{path} holds {other.name} and {file.name}, which may be one site twice: keep one, or rename it"
            )
    return files


def _others(path: Path, files: list[Path]) -> list[str]:
    """Return a remark on what lies in a folder of sites and is no table."""
    there = sorted(path.iterdir()) if path.is_dir() else []
    others = [item.name for item in there if item not in files and not item.name.startswith(".")]
    return [f"{path}: {_some(others)} {'are no tables' if len(others) > 1 else 'is no table'}: left out"] * bool(others)


def _target(written: str, table: Cells) -> tuple[str, bool, float]:
    """Return the name of the target, whether it is cut in two classes, and at which value."""
    name, above, limit = written.rpartition(">")
    if written in table.columns or not above:
        return written, False, 0.0
    try:
        return name, True, float(limit)
    except ValueError:
        raise DataError(
            f"data.target = {written!r}: write NAME>NUMBER, for two classes of whether it is above"
        ) from None


def _used(tables: list[Cells], target: str, options: TableOptions) -> list[str]:
    """Return the names of the columns to read, in the first file's order.

    Raises:
        DataError: a name that is asked for is no column's, or the files' columns differ.
    """
    first = tables[0]
    if target == options.site:
        raise DataError(
            f"data.target and data.site are both {target!r}: name the column to learn, and that of the sites"
        )
    for kind, name in (
        ("target", target),
        ("site", options.site),
        *(("categories", name) for name in options.categories),
    ):
        if name and name not in first.columns:
            near = difflib.get_close_matches(name, first.columns, n=1)
            hint = f"did you mean {near[0]!r}? Its columns are" if near else "its columns are"
            alone = "; if cells are not told apart, name the delimiter with data.options.delimiter"
            raise DataError(
                f"{first.file} has no column {name!r} (data.{kind}): {hint} {_some(list(first.columns), 8)}"
                + alone * (len(first.columns) == 1)
            )
    for table in tables[1:]:
        lacks = [name for name in first.columns if name not in table.columns]
        more = [name for name in table.columns if name not in first.columns]
        if lacks or more:
            told = [f"lacks {_some(lacks)}"] * bool(lacks) + [f"has {_some(more)} beside them"] * bool(more)
            raise DataError(
                f"{table.file}, row 1: of the columns of {first.file} it {' and '.join(told)}; give all the same, "
                f"or leave out what not all have with data.options.drop"
            )
    used = [name for name in first.columns if name != options.site]
    if used == [target]:
        raise DataError(
            f"{first.file} has no column beside {_some([target, options.site])}: there is nothing to learn from"
        )
    return used


def _some(names: list[str], most: int = 5) -> str:
    shown = [repr(name) for name in names if name]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} others" if len(shown) > most else "")


def _columns(
    tables: list[Cells], names: list[str], where: Any, options: TableOptions
) -> tuple[dict[str, Column], list[str]]:
    """Return the columns over all files, and remarks."""
    arrow, remarks = need("pyarrow", extra="tables"), list[str]()
    found = {}
    for name in names:
        parts = [table.columns[name] for table in tables]
        numeric = [arrow.types.is_floating(part.type) for part in parts]
        if name in options.categories:
            parts, numeric = [as_text(part) for part in parts], [False]
        if all(numeric):
            found[name] = number_column(name, arrow.concat_arrays(parts), where)
        elif any(numeric):
            first, other = tables[numeric.index(True)].file, tables[numeric.index(False)].file
            raise DataError(f"column {name!r} has numbers in {first} and text in {other}: give it one type")
        else:
            found[name], more = text_column(name, arrow.concat_arrays(parts), where, options)
            remarks += more
    return found, remarks


def _refuse_missing(missing: np.ndarray, name: str, where: Any, advice: str) -> None:
    if missing.any():
        raise DataError(f"{where(int(np.flatnonzero(missing)[0]))}, column {name!r} is empty: {advice}")


def _above(target: Column, limit: float) -> Column:
    if target.categories:
        raise DataError(f"data.target = '{target.name}>{limit:g}': its cells are words, which are not above a number")
    return Column(f"{target.name}>{limit:g}", (target.values > limit).astype(np.float64))


def _by_column(tables: list[Cells], name: str, where: Any) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the sites that a column names, sorted, and the site of each row."""
    words = np.array([cell for table in tables for cell in as_text(table.columns[name]).to_pylist()], dtype=object)
    _refuse_missing(words == "", name, where, "each row is of a site; fill it in, or delete the row")
    sites, ids = np.unique(words, return_inverse=True)
    return tuple(sites), ids
