"""A cursor over untrusted bytes, and the encodings that all sections share."""

from __future__ import annotations

import struct

from secateur.errors import WireError

_LONGEST_VARINT = 9  # 63 bits: no length or count of ours is longer


def varint(number: int) -> bytes:
    """Return a number of at most 63 bits as LEB128: 7 bits a byte, lowest first, top bit set on all but the last.

    >>> varint(300).hex()
    'ac02'
    """
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


class Reader:
    """A cursor that reads forward, and never beyond the bytes that it has.

    Raises:
        WireError: from every method, if the bytes end too early or are malformed.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self.view = memoryview(data)
        self.at = 0

    @property
    def left(self) -> int:
        """Return how many bytes are left."""
        return len(self.view) - self.at

    def take(self, count: int, what: str) -> memoryview:
        """Return the next ``count`` bytes, not copied."""
        if count > self.left:
            raise WireError(f"payload ends within {what}: {count} bytes wanted, {self.left} left")
        self.at += count
        return self.view[self.at - count : self.at]

    def numbers(self, form: str, what: str) -> tuple[int, ...]:
        """Return little-endian numbers by a ``struct`` format."""
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form), what))

    def byte(self, what: str) -> int:
        """Return one byte."""
        return self.take(1, what)[0]

    def varint(self, what: str) -> int:
        """Return a number that ``varint`` wrote; only the shortest form is accepted."""
        number = 0
        for place in range(_LONGEST_VARINT):
            byte = self.byte(what)
            number |= (byte & 0x7F) << (7 * place)
            if byte < 0x80:
                if place and not byte:
                    break
                return number
        raise WireError(f"{what}: a number is not written in its shortest form of at most 63 bits")

    def text(self, length: int, what: str) -> str:
        """Return UTF-8 text of ``length`` bytes."""
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError:
            raise WireError(f"{what} is not UTF-8") from None
