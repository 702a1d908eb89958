"""Codec, version 1: Message <-> bytes. No pickle; nothing that arrives is believed before it is checked.

Layout, little endian:

    "SCTR" | version u8 | mask u8 (0 none, 1 known, 2 fresh) | values u8 (0 fp32, 1 fp16, 2 bf16) | 0 u8
    crc32 u32 of all other bytes
    [16 bytes of hash, where the mask is known]
    scalars u16, then each: name (u8 length, UTF-8) | tag u8 | b: u8, i: i64, f: f64, s: u32 length, UTF-8
    tensors u32, then each: name (u16 length, UTF-8) | form u8 | dtype u8 | dims u8 | u32 each | values u64
                            then by form: 0 dense: values;  1 known mask: surviving values;
                            2 fresh mask: bitmap of ceil(n/8) bytes, first entry in the lowest bit, surviving values
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from typing import Literal

import numpy as np
import torch

from secateur.errors import WireError
from secateur.wire.message import Expected, Masks, Message, Scalar, Spec

Values = Literal["fp32", "fp16", "bf16"]

_HEAD = struct.Struct("<4sBBBBI")
_MAGIC = b"SCTR"
_VERSION = 1
_NO_MASK, _KNOWN, _FRESH = 0, 1, 2
_DENSE = 0
_HASH = 16
_MOST_SCALARS = 64
_LONGEST_TEXT = 65536
_LONGEST_NAME = 65535
_VALUES: dict[Values, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_DTYPES = (torch.float32, torch.int64, torch.int32, torch.uint8, torch.bool)
_NUMPY = {torch.int64: "<i8", torch.int32: "<i4", torch.uint8: "u1", torch.bool: "u1", torch.float32: "<f4"}
_TAGS: dict[type, bytes] = {bool: b"b", int: b"i", float: b"f", str: b"s"}


def encode(message: Message, *, values: Values = "fp32", known: Masks | None = None) -> bytes:
    """Return the message as bytes; equal messages give equal bytes.

    A mask that equals ``known`` costs 16 bytes; any other costs a bit for each entry it covers.

    Args:
        message: what to send.
        values: how float32 values travel; fp16 and bf16 round to nearest.
        known: the mask that the receiver holds already.

    Raises:
        WireError: a tensor of another dtype, a mask that does not fit its tensor, a value beyond the chosen
            format, a name or a text that cannot be written.
    """
    form = _NO_MASK if message.mask is None else _KNOWN if _equal(message.mask, known) else _FRESH
    parts: list[bytes] = []
    if message.mask is not None and form == _KNOWN:
        parts.append(_digest(message.mask))
    parts.append(struct.pack("<H", len(message.scalars)))
    parts += [_scalar(name, value) for name, value in message.scalars.items()]
    parts.append(struct.pack("<I", len(message.tensors)))
    masks = message.mask or {}
    stray = [name for name in masks if name not in message.tensors]
    if stray:
        raise WireError(f"mask names {stray[0]!r}, which is not among the tensors")
    for name, tensor in message.tensors.items():
        parts += _tensor(name, tensor, masks.get(name), fresh=form == _FRESH, values=values)
    body = b"".join(parts)
    head = _MAGIC + bytes([_VERSION, form, list(_VALUES).index(values), 0])
    return head + struct.pack("<I", zlib.crc32(body, zlib.crc32(head))) + body


def _scalar(name: str, value: Scalar) -> bytes:
    label = _utf8(name, f"the name of scalar {name!r}")
    tag = _TAGS.get(type(value))
    if tag is None or not 0 < len(label) < 256:
        raise WireError(f"scalar {name!r}: bool, int, float or str under a name of 1 to 255 bytes can be sent")
    if isinstance(value, str):
        text = _utf8(value, f"the text of scalar {name!r}")
        if len(text) > _LONGEST_TEXT:
            raise WireError(f"scalar {name!r}: text of {len(text)} bytes, at most {_LONGEST_TEXT} can be sent")
        data = struct.pack("<I", len(text)) + text
    elif tag == b"i" and not -(2**63) <= value < 2**63:
        raise WireError(f"scalar {name!r} = {value} does not fit 64 bits")
    else:
        data = struct.pack({b"b": "<?", b"i": "<q", b"f": "<d"}[tag], value)
    return bytes([len(label)]) + label + tag + data


def _utf8(text: str, what: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise WireError(f"{what} cannot be written as UTF-8") from None


def _tensor(name: str, tensor: torch.Tensor, mask: torch.Tensor | None, *, fresh: bool, values: Values) -> list[bytes]:
    if tensor.dtype not in _DTYPES:
        raise WireError(f"tensor {name!r} has dtype {tensor.dtype}; float32, int64, int32, uint8, bool can be sent")
    if mask is not None and (mask.shape != tensor.shape or mask.dtype != torch.bool):
        raise WireError(
            f"mask of {name!r} is {mask.dtype} of shape {tuple(mask.shape)}, its tensor {tuple(tensor.shape)}"
        )
    label = _utf8(name, f"the name of tensor {name!r}")
    if len(label) > _LONGEST_NAME:
        raise WireError(f"tensor {name[:40]!r}...: a name of {len(label)} bytes, at most {_LONGEST_NAME} can be sent")
    form = _DENSE if mask is None else _FRESH if fresh else _KNOWN
    sent = (tensor if mask is None else tensor[mask]).detach().cpu().contiguous().reshape(-1)
    head = struct.pack("<H", len(label)) + label + bytes([form, _DTYPES.index(tensor.dtype), tensor.dim()])
    head += struct.pack(f"<{tensor.dim()}IQ", *tensor.shape, sent.numel())
    return [head, _FORMS[form].write(mask), _to_bytes(name, sent, values)]


def _to_bytes(name: str, sent: torch.Tensor, values: Values) -> bytes:
    if sent.dtype != torch.float32:
        return sent.numpy().astype(_NUMPY[sent.dtype], copy=False).tobytes()
    if values == "fp32":
        return sent.numpy().astype("<f4", copy=False).tobytes()
    rounded = sent.to(_VALUES[values])
    if bool((rounded.isinf() & ~sent.isinf()).any()):
        wider = "bf16 or fp32" if values == "fp16" else "fp32"
        raise WireError(f"tensor {name!r} has a value beyond {values}'s range; send it as {wider} (wire.values)")
    return rounded.view(torch.int16).numpy().astype("<i2", copy=False).tobytes()


def _pack(mask: torch.Tensor) -> bytes:
    return np.packbits(mask.reshape(-1).cpu().numpy(), bitorder="little").tobytes()


def _equal(mask: Masks, known: Masks | None) -> bool:
    return (
        known is not None
        and mask.keys() == known.keys()
        and all(mask[name] is known[name] or torch.equal(mask[name], known[name]) for name in mask)
    )


def _digest(mask: Masks) -> bytes:
    running = hashlib.blake2b(digest_size=_HASH)
    for name in sorted(mask):
        running.update(f"{name}{tuple(mask[name].shape)}".encode())
        running.update(_pack(mask[name]))
    return running.digest()


class _Reader:
    """A cursor over untrusted bytes; every read is bounded by what is there."""

    def __init__(self, data: bytes) -> None:
        self.view = memoryview(data)
        self.at = 0

    def take(self, count: int, what: str) -> memoryview:
        if count > len(self.view) - self.at:
            raise WireError(f"payload ends within {what}: {count} bytes wanted, {len(self.view) - self.at} left")
        self.at += count
        return self.view[self.at - count : self.at]

    def numbers(self, form: str, what: str) -> tuple[int, ...]:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form), what))

    def text(self, length: int, what: str) -> str:
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError:
            raise WireError(f"{what} is not UTF-8") from None


def decode(data: bytes, expected: Expected) -> Message:
    """Return the message in ``data``; float values as float32, pruned entries as +0.0.

    Raises:
        WireError: and nothing else, for whatever bytes arrive that are not exactly what ``expected`` says.

    Guarantees:
        Nothing larger than the expected tensors is allocated.
    """
    reader = _Reader(data)
    form, values = _open(reader)
    if form == _KNOWN:
        sent = reader.take(_HASH, "the mask's hash")
        if expected.known is None or bytes(sent) != _digest(expected.known):
            raise WireError("the payload refers to a mask that the receiver does not hold")
    wanted = expected.scalars
    scalars = _read_scalars(reader, _MOST_SCALARS if wanted is None else len(wanted))
    if wanted is not None and {n: type(v) for n, v in scalars.items()} != dict(wanted):
        raise WireError(f"scalars {sorted(scalars)} arrived, expected {sorted(wanted)} with their types")
    (count,) = reader.numbers("I", "the number of tensors")
    if count > len(expected.tensors):
        raise WireError(f"{count} tensors announced, {len(expected.tensors)} expected")
    tensors: dict[str, torch.Tensor] = {}
    masks: dict[str, torch.Tensor] = {}
    for _ in range(count):
        _read_tensor(reader, expected, values, form, tensors, masks)
    if reader.at != len(data):
        raise WireError(f"{len(data) - reader.at} bytes after the last tensor")
    missing = [name for name in expected.tensors if name not in tensors]
    if missing and not expected.optional:
        raise WireError(f"tensor {missing[0]!r} is missing")
    bare = [name for name in (expected.known or {}) if name not in tensors]
    if form == _KNOWN and bare:
        raise WireError(f"the known mask covers {bare[0]!r}, which did not come")
    return Message(tensors, _check_mask(form, masks, expected), scalars)


def _open(reader: _Reader) -> tuple[int, torch.dtype]:
    head = bytes(reader.take(_HEAD.size, "the header"))
    magic, version, form, values, zero, crc = _HEAD.unpack(head)
    if magic != _MAGIC:
        raise WireError("not a secateur payload (wrong first bytes)")
    if version != _VERSION:
        raise WireError(f"payload of wire version {version}, this side speaks {_VERSION}: update the older side")
    if crc != zlib.crc32(reader.view[_HEAD.size :], zlib.crc32(head[:8])):
        raise WireError("payload is damaged (its checksum differs)")
    if form > _FRESH or values >= len(_VALUES) or zero:
        raise WireError("unknown mask form or value format")
    return form, list(_VALUES.values())[values]


def _read_scalars(reader: _Reader, most: int) -> dict[str, Scalar]:
    (count,) = reader.numbers("H", "the number of scalars")
    if count > most:
        raise WireError(f"{count} scalars announced, more than expected")
    scalars: dict[str, Scalar] = {}
    for _ in range(count):
        (length,) = reader.numbers("B", "a scalar's name")
        name = reader.text(length, "a scalar's name")
        tag = bytes(reader.take(1, f"scalar {name!r}"))
        if name in scalars or not name:
            raise WireError(f"scalar {name!r} comes twice" if name else "a scalar comes without a name")
        if tag == b"s":
            (size,) = reader.numbers("I", f"scalar {name!r}")
            if size > _LONGEST_TEXT:
                raise WireError(f"scalar {name!r}: text of {size} bytes, at most {_LONGEST_TEXT} are accepted")
            scalars[name] = reader.text(size, f"scalar {name!r}")
        elif tag in (b"i", b"f"):
            (scalars[name],) = reader.numbers({b"i": "q", b"f": "d"}[tag], f"scalar {name!r}")
        elif tag == b"b":
            (flag,) = reader.numbers("B", f"scalar {name!r}")
            if flag > 1:
                raise WireError(f"scalar {name!r} is no truth value")
            scalars[name] = bool(flag)
        else:
            raise WireError(f"scalar {name!r} is of an unknown type")
    return scalars


def _read_tensor(
    reader: _Reader, expected: Expected, values: torch.dtype, mask_form: int,
    tensors: dict[str, torch.Tensor], masks: dict[str, torch.Tensor],
) -> None:  # fmt: skip
    (length,) = reader.numbers("H", "a tensor's name")
    name = reader.text(length, "a tensor's name")
    spec = expected.tensors.get(name)
    if spec is None or name in tensors:
        raise WireError(f"tensor {name!r} is not expected" if spec is None else f"tensor {name!r} comes twice")
    form, dtype, dims = reader.numbers("BBB", f"tensor {name!r}")
    shape = reader.numbers(f"{dims}I", f"tensor {name!r}")
    if shape != spec.shape or dtype >= len(_DTYPES) or _DTYPES[dtype] != spec.dtype:
        found = _DTYPES[dtype] if dtype < len(_DTYPES) else "unknown dtype"
        raise WireError(f"tensor {name!r}: {found} {shape} arrived, {spec.dtype} {spec.shape} expected")
    covered = mask_form == _KNOWN and name in (expected.known or {})
    if form not in (_DENSE, mask_form) or (covered and form == _DENSE):
        raise WireError(f"tensor {name!r}: its form does not fit the payload's mask")
    (count,) = reader.numbers("Q", f"tensor {name!r}")
    mask = _FORMS[form].read(reader, name, spec, expected)
    if mask_form == _FRESH and expected.within:
        _check_within(name, mask, expected)
    if count != (math.prod(shape) if mask is None else int(mask.sum())):
        raise WireError(f"tensor {name!r}: {count} values announced, its shape and mask say otherwise")
    sent = _read_values(reader, name, count, spec.dtype, values)
    if mask is None:
        tensors[name] = sent.reshape(shape)
    else:
        masks[name] = mask
        tensors[name] = torch.zeros(shape, dtype=spec.dtype)
        tensors[name][mask] = sent


class _Form:
    """How one tensor's mask travels, between the tensor's head and its values; this one: dense, no mask.

    A new form is a subclass and a place in ``_FORMS``, whose index is the form's byte on the wire.
    """

    def write(self, mask: torch.Tensor | None) -> bytes:  # noqa: ARG002 -- for those that have one
        """Return the mask as it travels."""
        return b""

    def size(self, entries: int) -> int:  # noqa: ARG002
        """Return how many bytes of mask there are for a tensor of so many entries."""
        return 0

    def read(self, reader: _Reader, name: str, spec: Spec, expected: Expected) -> torch.Tensor | None:  # noqa: ARG002
        """Return the tensor's mask, checked against what is expected; None: every value travels."""
        return None


