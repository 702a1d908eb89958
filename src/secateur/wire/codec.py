"""The codec, version 2: messages as bytes, and back. It uses no pickle, and checks everything that arrives.

``docs/wire.md`` has the layout, byte for byte. In short, a payload has these parts: a header with a checksum and the
sizes of the others; tensors that are named by their digest (``known.py``); the scalars; the names of the tensors, or a
hash if the receiver knows them; the mask (``masks.py``); the surviving values (``values.py``). Tensors are in the order
of their names.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.errors import MaskNotHeldError, TensorsNotHeldError, WireError
from secateur.wire import masks, scalars, values
from secateur.wire import specs as listing
from secateur.wire.head import (
    BY_HASH,
    CHANGE,
    CRC_AT,
    FRESH,
    HEAD,
    KNOWING,
    KNOWN,
    LACKING,
    LOST,
    MESSAGE,
    NO_MASK,
    WANTS,
    Head,
    context_of,
    opened,
    past_known,
    seal,
)
from secateur.wire.known import Known
from secateur.wire.message import Expected, Masks, Message, Scalar, Spec, specs_of
from secateur.wire.reader import Reader
from secateur.wire.values import FORMATS, Values
from secateur.wire.written import Written, check_message

_MOST_SCALARS = 64
_BLOCK = 1 << 20
_NUMPY = {torch.float32: "<f4", torch.int64: "<i8", torch.int32: "<i4", torch.uint8: "u1", torch.bool: "u1"}


class Outgoing:
    """A message to several receivers: its values are encoded once, its mask for each receiver's known mask.

    Args:
        message: the message.
        values: the format of float32 values; see ``values.FORMATS``.
        template: names, shapes and dtypes that every receiver expects; a message of exactly these is sent without their
            names. None: names are always sent.
        context: the request that the message answers, see ``context_of``; 0: none.
        seed: the seed of stochastic rounding (int8).
        packs: whether values that shrink are packed.

    Raises:
        WireError: a tensor of another dtype, a mask that does not fit its tensor, a value beyond the chosen
            format, a name or a text that cannot be written.
    """

    def __init__(
        self, message: Message, *, values: Values = "fp32", template: Mapping[str, Spec] | None = None,
        context: int = 0, seed: int = 0, packs: bool = True,
    ) -> None:  # fmt: skip
        self._message, self._mask = message, message.mask
        self._names = sorted(message.tensors)
        self._format = FORMATS.index(values)
        self._context = context
        check_message(message)
        specs = specs_of(message.tensors)
        self._by_hash = template is not None and specs == dict(template)
        self._opening = scalars.write(message.scalars) + (
            listing.digest(specs) if self._by_hash else listing.describe(specs)
        )
        self._values, self._finite = _write_values(message, self._names, values, seed, packs=packs)

    def bytes(self, known: Masks | None = None, group: Known | None = None) -> bytes:
        """Return the payload for a receiver that holds the mask ``known``, in one piece; see ``write``."""
        return self.write(known, group).bytes()

    def write(self, known: Masks | None = None, group: Known | None = None) -> Written:
        """Return the payload for a receiver that holds the mask ``known``; equal messages give equal bytes.

        Args:
            known: the mask; None: it holds none.
            group: the group of tensors that the payload names, and may carry; None: none.
        """
        mask, form, name = b"", NO_MASK, b""
        if self._mask is not None and masks.same(self._mask, known):
            form, name = KNOWN, masks.digest(self._mask)
        elif self._mask is not None:
            mask, changes = masks.write(self._mask, self._names, known)
            form = CHANGE if changes else FRESH
            name = masks.digest(known or {}) if changes else b""
        form |= (BY_HASH if self._by_hash else 0) | (KNOWING if group else 0)
        named = group.write() if group else b""
        masked, size = len(name) + len(mask), sum(map(len, self._values))
        body = [name, named, self._opening, mask, *self._values]
        buffers = seal(MESSAGE, self._format, form, self._context, masked, size, body=body)
        sizes = {"values": size, "mask": masked} | ({"base": group.size} if group else {})
        sizes["framing"] = sum(map(len, buffers)) - sum(sizes.values())
        return Written(self._message, buffers, sizes, form & ~(BY_HASH | KNOWING) == KNOWN, self._finite)


def encode(
    message: Message, *, values: Values = "fp32", known: Masks | None = None,
    template: Mapping[str, Spec] | None = None, context: int = 0, seed: int = 0, group: Known | None = None,
) -> bytes:  # fmt: skip
    """Return the message as bytes, for a receiver that holds the mask ``known``; see ``Outgoing``."""
    return Outgoing(message, values=values, template=template, context=context, seed=seed).bytes(known, group)


def lost(request: bytes, *, tensors: bool = False) -> bytes:
    """Return the reply to a request that refers to what this side does not hold.

    Args:
        request: the request.
        tensors: this side lacks the tensors that are named by their digest, and perhaps the mask too; False: it lacks
            the mask only.
    """
    return b"".join(seal(LACKING if tensors else LOST, 0, NO_MASK, context_of(request), 0, 0, body=[]))


def known_in(data: bytes) -> Known | None:
    """Return the group of tensors that a payload names; None where it names none. No checksum is looked at.

    Raises:
        WireError: the payload is none of this version, or ends within the group.
    """
    reader = Reader(data)
    return past_known(reader, opened(reader, verify=False))


def scalars_in(data: bytes) -> dict[str, Scalar]:
    """Return the scalars of a payload, before anything else of it is read. No checksum is looked at.

    Raises:
        WireError: the payload is none of this version, or ends within the scalars.
    """
    reader = Reader(data)
    past_known(reader, opened(reader, verify=False))
    return scalars.read(reader, _MOST_SCALARS)


def with_scalar(data: bytes, name: str, value: float) -> bytes:
    """Return a payload with another value of one of its float scalars; nothing else is encoded again.

    A sender can so include a value that it knows only once the payload is written, such as the time that this took.

    Raises:
        WireError: there is no such float scalar.
    """
    reader = Reader(data)
    head = opened(reader, verify=False)
    past_known(reader, head)
    at = scalars.place(reader, name)
    parts: list[bytes | memoryview] = [data[CRC_AT + 4 : at], struct.pack("<d", value), memoryview(data)[at + 8 :]]
    crc = zlib.crc32(data[:CRC_AT])
    for part in parts:
        crc = zlib.crc32(part, crc)
    return b"".join([data[:CRC_AT], struct.pack("<I", crc), *parts])


def is_lost(data: bytes, context: int, *, tensors: bool = False) -> bool:
    """Return whether a reply is what ``lost`` writes; ``context`` as in ``Expected``."""
    if len(data) != HEAD.size:
        return False
    try:
        head = opened(Reader(data))
    except WireError:
        return False
    return head.kind == (LACKING if tensors else LOST) and head.context == context


def _write_values(
    message: Message, names: list[str], fmt: Values, seed: int, *, packs: bool
) -> tuple[list[bytes | memoryview], bool]:
    """Return the surviving values of float32 tensors, then the raw values of all others, each in the order of names.

    The second is whether all float values are finite.
    """
    floats, others = [], []
    for name in names:
        sent = _surviving(message.tensors[name], (message.mask or {}).get(name))
        if sent.dtype == np.float32:
            floats.append(values.Part(name, message.tensors[name].dim(), sent))
        else:
            others.append(sent.astype(_NUMPY[message.tensors[name].dtype], copy=False).tobytes())
    written = values.write(floats, fmt, seed, packs=packs)
    return [*written.buffers, *others], written.finite


def _surviving(tensor: torch.Tensor, mask: torch.Tensor | None) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().contiguous().numpy()
    flat = array.reshape(-1)
    if mask is None:
        return flat
    flags = masks.flags(mask).reshape(-1)
    out = np.empty(np.count_nonzero(flags), flat.dtype)
    for block, place in _blocks(flags):
        np.compress(flags[block], flat[block], out=out[place])
    return out


def _blocks(flags: NDArray[np.bool_]) -> Iterator[tuple[slice, slice]]:
    """Iterate (stretch of a tensor, its surviving values); indices never cover more than one stretch."""
    at = 0
    for start in range(0, flags.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        kept = int(np.count_nonzero(flags[block]))
        yield block, slice(at, at + kept)
        at += kept


def decode(data: bytes | memoryview, expected: Expected) -> Message:
    """Return the message in ``data``; float values as float32, pruned entries as +0.0.

    Raises:
        WireError: the bytes are not exactly what ``expected`` says; no bytes raise anything else. If only the mask, or
            the group of tensors, that they refer to is missing, it is the subclass ``MaskNotHeldError``, or
            ``TensorsNotHeldError``. A group that they carry is not looked at: see ``carried.read``.

    Guarantees:
        Time and memory are bounded by the expected tensors, whatever the bytes announce.
    """
    reader = Reader(data)
    head = opened(reader)
    if head.kind != MESSAGE:
        raise WireError(f"the sender asks for {WANTS[head.kind]}, here where nothing was referred to")
    if expected.context is not None and head.context != expected.context:
        raise WireError("the payload answers another request than the one that was sent")
    if expected.values is not None and head.values != expected.values:
        raise WireError(f"values come as {head.values}, and were asked for as {expected.values}")
    if head.form in {KNOWN, CHANGE}:
        sent = reader.take(masks.HASH, "the mask's hash")
        if expected.known is None or bytes(sent) != masks.digest(expected.known):
            raise MaskNotHeldError("the payload refers to a mask that the receiver does not hold")
    group = Known.read(reader) if head.knowing else None
    if group is not None and group.digest not in expected.holds:
        raise TensorsNotHeldError(f"the payload names tensors {group.digest}, which the receiver does not hold")
    wanted = expected.scalars
    numbers = scalars.read(reader, _MOST_SCALARS if wanted is None else len(wanted))
    if wanted is not None and {n: type(v) for n, v in numbers.items()} != dict(wanted):
        raise WireError(f"scalars {sorted(numbers)} arrived, expected {sorted(wanted)} with their types")
    specs = listing.read(reader, expected, by_hash=head.by_hash)
    mask = _read_mask(reader, head, specs, expected)
    tensors = _read_values(reader, head, specs, mask or {}, expected.infinite)
    if reader.left:
        raise WireError(f"{reader.left} bytes after the last value")
    return Message({name: tensors[name] for name in expected.tensors if name in tensors}, mask, numbers)


def read_back(payload: bytes | memoryview | Written, expected: Expected) -> Message:
    """Return what ``decode`` returns; what was written on this very side is not read where it comes back as it is.

    Raises:
        WireError: as ``decode``.
    """
    if not isinstance(payload, Written):
        return decode(payload, expected)
    written = payload.message
    if not _comes_back(payload, expected):
        if not payload.buffers:
            raise WireError("the reply is not what was asked for, and was not written: wire.count=encoded says more")
        return decode(payload.bytes(), expected)
    mask = expected.known if payload.known else None
    tensors = {}
    for name in expected.tensors:
        kept, tensor = (mask or {}).get(name), written.tensors[name].detach()
        tensors[name] = tensor if kept is None else torch.where(kept, tensor, torch.zeros((), dtype=tensor.dtype))
    return Message(tensors, mask, written.scalars)


def _comes_back(payload: Written, expected: Expected) -> bool:
    """Return whether decoding a payload gives the message that it was made of, in the same order."""
    written = payload.message
    if expected.values not in {None, "fp32"} or not payload.finite or "base" in payload.sizes:
        return False
    masked = written.mask is not None
    if masked != payload.known or expected.mask in ({"none"} if masked else {"required", "same"}):
        return False
    kinds = {name: type(value) for name, value in written.scalars.items()}
    fits = expected.scalars is not None and kinds == dict(expected.scalars)
    return fits and specs_of(written.tensors) == dict(expected.tensors)


def _read_mask(reader: Reader, head: Head, specs: Mapping[str, Spec], expected: Expected) -> Masks | None:
    size = head.mask_size - (masks.HASH if head.form in {KNOWN, CHANGE} else 0)
    if size < 0 or (size and head.form in {NO_MASK, KNOWN}):
        raise WireError(f"a mask of {head.mask_size} bytes does not fit its form")
    if head.form == NO_MASK:
        if expected.mask in {"required", "same"}:
            raise WireError("a mask is required and none came")
        return None
    if expected.mask == "none":
        raise WireError("a mask came where none is accepted")
    if head.form == KNOWN:
        bare = [name for name in expected.known or {} if name not in specs]
        if bare:
            raise WireError(f"the known mask covers {bare[0]!r}, which did not come")
        return expected.known
    if expected.mask == "same":
        raise WireError("another mask came than the one that was sent")
    section = reader.take(size, "the mask")
    mask = masks.read(section, specs, expected.known, changes=head.form == CHANGE)
    _check_mask(mask, specs, expected)
    return {name: mask[name] for name in expected.tensors if name in mask}


def _check_mask(mask: Masks, specs: Mapping[str, Spec], expected: Expected) -> None:
    if expected.maskable is not None:
        stray = [name for name in mask if name not in expected.maskable]
        if stray:
            raise WireError(f"tensor {stray[0]!r}: no mask is accepted for it")
        if expected.mask == "required" and mask.keys() != expected.maskable:
            raise WireError(f"the mask covers {sorted(mask)}, {sorted(expected.maskable)} must be covered")
    for name in specs if expected.within else ():
        # a tensor that a mask leaves out keeps everything: that is a mask too
        known = (expected.known or {}).get(name)
        if known is not None and bool((~known if name not in mask else mask[name] & ~known).any()):
            raise WireError(f"the mask of {name!r} keeps what is pruned already")


def _read_values(
    reader: Reader, head: Head, specs: Mapping[str, Spec], mask: Masks, infinite: frozenset[str]
) -> dict[str, torch.Tensor]:
    if reader.left != head.values_size:
        raise WireError(f"{head.values_size} bytes of values announced, {reader.left} are there")
    flat = {name: None if name not in mask else masks.flags(mask[name]) for name in specs}
    counts = {n: specs[n].size if f is None else int(np.count_nonzero(f)) for n, f in flat.items()}
    floats = [name for name in specs if specs[name].dtype == torch.float32]
    dims, unbounded = [len(specs[n].shape) for n in floats], [n in infinite for n in floats]
    parts = values.read(reader, [counts[n] for n in floats], dims, head.values, unbounded)
    arrays: dict[str, NDArray[np.generic]] = dict(zip(floats, parts, strict=True))
    tensors = {}
    for name, spec in specs.items():
        array = arrays[name] if name in arrays else _read_other(reader, name, counts[name], spec.dtype)
        tensors[name] = _spread(array, flat[name], spec)
    return tensors


def _read_other(reader: Reader, name: str, count: int, dtype: torch.dtype) -> NDArray[np.generic]:
    stored = np.dtype(_NUMPY[dtype])
    array = np.frombuffer(reader.take(count * stored.itemsize, f"the values of {name!r}"), stored)
    if dtype == torch.bool:
        if (array > 1).any():
            raise WireError(f"tensor {name!r} has values that are no truth values")
        return array.view(np.bool_)
    return array.astype(stored.newbyteorder("="), copy=False)


def _spread(array: NDArray[np.generic], mask: NDArray[np.bool_] | None, spec: Spec) -> torch.Tensor:
    """Return the dense tensor; it owns its memory, so that it is writable and the payload can be freed."""
    if mask is None:
        return torch.from_numpy(np.array(array).reshape(spec.shape))
    full, flags = np.zeros(spec.size, array.dtype), mask.reshape(-1)
    for block, place in _blocks(flags):
        part, kept = flags[block], array[place]
        if 4 * kept.size > part.size:  # each way is up to three times as fast on its side of this
            full[block][np.flatnonzero(part)] = kept
        elif kept.size:
            np.place(full[block], part, kept)
    return torch.from_numpy(full.reshape(spec.shape))


def part_sizes(data: bytes, *, checked: bool = False) -> dict[str, int]:
    """Return how many bytes of a payload are values, mask, framing and, where tensors are named, ``base``.

    They add up to its length; ``base`` counts the digest of known tensors, and the tensors where they are carried.

    Args:
        data: the payload.
        checked: the checksum is known to be right, because the payload was encoded here or has been decoded.

    Raises:
        WireError: the payload is damaged, or announces more than it has.
    """
    reader = Reader(data)
    head = opened(reader, verify=not checked)
    group = past_known(reader, head) if head.knowing else None
    parts = {"values": head.values_size, "mask": head.mask_size} | ({"base": group.size} if group else {})
    framing = len(data) - sum(parts.values())
    if framing < HEAD.size:
        raise WireError("the payload announces more than it has")
    return {**parts, "framing": framing}
