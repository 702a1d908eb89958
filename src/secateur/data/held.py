"""Rows that are objects of this process: a study names them as ``memory:DIGEST``, and whoever holds them finds them."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from secateur.data.formats import arrays, table
from secateur.data.formats.arrays import ArrayOptions
from secateur.data.parquet import cells_of
from secateur.data.source import Source
from secateur.data.table_options import TableOptions
from secateur.errors import DataError, need

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


class HeldTables:
    """Data frames, one for each site or one for all, found as arrays are.

    Args:
        frames: tables of pandas by the names of sites.

    Raises:
        DataError: a column holds what Arrow has no type for.
        MissingExtraError: there is no pyarrow.
    """

    def __init__(self, frames: Mapping[str, Any]) -> None:
        arrow = need("pyarrow", extra="tables")
        running, self._tables = hashlib.blake2b(digest_size=8), dict[str, Any]()
        for name, frame in frames.items():
            try:
                made = arrow.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
            except (arrow.ArrowException, TypeError, ValueError) as broken:
                raise DataError(f"frame {name}: {' '.join(str(broken).split())[:200]}") from broken
            self._tables[name] = made
            sink = arrow.BufferOutputStream()
            with arrow.ipc.new_stream(sink, made.schema) as stream:
                stream.write_table(made.combine_chunks())
            running.update(f"{name}\x1f".encode())
            running.update(sink.getvalue())
        self.digest = running.hexdigest()
        _HELD[self.digest] = self

    @property
    def source(self) -> str:
        """Return what a study calls these rows."""
        return f"{NAME}:{self.digest}"

    def load(self, argument: str, seed: int, options: TableOptions) -> Source:
        """Return the rows as a source, in the way of the format ``table``.

        Raises:
            DataError: they cannot be learnt from; the text names frame, row and column.
        """
        del seed
        if not options.target:
            raise DataError("the frames need the name of the column to learn: give target='NAME'")
        cells = [cells_of(made, f"frame {name}", options) for name, made in self._tables.items()]
        return Source.of_table(
            f"{NAME}:{argument}", table.assembled(cells, options, list(self._tables), (), "the frames")
        )


Held = HeldArrays | HeldTables
_HELD: weakref.WeakValueDictionary[str, Held] = weakref.WeakValueDictionary()


def recommended(digest: str) -> Mapping[str, Mapping[str, Any]]:
    """Return the settings that rows recommend where a study does not set them: for frames those of tables."""
    return table.RECOMMENDED if isinstance(_HELD.get(digest), HeldTables) else {}


def find(digest: str) -> Held:
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
