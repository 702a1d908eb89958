"""Rows of a table as they were read: numbers and categories, before anything is scaled, filled in or dropped."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: as the header has it; the column's number from 1 in a file without a header.
        values: numbers, float64 (n,), finite, and NaN where a cell is missing; or codes of categories, int64 (n,),
            and -1 where a cell is missing.
        categories: the words that the codes stand for, sorted; empty for numbers. A column in which every cell is
            missing has numbers, as nothing says what it would hold.
    """

    name: str
    values: np.ndarray
    categories: tuple[str, ...] = ()

    @property
    def missing(self) -> np.ndarray:
        """Return whether each cell is missing, (n,)."""
        found: np.ndarray = self.values < 0 if self.categories else np.isnan(self.values)
        return found


@dataclass(frozen=True)
class RawTable:
    """A table, of one site or of several.

    Attributes:
        features: the columns that are neither target nor site, in the order of the first file.
        target: the column to learn; none of its cells is missing.
        sites: the name of each site, sorted: a file's name, or what the column of sites says.
        ids: the site of each row as its place in ``sites``, int64 (n,).
        remarks: what a reader of the results should know of how it was read, one line each.
    """

    features: tuple[Column, ...]
    target: Column
    sites: tuple[str, ...]
    ids: np.ndarray
    remarks: tuple[str, ...] = ()

    def take(self, rows: np.ndarray) -> RawTable:
        """Return the table of some rows, by number; categories and sites stay those of the whole."""
        features = tuple(replace(column, values=column.values[rows]) for column in self.features)
        target = replace(self.target, values=self.target.values[rows])
        return replace(self, features=features, target=target, ids=self.ids[rows])
