"""Data that other packages bring with them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from secateur.errors import need

NAMES = frozenset({"digits", "communities"})
"""The sources that need no file."""


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's digits: pixels (1797, 64) from 0 to 16, and classes; int64.

    Its table is read where it lies: importing ``sklearn.datasets`` takes a second, which everyone's first look at this
    package would wait for. Where a version keeps it elsewhere, scikit-learn is asked.
    """
    found = importlib.util.find_spec("sklearn")
    place = Path(found.origin or "").parent / "datasets" / "data" / "digits.csv.gz" if found else Path()
    if place.is_file():
        rows = np.loadtxt(place, delimiter=",", dtype=np.int64)
        return rows[:, :-1], rows[:, -1]
    data = need("sklearn.datasets", package="scikit-learn").load_digits()
    return data.data.astype(np.int64), data.target.astype(np.int64)