class _Known(_Form):
    """The mask that both sides hold; its hash stands once, before the scalars."""

    def read(self, reader: _Reader, name: str, spec: Spec, expected: Expected) -> torch.Tensor | None:  # noqa: ARG002
        mask = (expected.known or {}).get(name)
        if mask is None:
            raise WireError(f"tensor {name!r} comes without the values that the known mask does not cover")
        return mask


class _Fresh(_Form):
    """A bitmap of ceil(n/8) bytes, first entry in the lowest bit, unused bits 0."""

    def write(self, mask: torch.Tensor | None) -> bytes:
        return b"" if mask is None else _pack(mask)

    def size(self, entries: int) -> int:
        return (entries + 7) // 8

    def read(self, reader: _Reader, name: str, spec: Spec, expected: Expected) -> torch.Tensor | None:
        if expected.mask in {"none", "same"} or (expected.maskable is not None and name not in expected.maskable):
            raise WireError(f"tensor {name!r}: no fresh mask is accepted for it")
        count = math.prod(spec.shape)
        packed = np.frombuffer(reader.take(self.size(count), f"the mask of {name!r}"), dtype=np.uint8)
        bits = np.unpackbits(packed, bitorder="little")
        if bits[count:].any():
            raise WireError(f"the mask of {name!r} has bits beyond its tensor")
        return torch.from_numpy(bits[:count].astype(bool)).reshape(spec.shape)


