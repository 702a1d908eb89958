"""How a table is to be read: which columns are what, and what of a file's way of writing is not found out by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from secateur.errors import DataError


@dataclass(frozen=True)
class TableOptions:
    """What a user may say of a table; what is empty is found out.

    Attributes:
        target: the column to learn; ``NAME>NUMBER`` makes two classes of whether it is above a number.
        site: the column that says which site a row is of.
        delimiter: the character between cells: of comma, semicolon, tab and bar the one that fits is found.
        decimal: the decimal sign.
        header: whether the first row has the columns' names.
        missing: cells that mean a missing value, beside the usual ones; ``-9`` for example.
        drop: columns that are left out.
        categories: columns whose cells are categories even if all of them are numbers.
    """

    target: str = ""
    site: str = ""
    delimiter: str = ""
    decimal: Literal["", ".", ","] = ""
    header: Literal["", "yes", "no"] = ""
    missing: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.delimiter) > 1 or not self.delimiter.isascii() or self.delimiter in {'"', "\n", "\r"}:
            raise DataError(f"data.options.delimiter = {self.delimiter!r} must be one character, such as ';'")

    @property
    def named(self) -> frozenset[str]:
        """Return the names of columns that the options hold; a target with ``>`` both ways."""
        return frozenset({self.target, self.target.rpartition(">")[0], self.site, *self.drop, *self.categories} - {""})
