"""Entropy coding of flags: runs of bits as bytes and back, with constriction's ANS coder.

A run of n flags of which k are set is coded with the density p = k/n. Eight flags are one symbol, which saves the coder
most of its work: byte b has probability p^ones(b) (1-p)^(8-ones(b)), the product of independent flags. A model by row
or by byte pattern would save at most 0.3 % on trained masks (docs/wire.md), less than its parameters would cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from secateur.errors import WireError
from secateur.wire.reader import Reader, varint

Flags = NDArray[np.bool_]
AnsCoder = constriction.stream.stack.AnsCoder
Categorical = constriction.stream.model.Categorical

_ZEROS, _ONES, _RAW, _CODED = range(4)
_SET = np.array([byte.bit_count() for byte in range(256)])


def entropy(kept: int, count: int) -> float:
    """Return the least bytes that ``count`` independent flags need, ``kept`` of them set: n H(k/n) / 8.

    >>> entropy(4, 8)
    1.0
    """
    if kept in {0, count}:
        return 0.0
    p = kept / count
    return -count * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8


@dataclass(frozen=True)
class Run:
    """A run of flags, ``kept`` of them set. Its size is known before it is coded.

    ``flags`` may be None if all of them are set or none is.
    """

    flags: Flags | None
    count: int
    kept: int

    @classmethod
    def of(cls, flags: Flags) -> Run:
        """Return the run of these flags, in their order in memory."""
        return cls(flags.reshape(-1), flags.size, int(np.count_nonzero(flags)))

    @property
    def mode(self) -> int:
        """Return the mode with the smallest size."""
        if self.kept == 0:
            return _ZEROS
        if self.kept == self.count:
            return _ONES
        return _CODED if self._coded() < (self.count + 7) // 8 else _RAW

    @property
    def size(self) -> float:
        """Return its size in bytes."""
        return 1 + {_ZEROS: 0.0, _ONES: 0.0, _RAW: (self.count + 7) // 8, _CODED: self._coded()}[self.mode]

    def _coded(self) -> float:
        return entropy(self.kept, self.count) + len(varint(self.kept))

    def packed(self) -> NDArray[np.uint8]:
        """Return the flags as a bitmap, first flag in the lowest bit."""
        return np.packbits(np.zeros(self.count, bool) if self.flags is None else self.flags, bitorder="little")


def _model(kept: int, count: int) -> Any:
    # only products: no libm, whose last bits differ between machines
    p = np.float64(kept) / np.float64(count)
    set_, clear = np.cumprod(np.full(9, p)) / p, np.cumprod(np.full(9, 1 - p)) / (1 - p)
    return Categorical(set_[_SET] * clear[8 - _SET], perfect=False)


def write(heads: Sequence[bytes | Run]) -> bytes:
    """Return runs, with other bytes between them, as one section.

    Layout: length of the heads (varint) | heads | words of the coder (u32 each). A run's head is its mode (u8), then
    by mode 0 all clear and 1 all set: nothing; 2: the bitmap; 3: how many are set (varint), its symbols in the words.
    """
    out = bytearray()
    coded: list[Run] = []
    for head in heads:
        if not isinstance(head, Run):
            out += head
            continue
        out.append(head.mode)
        if head.mode == _RAW:
            out += head.packed().tobytes()
        elif head.mode == _CODED:
            out += varint(head.kept)
            coded.append(head)
    coder = AnsCoder()
    for run in reversed(coded):  # a stack: what is read first goes in last
        coder.encode_reverse(run.packed().astype(np.int32), _model(run.kept, run.count))
    words: NDArray[np.uint32] = coder.get_compressed()
    return varint(len(out)) + bytes(out) + words.astype("<u4").tobytes()


class RunReader:
    """Reads a section that ``write`` wrote; ``heads`` is a cursor over the bytes between the runs.

    Raises:
        WireError: from the constructor, ``run`` and ``end``, for anything that ``write`` would not write.
    """

    def __init__(self, section: memoryview, what: str) -> None:
        cursor = Reader(section)
        self.what = what
        self.heads = Reader(cursor.take(cursor.varint(what), what))
        words = cursor.take(cursor.left, what)
        if len(words) % 4:
            raise WireError(f"{what}: the coded part is no whole number of words")
        try:
            self._coder = AnsCoder(np.frombuffer(words, dtype="<u4").astype(np.uint32))
        except ValueError:
            raise WireError(f"{what}: the coded part ends in an empty word") from None

    def run(self, count: int) -> Flags:
        """Return the next run, of ``count`` flags; it allocates no more than these."""
        mode = self.heads.byte(self.what)
        if mode == _ZEROS:
            return np.zeros(count, bool)
        if mode == _ONES:
            return np.ones(count, bool)
        size = (count + 7) // 8
        if mode == _RAW:
            return self._unpack(np.frombuffer(self.heads.take(size, self.what), np.uint8), count)
        if mode != _CODED:
            raise WireError(f"{self.what}: unknown mode {mode}")
        kept = self.heads.varint(self.what)
        if not 0 < kept < count:
            raise WireError(f"{self.what}: {kept} of {count} flags announced")
        symbols = self._coder.decode(_model(kept, count), size)
        flags = self._unpack(symbols.astype(np.uint8), count)
        if np.count_nonzero(flags) != kept:
            raise WireError(f"{self.what}: {kept} flags announced, others came")
        return flags

    def _unpack(self, packed: NDArray[np.uint8], count: int) -> Flags:
        bits = np.unpackbits(packed, bitorder="little").view(np.bool_)
        if bits[count:].any():
            raise WireError(f"{self.what}: bits beyond its tensor are set")
        return bits[:count]

    def end(self) -> None:
        """Check that nothing is left over."""
        if self.heads.left or not self._coder.is_empty():
            raise WireError(f"{self.what}: bytes are left over")
