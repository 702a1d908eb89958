"""A vote on a mask, as a pure function; who makes masks is ``methods.kit.consensus``."""

from __future__ import annotations

from typing import Literal

import torch

from secateur.pruning.allocation import lowest
from secateur.pruning.mask import Tensors

Rule = Literal["majority", "half", "union", "intersection"]


def vote(rule: Rule, votes: Tensors, voters: int, magnitude: Tensors, budget: int) -> dict[str, torch.Tensor]:
    """Return the mask voted for.

    Args:
        rule: ``majority`` keeps v > K/2, ``half`` v >= max(1, floor(K/2)), ``union`` v >= 1, ``intersection`` v = K.
        votes: v, how many clients kept each entry (integers).
        voters: K, how many clients voted; without any, everything is kept.
        magnitude: |mean w|; of ties under ``majority`` (v = K/2) the larger ones stay.
        budget: how many entries the schedule leaves; ties are admitted up to it.
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
