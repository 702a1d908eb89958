"""A vote on a mask, as a pure function; ``methods.kit.consensus`` says who makes masks."""

from __future__ import annotations

import math
from typing import Literal

import torch

from secateur.pruning.allocation import lowest
from secateur.pruning.mask import Mask, Tensors

Rule = Literal["majority", "half", "union", "intersection"]


def floored(
    mask: Mask, votes: Tensors, magnitude: Tensors, before: Mask | None, share: float
) -> dict[str, torch.Tensor]:
    """Return the mask with a least share of each tensor, so that no vote empties a layer.

    Entries that come back are those with the most votes, among equals those of the largest magnitude.

    Args:
        mask: what was voted for, by name.
        votes: the number of clients that kept each entry.
        magnitude: |mean w|, by name.
        before: the mask before the vote, within which entries come back; None: nothing was pruned.
        share: of the entries of a tensor that were there before, rounded up.
    """
    kept = {}
    for name, chosen in mask.items():
        held = torch.ones_like(chosen) if before is None or name not in before else before[name]
        least = math.ceil(share * int(held.sum()) - 1e-9)
        inside = chosen & held
        if int(inside.sum()) >= least:
            kept[name] = chosen
            continue
        # votes first: ranks of magnitudes lie in [0, 1), so that they decide among equal votes alone
        size = magnitude[name].reshape(-1).double()
        order = torch.arange(len(size), dtype=size.dtype) / len(size)
        ranks = torch.empty_like(size).scatter_(0, size.argsort(stable=True), order)
        score = torch.where(held.reshape(-1), votes[name].reshape(-1).double() + ranks, -1.0)
        kept[name] = chosen | ~lowest(score, len(score) - least).reshape(chosen.shape)
    return kept


def vote(rule: Rule, votes: Tensors, voters: int, magnitude: Tensors, budget: int) -> dict[str, torch.Tensor]:
    """Return the mask that clients voted for, by name.

    Args:
        rule: ``majority`` keeps v > K/2, ``half`` v >= max(1, floor(K/2)), ``union`` v >= 1, ``intersection`` v = K.
        votes: v, the number of clients that kept each entry; integers, by name.
        voters: K, the number of clients that voted; if 0, every entry is kept.
        magnitude: |mean w|, by name; under ``majority`` the largest of the tied entries (v = K/2) are kept.
        budget: the number of entries that the schedule keeps; tied entries are kept up to it.
    """
    least = {"majority": voters // 2 + 1, "half": max(1, voters // 2), "union": 1, "intersection": voters}
    mask = {name: v >= least[rule] if voters else v >= 0 for name, v in votes.items()}
    if not voters or rule != "majority" or voters % 2:
        return mask
    tied = torch.cat([(v == voters // 2).reshape(-1) for v in votes.values()])
    score = torch.cat([magnitude[name].reshape(-1).double() for name in votes])
    room = max(0, budget - sum(int(m.sum()) for m in mask.values()))
    index = tied.nonzero().squeeze(1)
    winners = index[~lowest(score[index], max(0, len(index) - room))]
    chosen = torch.zeros_like(tied).index_fill_(0, winners, value=True)
    parts = torch.split(chosen, [v.numel() for v in votes.values()])
    return {n: mask[n] | part.reshape(mask[n].shape) for n, part in zip(votes, parts, strict=True)}