_FORMS = (_Form(), _Known(), _Fresh())


def _check_within(name: str, mask: torch.Tensor | None, expected: Expected) -> None:
    # a tensor that a fresh mask leaves out keeps everything: that is a mask too
    known = (expected.known or {}).get(name)
    if known is not None and bool((~known if mask is None else mask & ~known).any()):
        raise WireError(f"the mask of {name!r} keeps what is pruned already")


def _read_values(reader: _Reader, name: str, count: int, dtype: torch.dtype, values: torch.dtype) -> torch.Tensor:
    travelled = values if dtype == torch.float32 else dtype
    raw = reader.take(count * travelled.itemsize, f"the values of {name!r}")
    if dtype != torch.float32:
        array = np.frombuffer(raw, dtype=_NUMPY[dtype])
        if dtype == torch.bool and (array > 1).any():
            raise WireError(f"tensor {name!r} has values that are no truth values")
        return torch.from_numpy(array.copy()).to(dtype)
    if travelled == torch.float32:
        sent = torch.from_numpy(np.frombuffer(raw, dtype="<f4").astype(np.float32))
    else:
        sent = torch.from_numpy(np.frombuffer(raw, dtype="<i2").astype(np.int16)).view(travelled).float()
    if not bool(sent.isfinite().all()):
        raise WireError(f"tensor {name!r} holds NaN or infinity")
    return sent


