"""Parquet files as columns of numbers and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from secateur.data.delimited import Cells
from secateur.data.table_options import TableOptions
from secateur.errors import DataError, need


def read_parquet(path: Path, options: TableOptions) -> Cells:
    """Return the columns of a Parquet file; truth values are 0 and 1, dates are text.

    Raises:
        DataError: it cannot be read, or a column holds neither numbers nor text.
        MissingExtraError: there is no pyarrow.
    """
    arrow, parquet = need("pyarrow", extra="tables"), need("pyarrow.parquet", extra="tables")
    try:
        found = parquet.read_table(path, partitioning=None)
    except (OSError, arrow.ArrowException) as broken:
        raise DataError(f"cannot read the table {path}: {' '.join(str(broken).split())[:200]}") from broken
    return cells_of(found, str(path), options)


def cells_of(found: Any, file: str, options: TableOptions) -> Cells:
    """Return the columns of a table of Arrow; ``file`` is what it is called in messages.

    Raises:
        DataError: it has no rows, two columns of one name, or one that holds neither numbers nor text.
    """
    names = found.column_names
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise DataError(f"{file}: two columns are named {double!r}; rename one")
    if not found.num_rows:
        raise DataError(f"{file} has no rows: a table has a row for each person or thing")
    columns = {
        name: _plain(file, name, found.column(name).combine_chunks())
        for name in names
        if name not in options.drop and name != "__index_level_0__"
    }
    rows = np.arange(1, found.num_rows + 1)
    return Cells(file, columns, rows, rows, dropped=frozenset(options.drop) & frozenset(names))


def _plain(path: str, name: str, column: Any) -> Any:
    """Return a column as float64 with nulls, or as text with "" where there is none."""
    arrow, compute = need("pyarrow", extra="tables"), need("pyarrow.compute", extra="tables")
    kind = arrow.types
    if kind.is_dictionary(column.type):
        column = column.dictionary_decode()
    written = column.type
    if kind.is_boolean(written):
        column = compute.cast(column, arrow.int8())
    if kind.is_temporal(written):
        column = compute.cast(column, arrow.string())
    if kind.is_string(column.type) or kind.is_large_string(column.type) or kind.is_null(column.type):
        text = compute.fill_null(compute.cast(column, arrow.string()), "")
        return compute.utf8_trim_whitespace(text)
    numeric = kind.is_integer(column.type) or kind.is_floating(column.type) or kind.is_decimal(column.type)
    if not numeric:
        raise DataError(f"{path}, column {name!r} is of type {written}: leave it out with data.options.drop={name}")
    return compute.cast(column, arrow.float64(), safe=False)
