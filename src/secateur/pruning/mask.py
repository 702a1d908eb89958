"""Named masks: one boolean tensor for each prunable tensor, True where the weight is kept.

A tensor that a mask does not name is dense. A mask is never derived from ``w == 0``, because a surviving weight may be
zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

Tensors = Mapping[str, torch.Tensor]
Mask = Mapping[str, torch.Tensor]


def apply(tensors: Tensors, mask: Mask | None) -> dict[str, torch.Tensor]:
    """Return the tensors with pruned entries at +0.0; tensors that the mask does not name are passed through.

    Written with ``where`` and not as a product: ``w * 0`` is -0.0 for a negative w and NaN for an infinite
    one.

    **Guarantees.** Kept entries keep their bits; applying twice equals applying once.
    """
    if mask is None:
        return dict(tensors)
    return {
        name: torch.where(mask[name], tensor, torch.zeros((), dtype=tensor.dtype)) if name in mask else tensor
        for name, tensor in tensors.items()
    }


def intersect(one: Mask | None, other: Mask | None) -> Mask | None:
    """Return the mask that keeps what both keep; None keeps everything."""
    if one is None or other is None:
        return other if one is None else one
    both = {name: one[name] & other[name] for name in one if name in other}
    return {**one, **other, **both}


def kept(mask: Mask) -> int:
    """Return how many entries the mask keeps."""
    return sum(int(part.sum()) for part in mask.values())


def size(mask: Mask) -> int:
    """Return how many entries the mask covers."""
    return sum(part.numel() for part in mask.values())


def sparsity(mask: Mask | None) -> float:
    """Return the fraction removed of the entries that the mask covers; 0.0 without a mask."""
    total = 0 if mask is None else size(mask)
    return 0.0 if mask is None or total == 0 else 1.0 - kept(mask) / total
