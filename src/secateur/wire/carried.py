"""Carried tensors: a group that a message names by its digest, written for a receiver that lacks it, and read.

A group is a payload of its own (fp32, tensors by name, no mask, no scalars). Tensors of dtypes that messages do not
have, such as frozen bfloat16 weights, travel as the bytes that they are in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property

import torch

from secateur.errors import WireError
from secateur.wire import known
from secateur.wire.codec import decode, encode
from secateur.wire.known import Known
from secateur.wire.message import Expected, Message, Spec, Tensors
from secateur.wire.specs import DTYPES


class Group:
    """The sender's end of a group of tensors: its digest, and its bytes, which are written when first asked for.

    Args:
        tensors: by name, of any dtype; without any, messages do not name the group.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self.digest = known.digest(tensors)

    @cached_property
    def _bytes(self) -> bytes:
        return write(self._tensors)

    def named(self, *, carried: bool) -> Known | None:
        """Return what a message says of the group; None of an empty one."""
        return Known(self.digest, self._bytes if carried else b"") if self.digest else None


def write(tensors: Tensors) -> bytes:
    """Return tensors as bytes, without loss."""
    return encode(Message({name: _stored(tensor) for name, tensor in tensors.items()}))


def read(given: Known, specs: Mapping[str, Spec], infinite: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """Return the tensors that a message carries.

    Args:
        given: what the message carries, and the digest that it must have.
        specs: exactly the tensors that are expected.
        infinite: names of tensors that may hold infinities.

    Raises:
        WireError: they are not those expected, hold NaN or infinity, or have another digest.

    Guarantees:
        Time and memory are bounded by ``specs``, whatever the bytes announce.
    """
    expected = Expected(
        {name: _as_stored(spec) for name, spec in specs.items()},
        scalars={}, values="fp32", context=0, infinite=frozenset(infinite),
    )  # fmt: skip
    arrived = decode(given.carried, expected).tensors
    tensors = {name: _restored(arrived[name], spec) for name, spec in specs.items()}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        if bool(tensor.isnan().any()) or (name not in infinite and bool(tensor.isinf().any())):
            raise WireError(f"tensor {name!r} holds NaN or infinity")
    found = known.digest(tensors)
    if found != given.digest:
        raise WireError(f"the tensors that came have the digest {found}, and were announced as {given.digest}")
    return tensors


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype in DTYPES:
        return tensor
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _as_stored(spec: Spec) -> Spec:
    return spec if spec.dtype in DTYPES else Spec((spec.size * spec.dtype.itemsize,), torch.uint8)


def _restored(tensor: torch.Tensor, spec: Spec) -> torch.Tensor:
    return tensor if spec.dtype in DTYPES else tensor.view(spec.dtype).reshape(spec.shape)
