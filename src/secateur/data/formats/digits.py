"""Scikit-learn's handwritten digits."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from secateur.data.hold import hold_out
from secateur.data.sources import Source
from secateur.errors import DataError, need


def load(argument: str, seed: int) -> Source:
    """`digits`: handwritten digits, 1,797 images of 8x8, embedded; a seeded fifth of each class is the test set.

    Reference: Alpaydin and Kaynak, UCI Optical Recognition of Handwritten Digits; via scikit-learn
    """
    if argument:
        raise DataError(f"data 'digits:{argument}': digits are embedded and take no folder; write digits")
    pixels, y = _pixels()
    x = pixels.astype(np.uint8).reshape(-1, 1, 8, 8)
    train, test = hold_out(y, seed)
    return Source("digits", x[train], y[train], x[test], y[test], None, 10, scale=16.0)


def _pixels() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's digits: pixels (1797, 64) from 0 to 16, and classes; int64.

    They are read from scikit-learn's own file, as importing ``sklearn.datasets`` takes a second. It is imported only
    where the file is not in its usual place.
    """
    found = importlib.util.find_spec("sklearn")
    place = Path(found.origin or "").parent / "datasets" / "data" / "digits.csv.gz" if found else Path()
    if place.is_file():
        rows = np.loadtxt(place, delimiter=",", dtype=np.int64)
        return rows[:, :-1], rows[:, -1]
    data = need("sklearn.datasets", package="scikit-learn").load_digits()
    return data.data.astype(np.int64), data.target.astype(np.int64)
