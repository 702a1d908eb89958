"""Error feedback: replies as updates or as their largest entries, and the residual that is added to the next message.

This module also has a client's memory of the wire between requests. It is pure arithmetic: nothing is sent or written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from secateur.errors import NotFiniteError
from secateur.pruning.allocation import highest
from secateur.pruning.mask import apply
from secateur.wire import masks
from secateur.wire.message import Masks, Message, Spec, Tensors

_HELD, _OWN, _RESIDUAL, _BASE = "wire.held/", "wire.own/", "wire.residual/", "wire.base/"


@dataclass(frozen=True)
class WireMemory:
    """What a client remembers of the wire between requests.

    Attributes:
        held: the mask of the last request that had one.
        own: the mask of the client's last reply if it was a different one; the server can refer to it by name.
        residual: the part of its replies so far that was lost by rounding and by sending only the largest entries.
        base: the digest of the frozen and constant tensors that were sent to the client; empty: it made them itself.
    """

    held: Masks | None = None
    own: Masks | None = None
    residual: Tensors = field(default_factory=dict)
    base: str = ""

    @classmethod
    def split(cls, memory: Tensors, specs: Mapping[str, Spec]) -> tuple[WireMemory, dict[str, torch.Tensor]]:
        """Return the wire memory that ``tensors`` added to a client's memory, and the rest of the memory."""
        if not memory:
            return cls(), {}
        residual = {n: t for n, t in _group(memory, _RESIDUAL).items() if n in specs and _shape(t) == specs[n].shape}
        rest = {n: t for n, t in memory.items() if not n.startswith((_HELD, _OWN, _RESIDUAL, _BASE))}
        base = next(iter(_group(memory, _BASE)), "")
        return cls(_mask(memory, _HELD, specs), _mask(memory, _OWN, specs), residual, base), rest

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return it as tensors, whose names are distinct from those of a method's memory."""
        tensors = {_HELD + n: t for n, t in masks.pack(self.held or {}).items()}
        tensors |= {_OWN + n: t for n, t in masks.pack(self.own or {}).items()}
        tensors |= {_BASE + self.base: torch.zeros(0)} if self.base else {}
        return tensors | {_RESIDUAL + n: t for n, t in self.residual.items()}

    def after(self, request: Masks | None, reply: Masks | None) -> WireMemory:
        """Return the memory after a request under one mask was answered under another; None: without a mask.

        A request to score the client's own model changes nothing, so its memory need not be written.
        """
        if request is None or (reply is None and masks.same(request, self.own)):
            return self
        return replace(self, held=request, own=None if reply is None or masks.same(reply, request) else reply)

    def known(self) -> list[Masks | None]:
        """Return the masks that a request may refer to, the most likely first."""
        return [mask for mask in (self.own, self.held) if mask is not None] or [None]


def add(message: Message, residual: Tensors) -> Message:
    """Return the message with a residual added to its float tensors, under its mask."""
    more = {n: t + residual[n] for n, t in message.tensors.items() if n in residual}
    return replace(message, tensors=apply({**message.tensors, **more}, message.mask))


def residual(wanted: Message, arrived: Message) -> dict[str, torch.Tensor]:
    """Return the residual: the differences of a message's float tensors to those that arrived."""
    return {
        name: tensor - arrived.tensors[name] for name, tensor in wanted.tensors.items() if tensor.dtype == torch.float32
    }


def as_update(reply: Message, base: Tensors) -> Message:
    """Return a reply whose float tensors are differences to ``base``, the received weights, under the reply's mask."""
    tensors = {n: t - base[n] if t.dtype == torch.float32 else t for n, t in reply.tensors.items()}
    return replace(reply, tensors=apply(tensors, reply.mask))


def from_update(update: Message, base: Tensors) -> Message:
    """Return the reply that ``as_update`` turned into an update, up to rounding.

    Raises:
        NotFiniteError: a sum is beyond fp32's range.
    """
    tensors = {n: base[n] + t if t.dtype == torch.float32 else t for n, t in update.tensors.items()}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float32 and not bool(tensor.isfinite().all()):
            raise NotFiniteError(f"tensor {name!r}: the update leads beyond fp32's range")
    return replace(update, tensors=apply(tensors, update.mask))


def top_k(update: Message, share: float) -> Message:
    """Return an update with only the ``share`` of largest magnitudes that its mask keeps, all float tensors together.

    At least one entry is kept; among equal magnitudes it is the earlier one, with tensors in the order of their names.
    """
    sizes = {name: update.tensors[name].abs() for name in sorted(update.tensors) if _floats(update.tensors[name])}
    held = {name: kept for name, kept in (update.mask or {}).items() if name in sizes}
    kept = sum(int(held[n].sum()) if n in held else size.numel() for n, size in sizes.items())
    scores = {n: torch.where(held[n], size, -1.0) if n in held else size for n, size in sizes.items()}
    mask = highest(scores, max(1, int(share * kept)))
    return replace(update, tensors=apply(update.tensors, mask), mask=mask)


def _floats(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float32


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _group(memory: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in memory.items() if name.startswith(prefix)}


def _mask(memory: Tensors, prefix: str, specs: Mapping[str, Spec]) -> Masks | None:
    """Return the unpacked mask; None if there is none, or if it belongs to another model."""
    packed = _group(memory, prefix)
    fits = all(n in specs and t.numel() == (specs[n].size + 7) // 8 for n, t in packed.items())
    return masks.unpack(packed, specs) if packed and fits else None
