"""The one place where arrays are checked before anything is made of them, whoever loaded them."""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Integral, Real
from typing import NoReturn, get_args

import numpy as np

from secateur.data.source import Kind, Source
from secateur.errors import DataError

_LARGEST = float(np.finfo(np.float32).max)
_CHANNELS = (1, 3, 4)


def checked(source: Source, spec: str, *, whole: bool = True) -> Source:
    """Return a source with plain arrays of the kinds that ``Source`` names.

    What means the same is converted: lists and tensors, other widths of numbers, a column of targets (n, 1), and whole
    numbers that are written as floats. What could mean something else is refused.

    Args:
        source: of any loader.
        spec: how it was named, for messages.
        whole: refuse it without test rows or with rows of one class only; a single node's own may be so.

    Raises:
        DataError: in one line, with the array and, where there is one, the row.
    """
    check = _Checks(f"data {spec!r}", source)
    if source.table is not None:
        if not len(source.table.ids):
            raise DataError(f"data {spec!r} has no rows")
        return source
    check.facts()
    train, test = check.rows("x_train", source.x_train), check.rows("x_test", source.x_test)
    if not len(train) or (whole and not len(test)):
        raise DataError(f"data {spec!r} has {len(train)} training and {len(test)} test rows")
    if train.shape[1:] != test.shape[1:]:
        raise DataError(
            f"data {spec!r} has training and test rows of different shapes: {train.shape[1:]} and {test.shape[1:]}"
        )
    y_train, y_test = check.targets("y_train", source.y_train), check.targets("y_test", source.y_test)
    check.length("y_train", y_train, "x_train", train)
    check.length("y_test", y_test, "x_test", test)
    check.classes({"y_train": y_train, "y_test": y_test}, whole=whole)
    ids = None if source.ids is None else check.ids(source.ids)
    if ids is not None:
        check.length("ids", ids, "x_train", train)
    return replace(
        source, x_train=train, y_train=y_train, x_test=test, y_test=y_test, ids=ids,
        outputs=int(source.outputs), scale=float(source.scale),
    )  # fmt: skip


