"""Rows that are objects of this process: a study names them as ``memory:DIGEST``, and whoever holds them finds them."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping

import numpy as np

from secateur.data.formats import arrays
from secateur.data.formats.arrays import ArrayOptions
from secateur.data.source import Source
from secateur.errors import DataError

NAME = "memory"


class HeldArrays:
    """Arrays that are found by their digest for as long as somebody keeps this object.

    Args:
        held: ``x`` and ``y``, or ``x_train``, ``y_train``, ``x_test`` and ``y_test``, and perhaps ``ids``, as a file of
            the format ``arrays`` has them.
        remarks: what a reader of the results should know of them, one line each.
    """

    def __init__(self, held: Mapping[str, np.ndarray], remarks: tuple[str, ...] = ()) -> None:
        running = hashlib.blake2b(digest_size=8)
        for name, array in sorted(held.items()):
            running.update(f"{name} {array.dtype} {array.shape}".encode())
            running.update(np.ascontiguousarray(array).tobytes())
        self.digest, self._held, self._remarks = running.hexdigest(), dict(held), remarks
        _HELD[self.digest] = self

    @property
    def source(self) -> str:
        """Return what a study calls these rows."""
        return f"{NAME}:{self.digest}"

    @property
    def rows(self) -> np.ndarray:
        """Return the inputs that clients learn from, and perhaps test rows among them."""
        return self._held["x_train"] if "x_train" in self._held else self._held["x"]

    def load(self, argument: str, seed: int, options: ArrayOptions) -> Source:
        """Return the rows as a source, in the way of the format ``arrays``.

        Raises:
            DataError: they cannot be learnt from.
        """
        return arrays.made(self._held, "the data", f"{NAME}:{argument}", seed, options, self._remarks)


_HELD: weakref.WeakValueDictionary[str, HeldArrays] = weakref.WeakValueDictionary()


def find(digest: str) -> HeldArrays:
    """Return the rows of a digest.

    Raises:
        DataError: this process does not hold them.
    """
    held = _HELD.get(digest)
    if held is None:
        raise DataError(
            f"data '{NAME}:{digest}' were objects of the Python process that began this run: "
            "call secateur.run(..., out=FOLDER) again with the same objects"
        )
    return held
