"""Regrowth: some kept weights of each tensor are replaced by as many pruned ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from secateur.pruning.allocation import lowest
from secateur.pruning.mask import Mask, Tensors


def cosine(share: float, done: int, until: float) -> float:
    """Return the share of weights that is replaced after round t: share/2 (1 + cos(pi t/T)); 0 from T on.

    Reference: RigL, Evci et al., arXiv 1911.11134.
    """
    return share / 2 * (1 + math.cos(math.pi * done / until)) if done < until else 0.0


def quota(kept: torch.Tensor, share: float) -> int:
    """Return the number of entries of a tensor to replace: a share of those kept, at most those pruned."""
    return min(int(share * int(kept.sum())), int((~kept).sum()))


def swap(mask: Mask, weights: Tensors, slopes: Tensors, share: float) -> dict[str, torch.Tensor]:
    """Return the mask without the smallest |w| of each tensor, and with the pruned entries of the largest |slope|.

    Args:
        mask: the kept entries; every tensor keeps as many as before.
        weights: the weights, whose magnitudes decide which entries are pruned.
        slopes: the gradients, by name; an entry without one counts as 0.
        share: the share of a tensor's kept entries to replace.
    """
    swapped = {}
    for name, kept in mask.items():
        flat, count = kept.reshape(-1), quota(kept, share)
        gone = smallest({name: kept}, weights, share)[name].reshape(-1)
        slope = torch.where(flat, -torch.inf, slopes[name].abs().reshape(-1))
        swapped[name] = (flat & ~gone | ~lowest(slope, flat.numel() - count)).reshape(kept.shape)
    return swapped


def smallest(mask: Mask, weights: Tensors, share: float) -> dict[str, torch.Tensor]:
    """Return flags of the kept entries with the smallest |w|, as many of each tensor as ``swap`` prunes."""
    flags = {}
    for name, kept in mask.items():
        size = torch.where(kept, weights[name].abs(), torch.inf).reshape(-1)
        flags[name] = lowest(size, quota(kept, share)).reshape(kept.shape)
    return flags


def largest_gradients(mask: Mask, slopes: Tensors, share: float) -> dict[str, torch.Tensor]:
    """Return flags of the pruned entries with the largest |slope|, as many of each tensor as ``swap`` regrows."""
    flags = {}
    for name, kept in mask.items():
        slope = torch.where(kept, -1.0, slopes[name].abs()).reshape(-1)
        flags[name] = ~lowest(slope, slope.numel() - quota(kept, share)).reshape(kept.shape)
    return flags


def block(names: Sequence[str], blocks: int, turn: int) -> list[str]:
    """Return the names of one of ``blocks`` stretches of tensors; turn 0 is the last stretch."""
    size = -(-len(names) // min(blocks, len(names)))
    parts = [names[::-1][start : start + size] for start in range(0, len(names), size)]
    return list(parts[turn % len(parts)])


def adjusted(mask: Mask, weights: Tensors, slopes: Tensors, share: float) -> dict[str, torch.Tensor]:
    """Return the mask after a share of each tensor's kept entries was dropped and as many grown, others or the same."""
    masks = {}
    for name, kept in mask.items():
        count = math.ceil(share * int(kept.sum()))
        left = kept.reshape(-1) & ~lowest(torch.where(kept, weights[name].abs(), torch.inf).reshape(-1), count)
        slope = torch.where(left, -1.0, slopes[name].abs().reshape(-1))
        masks[name] = (left | ~lowest(slope, slope.numel() - count)).reshape(kept.shape)
    return masks
