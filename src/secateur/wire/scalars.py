"""Scalars as bytes: name, type, value. The size of a number does not depend on its value."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from secateur.errors import WireError
from secateur.wire.message import Scalar
from secateur.wire.reader import Reader

_LONGEST_TEXT = 65536
_TAGS: dict[type, bytes] = {bool: b"b", int: b"i", float: b"f", str: b"s"}


def write(scalars: Mapping[str, Scalar]) -> bytes:
    """Return count u16, then each: name (u8 length, UTF-8) | tag u8 | b: u8, i: i64, f: f64, s: u32 length, UTF-8.

    Raises:
        WireError: a scalar of another type, or one that does not fit.
    """
    return b"".join([struct.pack("<H", len(scalars)), *(_write(name, value) for name, value in scalars.items())])


def _write(name: str, value: Scalar) -> bytes:
    label = utf8(name, f"the name of scalar {name!r}")
    tag = _TAGS.get(type(value))
    if tag is None or not 0 < len(label) < 256:
        raise WireError(f"scalar {name!r}: bool, int, float or str under a name of 1 to 255 bytes can be sent")
    if isinstance(value, str):
        text = utf8(value, f"the text of scalar {name!r}")
        if len(text) > _LONGEST_TEXT:
            raise WireError(f"scalar {name!r}: text of {len(text)} bytes, at most {_LONGEST_TEXT} can be sent")
        data = struct.pack("<I", len(text)) + text
    elif tag == b"i" and not -(2**63) <= value < 2**63:
        raise WireError(f"scalar {name!r} = {value} does not fit 64 bits")
    else:
        data = struct.pack({b"b": "<?", b"i": "<q", b"f": "<d"}[tag], value)
    return bytes([len(label)]) + label + tag + data


def utf8(text: str, what: str) -> bytes:
    """Return text as UTF-8.

    Raises:
        WireError: it holds a character that UTF-8 does not encode.
    """
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise WireError(f"{what} cannot be written as UTF-8") from None


def read(reader: Reader, most: int) -> dict[str, Scalar]:
    """Return at most ``most`` scalars.

    Raises:
        WireError: there are more, or they are not what ``write`` writes.
    """
    (count,) = reader.numbers("H", "the number of scalars")
    if count > most:
        raise WireError(f"{count} scalars announced, more than expected")
    scalars: dict[str, Scalar] = {}
    for _ in range(count):
        name = reader.text(reader.byte("a scalar's name"), "a scalar's name")
        if name in scalars or not name:
            raise WireError(f"scalar {name!r} comes twice" if name else "a scalar comes without a name")
        scalars[name] = _read(reader, name)
    return scalars


def place(reader: Reader, name: str) -> int:
    """Return the offset of a float scalar's value; the reader goes over the scalars before it.

    Raises:
        WireError: there is none of this name.
    """
    (count,) = reader.numbers("H", "the number of scalars")
    for _ in range(count):
        found = reader.text(reader.byte("a scalar's name"), "a scalar's name")
        tag = bytes(reader.view[reader.at : reader.at + 1])
        if found == name and tag == b"f":
            return reader.at + 1
        _read(reader, found)
    raise WireError(f"there is no float scalar {name!r}")


def _read(reader: Reader, name: str) -> Scalar:
    tag = bytes(reader.take(1, f"scalar {name!r}"))
    if tag == b"s":
        (size,) = reader.numbers("I", f"scalar {name!r}")
        if size > _LONGEST_TEXT:
            raise WireError(f"scalar {name!r}: text of {size} bytes, at most {_LONGEST_TEXT} are accepted")
        return reader.text(size, f"scalar {name!r}")
    if tag in (b"i", b"f"):
        return reader.numbers({b"i": "q", b"f": "d"}[tag], f"scalar {name!r}")[0]
    if tag != b"b":
        raise WireError(f"scalar {name!r} is of an unknown type")
    flag = reader.byte(f"scalar {name!r}")
    if flag > 1:
        raise WireError(f"scalar {name!r} is no truth value")
    return bool(flag)
