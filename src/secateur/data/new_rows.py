"""Rows of a new table, without a target, as the features that a schema asks for: by name, whatever their order."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.data.columns import as_text, number_column, text_column
from secateur.data.delimited import Cells, read_delimited
from secateur.data.outline import Feature, some
from secateur.data.parquet import read_parquet
from secateur.data.raw_table import Column
from secateur.data.schema import Schema, codes_of
from secateur.data.table_options import TableOptions
from secateur.errors import DataError, need


@dataclass(frozen=True)
class NewRows:
    """Rows to predict for.

    Attributes:
        raw: the features as ``Schema.raw`` gives them, float64 (rows, features).
        places: the number of each row as a spreadsheet shows it; the first row of the file is 1.
        others: the cells of the columns that are no features, as text, such as the rows' ids.
        remarks: what a reader of the predictions should know, one line each.
    """

    raw: NDArray[np.float64]
    places: NDArray[np.int64]
    others: dict[str, list[str]]
    remarks: tuple[str, ...] = ()


def read_new_rows(path: Path, schema: Schema, options: TableOptions) -> NewRows:
    """Read a CSV or Parquet file whose columns have the names of a schema's features; other columns are carried along.

    A missing cell is NaN. A word that is none of a column's categories is none of them, which a remark says.

    Args:
        path: the file.
        schema: what the model takes.
        options: how the tables were read that the model learnt from.

    Raises:
        DataError: the file cannot be read, lacks a column, or has words in a column of numbers; the text says where.
        MissingExtraError: there is no pyarrow.
    """
    words = tuple(f.name for f in schema.features if f.categories)
    options = replace(options, target="", site="", drop=(), categories=words)
    if path.is_dir():
        raise DataError(f"{path} is a folder: give one file of rows")
    cells = read_parquet(path, options) if path.suffix == ".parquet" else read_delimited(path, options)
    _refuse_lacking(cells, schema)
    columns = [_column(cells, feature, options) for feature in schema.features]
    raw = np.stack([codes_of(column, f.categories) for column, f in zip(columns, schema.features, strict=True)], 1)
    used = {feature.name for feature in schema.features}
    others = {name: as_text(column).to_pylist() for name, column in cells.columns.items() if name not in used}
    strange = [_strange(column, f) for column, f in zip(columns, schema.features, strict=True) if f.categories]
    return NewRows(raw, cells.rows.astype(np.int64), others, (*cells.remarks, *filter(None, strange)))


def _refuse_lacking(cells: Cells, schema: Schema) -> None:
    lacking = [feature.name for feature in schema.features if feature.name not in cells.columns]
    if lacking:
        near = difflib.get_close_matches(lacking[0], list(cells.columns), n=1)
        hint = f" (did you mean its {near[0]!r}? Rename it)" if near else ""
        raise DataError(
            f"{cells.file} lacks column {some(lacking)}, which the model takes{hint}: add it; its cells may be empty"
        )


def _column(cells: Cells, feature: Feature, options: TableOptions) -> Column:
    arrow, name = need("pyarrow", extra="tables"), feature.name
    held: Any = cells.columns[name]
    if feature.categories:
        return text_column(name, as_text(held), cells.where, options)[0]
    if arrow.types.is_floating(held.type):
        return number_column(name, held, cells.where)
    column = text_column(name, held, cells.where, options)[0]
    if column.categories:
        row = int(np.flatnonzero(~column.missing)[0])
        word = column.categories[int(column.values[row])]
        raise DataError(
            f"{cells.where(row)}, column {name!r}: {word[:40]!r} is a word, and the model learnt numbers: correct the "
            "cell or leave it empty"
        )
    return column


def _strange(column: Column, feature: Feature) -> str:
    """Return a remark on the words that are none of the categories; empty if there are none."""
    unknown = [word for word in column.categories if word not in feature.categories]
    if not unknown:
        return ""
    codes = {column.categories.index(word) for word in unknown}
    count = sum(int(value) in codes for value in column.values.tolist())
    near = difflib.get_close_matches(unknown[0], feature.categories, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    return (
        f"column {feature.name!r}: {count} row{'' if count == 1 else 's'} with {some(unknown)}, which no site had in "
        f"training{hint}: taken as none of {some(list(feature.categories))}"
    )