def _check_mask(form: int, masks: dict[str, torch.Tensor], expected: Expected) -> Masks | None:
    if form == _NO_MASK:
        if expected.mask in {"required", "same"}:
            raise WireError("a mask is required and none came")
        return None
    if form == _KNOWN:
        if expected.mask == "none":
            raise WireError("a mask came where none is accepted")
        return expected.known
    if expected.mask == "none":
        raise WireError("a mask came where none is accepted")
    if expected.mask == "same":
        raise WireError("another mask came than the one that was sent")
    if expected.mask == "required" and expected.maskable is not None and masks.keys() != expected.maskable:
        raise WireError(f"the mask covers {sorted(masks)}, {sorted(expected.maskable)} must be covered")
    return masks


def part_sizes(data: bytes) -> dict[str, int]:
    """Return how many bytes of a payload are values, mask and framing; they add up to its length.

    Raises:
        WireError: the payload is not one that ``encode`` could have made.
    """
    reader = _Reader(data)
    form, values = _open(reader)
    mask = _HASH if form == _KNOWN else 0
    reader.take(mask, "the mask's hash")
    _read_scalars(reader, 2**16)
    carried = 0
    (count,) = reader.numbers("I", "the number of tensors")
    for _ in range(count):
        (length,) = reader.numbers("H", "a tensor's name")
        reader.take(length, "a tensor's name")
        kind, dtype, dims = reader.numbers("BBB", "a tensor")
        if kind not in (_DENSE, form) or dtype >= len(_DTYPES):
            raise WireError("a tensor is of an unknown form or dtype")
        shape = reader.numbers(f"{dims}I", "a tensor")
        (sent,) = reader.numbers("Q", "a tensor")
        bitmap = _FORMS[kind].size(math.prod(shape))
        travelled = values if _DTYPES[dtype] == torch.float32 else _DTYPES[dtype]
        reader.take(bitmap + sent * travelled.itemsize, "a tensor")
        mask += bitmap
        carried += sent * travelled.itemsize
    if reader.at != len(data):
        raise WireError(f"{len(data) - reader.at} bytes after the last tensor")
    return {"values": carried, "mask": mask, "framing": len(data) - carried - mask}