class _Checks:
    """The checks of one source; each raises a DataError that begins with its name."""

    def __init__(self, name: str, source: Source) -> None:
        self._name, self._source = name, source

    def facts(self) -> None:
        """Check what is no array."""
        source = self._source
        if source.kind not in get_args(Kind):
            self._refuse(f"kind = {source.kind!r}: write one of {', '.join(get_args(Kind))}")
        if not isinstance(source.outputs, Integral) or source.outputs < 1:
            self._refuse(f"outputs = {source.outputs!r} must be the number of classes, or 1 for regression")
        if not isinstance(source.scale, Real) or not 0 < source.scale < math.inf:
            self._refuse(f"scale = {source.scale!r} must be a number above 0")
        if not isinstance(source.target_scale, Real) or not 0 < source.target_scale < math.inf:
            self._refuse(f"target_scale = {source.target_scale!r} must be a number above 0")
        if not isinstance(source.target_mean, Real) or not math.isfinite(source.target_mean):
            self._refuse(f"target_mean = {source.target_mean!r} must be a finite number")
        if isinstance(source.remarks, str) or not all(isinstance(remark, str) for remark in source.remarks):
            self._refuse(f"remarks = {str(source.remarks)[:40]!r} must be a tuple of lines")
        if source.task == "classification" and source.outputs < 2:
            self._refuse("outputs = 1 for classification: give the number of classes, at least 2, or task='regression'")
        if source.task == "regression" and source.outputs != 1:
            self._refuse(f"outputs = {source.outputs} for regression, which learns one value: give outputs=1")

    def rows(self, part: str, given: object) -> np.ndarray:
        """Return rows: tokens as integers, images as bytes or float32, features as float32."""
        rows = self._array(part, given)
        tokens = self._source.kind == "tokens"
        if rows.ndim < 2 or not all(rows.shape[1:]):
            self._refuse(f"{part} has shape {rows.shape}; one row each is expected, as (rows, features) or more")
        if self._source.kind == "image" and (rows.ndim != 4 or self._channels_last(rows.shape)):
            self._refuse(f"{part} has shape {rows.shape}; images are (rows, channels, height, width)")
        if rows.dtype.kind not in ("iub" if tokens else "iubf"):
            self._refuse(f"{part} holds {rows.dtype}; {'whole numbers' if tokens else 'numbers'} are expected")
        if tokens:
            return self._tokens(part, rows)
        if self._source.kind == "image" and rows.dtype == np.uint8:
            return np.ascontiguousarray(rows)
        return self._finite(part, rows)

    @staticmethod
    def _channels_last(shape: tuple[int, ...]) -> bool:
        return shape[3] in _CHANNELS and shape[1] not in _CHANNELS and shape[1] == shape[2]

    def _tokens(self, part: str, rows: np.ndarray) -> np.ndarray:
        if rows.size and rows.min() < 0:
            self._refuse(f"{part}, row {self._first(rows < 0)}: a token is below 0")
        if rows.size and rows.max() >= 2**31:
            self._refuse(f"{part}, row {self._first(rows >= 2**31)}: a token is above {2**31 - 1}")
        return np.ascontiguousarray(rows, np.uint8 if rows.dtype.kind == "b" or rows.dtype == np.uint8 else np.int32)

    def targets(self, part: str, given: object) -> np.ndarray:
        """Return classes as int64, values as float32; targets of anyone's own task keep their shape."""
        task, y = self._source.task, self._array(part, given)
        named = task in {"classification", "regression"}
        if y.dtype.kind == "O" and not any(isinstance(value, str) for value in y.flat):
            kind = type(y.flat[0]).__name__ if y.size else "nothing"
            self._refuse(f"{part} holds objects of Python ({kind}); give an array of numbers, one target a row")
        if y.dtype.kind in "USO" and y.size:
            self._refuse(
                f"{part} holds words, such as {str(y.flat[0])[:40]!r}; numbers are expected: "
                "names, codes = numpy.unique(y, return_inverse=True) gives some"
            )
        if y.dtype.kind not in "iubf":
            self._refuse(f"{part} holds {y.dtype}; numbers are expected")
        if named and y.ndim == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if (named and y.ndim != 1) or y.ndim < 1:
            self._refuse(f"{part} has shape {y.shape}; one target a row is expected, (rows,)")
        if task == "regression" or (not named and y.dtype.kind == "f"):
            return self._finite(part, y)
        if y.dtype.kind == "f":
            self._finite(part, y)
            part_of = y != np.round(y)
            if part_of.any():
                row = self._first(part_of)
                self._refuse(f"{part}, row {row}: {y[row]} is no class 0, 1, ...; for values give task='regression'")
        return np.ascontiguousarray(y, np.int64)

    def classes(self, y: dict[str, np.ndarray], *, whole: bool) -> None:
        """Check that classes are 0 to outputs - 1, and that there are two."""
        if self._source.task != "classification":
            return
        both = np.concatenate(list(y.values()))
        least, most, outputs = int(both.min()), int(both.max()), self._source.outputs
        if least == 1 and most == outputs:
            self._refuse(f"classes go from 1 to {outputs}; they begin at 0: give y - 1")
        for part, classes in y.items():
            wrong = (classes < 0) | (classes >= outputs)
            if wrong.any():
                row = self._first(wrong)
                self._refuse(f"{part}, row {row}: class {classes[row]} is not among the {outputs}, 0 to {outputs - 1}")
        train = y["y_train"]
        if whole and (train == train[0]).all():
            rows = "rows" if least == most else "training rows"
            self._refuse(f"all {rows} are of class {train[0]}: there is nothing to tell apart")

    def ids(self, given: object) -> np.ndarray:
        """Return natural ids as integers; words become their places among the sorted words."""
        ids = self._array("ids", given)
        ids = ids[:, 0] if ids.ndim == 2 and ids.shape[1] == 1 else ids
        if ids.ndim != 1 or ids.dtype.kind not in "iubfUS":
            self._refuse(f"ids holds {ids.dtype} of shape {ids.shape}; one number or word a row is expected")
        if ids.dtype.kind == "f":
            self._finite("ids", ids)
        if ids.dtype.kind in "iub":
            return ids.astype(np.int64)
        return np.unique(ids, return_inverse=True)[1].astype(np.int64)

    def length(self, name: str, one: np.ndarray, other_name: str, other: np.ndarray) -> None:
        """Check that two arrays are of one length."""
        if len(one) != len(other):
            self._refuse(f"{name} has {len(one)} rows, {other_name} has {len(other)}; each row needs both")

    def _array(self, part: str, given: object) -> np.ndarray:
        if isinstance(given, np.ma.MaskedArray):
            self._refuse(f"{part} is a masked array: fill its masked values in")
        try:
            found = np.asarray(given)
        except (ValueError, TypeError, RuntimeError) as broken:
            line = " ".join(str(broken).split())[:150]
            self._refuse(f"{part} is no array ({line}): give rows of one length")
        if found.dtype.kind == "O" and part[0] == "x":
            self._refuse(f"{part} holds objects of Python; give an array of numbers, with rows of one length")
        if found.dtype.kind == "f" and found.dtype.itemsize > 8:
            found = found.astype(np.float64)
        return found

    def _finite(self, part: str, values: np.ndarray) -> np.ndarray:
        """Return values as float32 in one piece, after checking that each is a number that fits in."""
        if values.dtype.kind == "f":
            wrong = ~np.isfinite(values) if values.dtype.itemsize <= 4 else ~(np.abs(values) <= _LARGEST)
            if wrong.any():
                row, *at = (int(place) for place in np.argwhere(wrong)[0])
                column = f", column {at[0]}" if len(at) == 1 else f", place {tuple(at)}" if at else ""
                self._refuse(f"{part}, row {row}{column}: {values[row, *at]} is no finite number of single precision")
        return np.ascontiguousarray(values, np.float32)

    @staticmethod
    def _first(wrong: np.ndarray) -> int:
        """Return the first row, from 0, in which something is wrong."""
        return int(np.argwhere(wrong)[0][0])

    def _refuse(self, what: str) -> NoReturn:
        raise DataError(f"{self._name}: {what}")
