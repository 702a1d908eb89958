"""Outlines: what a site says of its table, so that a federation can agree on a schema.

An outline is bounded in size, and holds no cell of a single row: only words that rows share, and the classes to learn.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from secateur.data.raw_table import Column, RawTable
from secateur.errors import DataError

MOST_FEATURES, MOST_CATEGORIES, MOST_NUMBERS, LONGEST_NAME = 10_000, 100, 20, 200
"""The most columns of a table, categories of a column or classes, whole numbers that are classes, and characters."""

Made = TypeVar("Made")

Kind = Literal["number", "category", "text", "unknown"]
Name = Annotated[str, StringConstraints(max_length=LONGEST_NAME)]
_Names = Annotated[tuple[Name, ...], Field(max_length=MOST_CATEGORIES)]


@dataclass(frozen=True)
class Feature:
    """A column: its name, and what it holds.

    Attributes:
        name: of the column.
        kind: numbers; categories; words that are none (too many, or each in one row only); or unknown, as every cell is
            missing. A target has numbers or categories.
        categories: the words, sorted; of a target, the classes, empty if it is a number.
    """

    name: Name
    kind: Kind = "number"
    categories: _Names = ()


@dataclass(frozen=True)
class Outline:
    """What a site says of its table: its features, and its target with the classes to learn."""

    features: Annotated[tuple[Feature, ...], Field(max_length=MOST_FEATURES)]
    target: Feature

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Outline:
        """Return what ``to_json`` wrote.

        Raises:
            DataError: it is none, beyond the bounds, or names a column twice.
        """
        found = read(_OUTLINE, text, "the outline of a table")
        check_names([*found.features, found.target])
        return found


_OUTLINE = TypeAdapter(Outline)


def outline(train: RawTable, whole: RawTable) -> Outline:
    """Return what a site says of its table.

    Args:
        train: the training rows, whose words are the categories.
        whole: all rows, whose targets are the classes.

    Raises:
        DataError: more columns or classes than a site may have, or a name that is too long.
    """
    if len(train.features) > MOST_FEATURES:
        raise DataError(f"the table has {len(train.features)} columns; {MOST_FEATURES} at most can be used")
    long = next((c.name for c in (*train.features, train.target) if len(c.name) > LONGEST_NAME), None)
    if long is not None:
        raise DataError(
            f"column {long[:40]!r}...: its name has {len(long)} characters; {LONGEST_NAME} at most can be used"
        )
    return Outline(tuple(map(_feature, train.features)), _target(whole.target))


def _feature(column: Column) -> Feature:
    if column.missing.all():
        return Feature(column.name, "unknown")
    if not column.categories:
        return Feature(column.name)
    rows = np.bincount(column.values[~column.missing].astype(np.int64), minlength=len(column.categories))
    shared = tuple(word for word, count in zip(column.categories, rows, strict=True) if count > 1)
    usable = 0 < len(shared) <= MOST_CATEGORIES and max(map(len, shared)) <= LONGEST_NAME
    return Feature(column.name, "category" if usable else "text", shared if usable else ())


def _target(column: Column) -> Feature:
    if not column.categories and (
        (column.values != column.values.round()).any() or len(np.unique(column.values)) > MOST_CATEGORIES
    ):
        return Feature(column.name)
    labels = sorted(set(labels_of(column)))
    if len(labels) > MOST_CATEGORIES or any(len(label) > LONGEST_NAME for label in labels):
        raise DataError(
            f"target {column.name!r} has {len(labels)} classes of words; {MOST_CATEGORIES} of {LONGEST_NAME} "
            "characters at most can be learnt: it may be the wrong column"
        )
    return Feature(column.name, "category" if column.categories else "number", tuple(labels))


def labels_of(column: Column) -> list[str]:
    """Return the target of each row as text: its word, or its number."""
    if column.categories:
        return [column.categories[code] for code in column.values.astype(np.int64)]
    return [_text(value) for value in column.values.tolist()]


def _text(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(value)


def some(names: Sequence[str]) -> str:
    """Return the first three names, for an error."""
    shown = ", ".join(repr(name[:40]) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def check_names(features: Sequence[Feature]) -> None:
    """Refuse columns of one name.

    Raises:
        DataError: there are two.
    """
    twice = next((name for name, count in Counter(f.name for f in features).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"column {twice[:40]!r} comes twice")


def read(of: TypeAdapter[Made], text: str, what: str) -> Made:
    """Return what a JSON text describes; ``what`` names it in the error.

    Raises:
        DataError: it is not of this type, or beyond its bounds.
    """
    try:
        return of.validate_json(text)
    except ValidationError as broken:
        first = broken.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{what} cannot be read: {path[:80]}: {first['msg']}") from broken
