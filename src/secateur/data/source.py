"""What a data source is: arrays with a training and a test part, and what is to be learnt from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

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


@dataclass(frozen=True)
class DataInfo:
    """A data format: what to type for it, one line on it, and its reference."""

    name: str
    summary: str
    reference: str
