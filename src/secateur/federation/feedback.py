"""Feedback: replies as updates or as their largest entries, and the residual of both ends, which is added next time.

Also what a client's end of the wire remembers between requests. Pure arithmetic: nothing is sent, no file is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from secateur.errors import WireError
from secateur.pruning.allocation import highest
from secateur.pruning.mask import apply
from secateur.wire import masks
from secateur.wire.message import Masks, Message, Spec, Tensors

_HELD, _OWN, _RESIDUAL = "wire.held/", "wire.own/", "wire.residual/"


@dataclass(frozen=True)
class WireMemory:
    """What a client's end of the wire remembers between requests.

    Attributes:
        held: the mask of the last request that had one.
        own: the mask of its reply, where it was another: a server that got it need only name it.
        residual: what did not arrive of its replies so far, by rounding and by choosing the largest entries.
    """

    held: Masks | None = None
    own: Masks | None = None
    residual: Tensors = field(default_factory=dict)

    @classmethod
    def split(cls, memory: Tensors, specs: Mapping[str, Spec]) -> tuple[WireMemory, dict[str, torch.Tensor]]:
        """Return what ``tensors`` wrote into a client's memory, and the rest of the memory."""
        residual = {n: t for n, t in _group(memory, _RESIDUAL).items() if n in specs and _shape(t) == specs[n].shape}
        rest = {n: t for n, t in memory.items() if not n.startswith((_HELD, _OWN, _RESIDUAL))}
        return cls(_mask(memory, _HELD, specs), _mask(memory, _OWN, specs), residual), rest

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return it as named tensors, beside which a method's memory may stand."""
        tensors = {_HELD + n: t for n, t in masks.pack(self.held or {}).items()}
        tensors |= {_OWN + n: t for n, t in masks.pack(self.own or {}).items()}
        return tensors | {_RESIDUAL + n: t for n, t in self.residual.items()}

    def after(self, request: Masks | None, reply: Masks | None) -> WireMemory:
        """Return what is remembered once a request under a mask was answered under another; None: under none.

        Scoring the own model changes nothing, so that no client's memory need be written for it.
        """
        if request is None or (reply is None and masks.same(request, self.own)):
            return self
        return replace(self, held=request, own=None if reply is None or masks.same(reply, request) else reply)

    def known(self) -> list[Masks | None]:
        """Return the masks that a request may refer to, the likeliest first."""
        return [mask for mask in (self.own, self.held) if mask is not None] or [None]


def add(message: Message, residual: Tensors) -> Message:
    """Return the message with a residual added to its float tensors, where its mask keeps them."""
    more = {n: t + residual[n] for n, t in message.tensors.items() if n in residual}
    return replace(message, tensors=apply({**message.tensors, **more}, message.mask))


def residual(wanted: Message, arrived: Message) -> dict[str, torch.Tensor]:
    """Return what did not arrive of a message's float tensors."""
    return {
        name: tensor - arrived.tensors[name] for name, tensor in wanted.tensors.items() if tensor.dtype == torch.float32
    }


def as_update(reply: Message, base: Tensors) -> Message:
    """Return a reply's float tensors as differences to what the client was sent, under the reply's mask."""
    tensors = {n: t - base[n] if t.dtype == torch.float32 else t for n, t in reply.tensors.items()}
    return replace(reply, tensors=apply(tensors, reply.mask))


def from_update(update: Message, base: Tensors) -> Message:
    """Return the reply that ``as_update`` was given, but for rounding.

    Raises:
        WireError: a sum is beyond fp32's range.
    """
    tensors = {n: base[n] + t if t.dtype == torch.float32 else t for n, t in update.tensors.items()}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float32 and not bool(tensor.isfinite().all()):
            raise WireError(f"tensor {name!r}: the update leads beyond fp32's range")
    return replace(update, tensors=apply(tensors, update.mask))


def top_k(update: Message, share: float) -> Message:
    """Return the ``share`` of largest magnitude of what an update's mask keeps, all float tensors together.

    At least one entry is kept; of equal magnitudes the earlier one, tensors in the order of their names.
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
    """Return a packed mask; None where there is none, or it is of another model."""
    packed = _group(memory, prefix)
    fits = all(n in specs and t.numel() == (specs[n].size + 7) // 8 for n, t in packed.items())
    return masks.unpack(packed, specs) if packed and fits else None
