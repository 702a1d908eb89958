"""Vote flip: an attacker votes to prune what it would keep, and to keep what it would prune.

    of the entries that are left, those that an honest vote prunes come first, then those that it keeps, the smallest
    of either first

Reference: none; the complement of an honest vote, made as large as one, so that its size gives nothing away. With H
honest and f lying voters a strict majority keeps what more than (H + f)/2 honest ones keep.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from secateur.contract.attack import Attack, Kind, Scene
from secateur.pruning.mask import Mask, Tensors, apply
from secateur.pruning.mask import kept as count
from secateur.wire.message import Message


@dataclass(frozen=True)
class VoteFlip(Attack):
    """Turns votes round."""

    fits: ClassVar[frozenset[Kind]] = frozenset({"votes"})

    def alter(self, message: Message, scene: Scene, memory: dict[str, torch.Tensor]) -> Message:
        """Return the message with its mask turned round; entries that come in have the values that were sent."""
        del memory
        honest, base = message.mask or {}, scene.base
        wish = {
            name: torch.where(kept, -1 - _squashed(message.tensors[name]), -_squashed(base[name]))
            for name, kept in honest.items()
        }
        return voted(message, wish, scene)


def voted(message: Message, wish: Tensors, scene: Scene) -> Message:
    """Return a message whose mask keeps as many entries as its own, the most wished for, within the mask that was sent.

    Args:
        message: the honest message, with a mask.
        wish: how much each entry is to be kept, by name; ties by place, tensors in their order.
        scene: the exchange.
    """
    honest = message.mask or {}
    held = scene.sent.mask or {}
    wish = {n: torch.where(held[n], x, -torch.inf) if n in held else x for n, x in wish.items()}
    flat = torch.cat([x.reshape(-1) for x in wish.values()])
    chosen = torch.zeros(flat.numel(), dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[: count(honest)]] = True
    parts = torch.split(chosen, [x.numel() for x in wish.values()])
    mask: Mask = {name: part.reshape(x.shape) for (name, x), part in zip(wish.items(), parts, strict=True)}
    tensors = {name: torch.where(honest[name], message.tensors[name], scene.base[name]) for name in mask}
    return replace(message, tensors=apply({**message.tensors, **tensors}, mask), mask=mask)


def _squashed(values: torch.Tensor) -> torch.Tensor:
    """Return magnitudes as numbers in [0, 1), in the same order."""
    sizes = values.abs()
    return sizes / (1 + sizes)
