"""What a data source is: arrays with a training and a test part, and what is to be learnt from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from secateur.data.outline import MOST_NUMBERS
from secateur.data.raw_table import RawTable

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
        target_scale, target_mean: what stored numbers to learn are multiplied by, and what is added then, to be in the
            target's own unit. Where a loader leaves them at 1 and 0, a simulation scales numbers over all clients'
            training rows.
        unit: the name of the target's unit; empty: unknown, or a class.
        table: the rows as they were read, in place of ``x_train``, which is empty then: the sites agree on a schema
            before rows are made of them, and hold out test rows of their own.
        classes: a digest of the names of the classes, see ``named``; sites of one study must have the same. Empty: none
            are named.
        remarks: what a reader of the results should know of how the rows were read, one line each.
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
    remarks: tuple[str, ...] = ()
    target_scale: float = 1.0
    unit: str = ""
    table: RawTable | None = None
    target_mean: float = 0.0
    classes: str = ""

    @classmethod
    def of_table(cls, name: str, table: RawTable) -> Source:
        """Return a source whose rows wait for a schema; its classes are for partitions by class."""
        x, target = np.zeros((len(table.ids), 0), np.float32), table.target
        values, labels = np.unique(target.values, return_inverse=True)
        classes = bool(target.categories) or len(values) <= MOST_NUMBERS
        y = labels.astype(np.int64) if classes else target.values.astype(np.float32)
        ids = table.ids if len(table.sites) > 1 else None
        return cls(
            name, x, y, x[:0], y[:0], ids, len(values) if classes else 1, "tabular", 1.0,
            "classification" if classes else "regression", remarks=table.remarks, table=table,
        )  # fmt: skip


def named(classes: Sequence[str]) -> str:
    """Return 16 hexadecimal digits that tell lists of class names apart."""
    return hashlib.sha256(json.dumps([str(name) for name in classes]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class DataInfo:
    """A data format: what to type for it, one line on it, and its reference."""

    name: str
    summary: str
    reference: str
