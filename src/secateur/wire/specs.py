"""Names, shapes and dtypes of a message's tensors as bytes: a list, or the hash of one that the receiver has."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from secateur.errors import WireError
from secateur.wire import scalars
from secateur.wire.message import Expected, Spec
from secateur.wire.reader import Reader, varint

DTYPES = (torch.float32, torch.int64, torch.int32, torch.uint8, torch.bool)
_TEMPLATE_HASH = 8
_LONGEST_NAME = 65535


def digest(specs: Mapping[str, Spec]) -> bytes:
    """Return the 8 bytes by which a message names a list of tensors that its receiver has."""
    return hashlib.blake2b(describe(specs), digest_size=_TEMPLATE_HASH).digest()


def describe(specs: Mapping[str, Spec]) -> bytes:
    """Return the count, then for each tensor in the order of names: length of name, name, dtype u8, dims u8, shape.

    Lengths, count and sizes are varints.
    """
    parts = [varint(len(specs))]
    for name in sorted(specs):
        label = scalars.utf8(name, f"the name of tensor {name!r}")
        if len(label) > _LONGEST_NAME:
            raise WireError(
                f"tensor {name[:40]!r}...: a name of {len(label)} bytes, at most {_LONGEST_NAME} can be sent"
            )
        shape = specs[name].shape
        parts += [varint(len(label)), label, bytes([DTYPES.index(specs[name].dtype), len(shape)])]
        parts += map(varint, shape)
    return b"".join(parts)


def read(reader: Reader, expected: Expected, *, by_hash: bool) -> dict[str, Spec]:
    """Return the specs of the tensors that follow, in the order of the wire."""
    if by_hash:
        template = expected.tensors if expected.template is None else expected.template
        if bytes(reader.take(_TEMPLATE_HASH, "the hash of the tensors")) != digest(template):
            raise WireError("the sender's tensors are not those expected (another model, or other shapes)")
        return {name: template[name] for name in sorted(template)}
    count = reader.varint("the number of tensors")
    if count > len(expected.tensors):
        raise WireError(f"{count} tensors announced, {len(expected.tensors)} expected")
    specs: dict[str, Spec] = {}
    for _ in range(count):
        name = reader.text(reader.varint("a tensor's name"), "a tensor's name")
        if name not in expected.tensors or name in specs:
            raise WireError(f"tensor {name!r} comes twice" if name in specs else f"tensor {name!r} is not expected")
        if specs and name < next(reversed(specs)):
            raise WireError(f"tensor {name!r} is out of order")
        specs[name] = _read_spec(reader, name, expected.tensors[name])
    missing = [name for name in expected.tensors if name not in specs]
    if missing and not expected.optional:
        raise WireError(f"tensor {missing[0]!r} is missing")
    return specs


def _read_spec(reader: Reader, name: str, spec: Spec) -> Spec:
    dtype, dims = reader.numbers("BB", f"tensor {name!r}")
    shape = tuple(reader.varint(f"tensor {name!r}") for _ in range(dims))
    if shape != spec.shape or dtype >= len(DTYPES) or DTYPES[dtype] != spec.dtype:
        found = DTYPES[dtype] if dtype < len(DTYPES) else "unknown dtype"
        raise WireError(f"tensor {name!r}: {found} {shape} arrived, {spec.dtype} {spec.shape} expected")
    return spec
