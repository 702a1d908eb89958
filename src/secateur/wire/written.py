"""Payloads as they were written, or as they would be: their sizes without their bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from secateur.errors import WireError
from secateur.wire import masks, scalars, values
from secateur.wire import specs as listing
from secateur.wire.head import HEAD
from secateur.wire.message import Masks, Message, Spec, specs_of


@dataclass(frozen=True)
class Written:
    """A payload as it was written, in pieces that are one after the other.

    Attributes:
        message: what is in it.
        buffers: the pieces; empty if it was not written, see ``unwritten``.
        sizes: how many of its bytes are values, mask, framing and base, as ``part_sizes`` says.
        known: whether its mask is the one that the receiver holds.
        finite: whether all its float values are finite.
    """

    message: Message
    buffers: Sequence[bytes | memoryview]
    sizes: Mapping[str, int]
    known: bool
    finite: bool

    def __len__(self) -> int:
        """Return the number of bytes."""
        return sum(self.sizes.values())

    def bytes(self) -> bytes:
        """Return the payload in one piece."""
        return b"".join(self.buffers)


def unwritten(message: Message, *, template: Mapping[str, Spec], known: Masks | None) -> Written | None:
    """Return a payload with fp32 values that are not packed, without writing it: its sizes are exact.

    Args:
        message: the message.
        template: the tensors that the receiver expects.
        known: the mask that the receiver holds.

    Returns:
        None if the size follows from the content: the message has a mask of its own.
    """
    check_message(message)
    masked = message.mask is not None
    if masked and not masks.same(message.mask or {}, known):
        return None
    specs = specs_of(message.tensors)
    names = listing.digest(specs) if specs == dict(template) else listing.describe(specs)
    count, others, finite = 0, 0, True
    for name, tensor in message.tensors.items():
        kept = (message.mask or {}).get(name)
        size = tensor.numel() if kept is None else int(kept.sum())
        if tensor.dtype != torch.float32:
            others += size * tensor.element_size()
            continue
        count += size
        surviving = tensor if kept is None else torch.where(kept, tensor, 0.0)
        finite = finite and (bool(surviving.sum().isfinite()) or bool(surviving.isfinite().all()))
    sizes = {"values": values.unpacked_size(count) + others, "mask": masks.HASH if masked else 0}
    sizes["framing"] = HEAD.size + len(scalars.write(message.scalars)) + len(names)
    return Written(message, (), sizes, masked, finite)


def check_message(message: Message) -> None:
    """Refuse a message that cannot be written.

    Raises:
        WireError: a tensor of another dtype, or a mask that does not fit its tensor.
    """
    for name, tensor in message.tensors.items():
        if tensor.dtype not in listing.DTYPES:
            raise WireError(f"tensor {name!r} has dtype {tensor.dtype}; float32, int64, int32, uint8, bool can be sent")
    for name, mask in (message.mask or {}).items():
        if name not in message.tensors:
            raise WireError(f"mask names {name!r}, which is not among the tensors")
        shape = tuple(message.tensors[name].shape)
        if tuple(mask.shape) != shape or mask.dtype != torch.bool:
            raise WireError(f"mask of {name!r} is {mask.dtype} of shape {tuple(mask.shape)}, its tensor {shape}")
