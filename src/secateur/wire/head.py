"""The head of a payload: what it is, its checksum, and the sizes of its parts."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from secateur.errors import WireError
from secateur.wire import masks
from secateur.wire.known import Known
from secateur.wire.reader import Reader
from secateur.wire.values import FORMATS, Values

HEAD = struct.Struct("<4sBBBBIIIQ")
CRC_AT = 8
MAGIC = b"SCTR"
VERSION = 2
MESSAGE, LOST, LACKING = range(3)
WANTS = {LOST: "the full mask", LACKING: "tensors that were named"}
NO_MASK, KNOWN, FRESH, CHANGE = range(4)
BY_HASH = 4  # added to the mask's form where the tensors are named by their hash
KNOWING = 8  # added to the mask's form where a group of known tensors is named


@dataclass(frozen=True)
class Head:
    """A payload's head.

    Attributes:
        kind: ``MESSAGE``, or what its sender lacks.
        form: the form of the mask.
        by_hash: whether the tensors are named by their hash.
        knowing: whether a group of known tensors is named.
        values: the format of float values.
        context: the request that the message answers.
        mask_size, values_size: the bytes of these parts.
    """

    kind: int
    form: int
    by_hash: bool
    knowing: bool
    values: Values
    context: int
    mask_size: int
    values_size: int


def seal(
    kind: int, fmt: int, form: int, context: int, mask: int, vals: int, *, body: list[bytes | memoryview]
) -> list[bytes | memoryview]:
    """Return a head with the checksum of it and of the parts that follow it, and these parts."""
    fields = (MAGIC, VERSION, kind, form, fmt)
    rest = struct.pack("<IIQ", context, mask, vals)
    crc = zlib.crc32(rest, zlib.crc32(struct.pack("<4sBBBB", *fields)))
    for part in body:
        crc = zlib.crc32(part, crc)
    return [HEAD.pack(*fields, crc, context, mask, vals), *body]


def opened(reader: Reader, *, verify: bool = True) -> Head:
    """Read a payload's head.

    Args:
        reader: the payload, at its first byte.
        verify: compare the checksum.

    Raises:
        WireError: it is no payload of this version, or it is damaged.
    """
    head = bytes(reader.take(HEAD.size, "the header"))
    magic, version, kind, form, fmt, crc, context, mask, vals = HEAD.unpack(head)
    if magic != MAGIC:
        raise WireError("not a secateur payload (wrong first bytes)")
    if version != VERSION:
        raise WireError(f"payload of wire version {version}, this side speaks {VERSION}: update the older side")
    opening = zlib.crc32(head[CRC_AT + 4 :], zlib.crc32(head[:CRC_AT]))
    if verify and crc != zlib.crc32(reader.view[HEAD.size :], opening):
        raise WireError("payload is damaged (its checksum differs)")
    plain = form & ~(BY_HASH | KNOWING)
    if kind > LACKING or plain > CHANGE or fmt >= len(FORMATS):
        raise WireError("unknown kind of payload, mask form or value format")
    return Head(kind, plain, bool(form & BY_HASH), bool(form & KNOWING), FORMATS[fmt], context, mask, vals)


def past_known(reader: Reader, head: Head) -> Known | None:
    """Read on to the scalars; return the group of tensors that is named on the way."""
    if head.form in {KNOWN, CHANGE}:
        reader.take(masks.HASH, "the mask's hash")
    return Known.read(reader) if head.knowing else None


def context_of(request: bytes) -> int:
    """Return the number that binds a reply to this request: its checksum, or 0 without a checksum."""
    return struct.unpack_from("<I", request, CRC_AT)[0] if len(request) >= HEAD.size else 0
