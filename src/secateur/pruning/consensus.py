"""Consensus: who makes the mask, and how many views become one.

``where`` says at which point of the round a mask is made: on the ``server`` after the merge, by the
``clients`` after their training (the server then votes), or for each ``cohort`` before it trains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from secateur.pruning.allocation import lowest
from secateur.pruning.mask import Tensors

Where = Literal["server", "clients", "cohort"]


class Consensus(Protocol):
    """What a consensus offers."""

    @property
    def where(self) -> Where:
        """Who makes the mask."""


@dataclass(frozen=True)
class Pooled:
    """The server scores the merged model (or the mean statistic) and prunes it; masks are nested."""

    @property
    def where(self) -> Where:
        """Return the server."""
        return "server"


@dataclass(frozen=True)
class Participants:
    """A mask for each round from the statistics of the clients that take part in it.

    Attributes:
        static: use all explorers' statistics in every round instead (one mask, the ablation).
        enforce: clients prune after every optimiser step and send surviving values only; False: the server
            prunes before it sends, clients train and return the dense model (the ablation).

    Reference: AutoFLIP, arXiv 2405.10271: the mask is updated in each round.
    """

    static: bool = False
    enforce: bool = True

    @property
    def where(self) -> Where:
        """Return the cohort."""
        return "cohort"


@dataclass(frozen=True)
class Majority:
    """Each client prunes its own model; the server keeps what enough of them kept.

    Attributes:
        rule: ``majority`` keeps v > K/2; ties (v = K/2) go to the larger mean magnitude while the schedule's
            budget has room. ``half`` keeps v >= max(1, floor(K/2)): the published code without the maximum, so
            that one voter alone keeps everything there, whatever it pruned. ``union`` keeps v >= 1,
            ``intersection`` v = K.

    Guarantees:
        No rule keeps what no voter kept, so that masks are nested where voters' are. Where nobody voted everything
        is kept: the caller holds it within the mask that is held.

    Reference: FedSparsify-Local, arXiv 2204.12430; *read*: dstripelis/FedSparsify, utils/model_merge.py.
    """

    rule: Literal["majority", "half", "union", "intersection"] = "majority"

    @property
    def where(self) -> Where:
        """Return the clients."""
        return "clients"

    def vote(self, votes: Tensors, voters: int, magnitude: Tensors, budget: int) -> dict[str, torch.Tensor]:
        """Return the mask voted for.

        Args:
            votes: v, how many clients kept each entry (integers).
            voters: K, how many clients voted.
            magnitude: |mean w|, which decides ties.
            budget: how many entries the schedule leaves; ties are admitted up to it.
        """
        least = {"majority": voters // 2 + 1, "half": max(1, voters // 2), "union": 1, "intersection": voters}
        mask = {name: v >= least[self.rule] if voters else v >= 0 for name, v in votes.items()}
        if not voters or self.rule != "majority" or voters % 2:
            return mask
        tied = torch.cat([(v == voters // 2).reshape(-1) for v in votes.values()])
        score = torch.cat([magnitude[name].reshape(-1).double() for name in votes])
        room = max(0, budget - sum(int(m.sum()) for m in mask.values()))
        index = tied.nonzero().squeeze(1)
        winners = index[~lowest(score[index], max(0, len(index) - room))]
        chosen = torch.zeros_like(tied).index_fill_(0, winners, value=True)
        parts = torch.split(chosen, [v.numel() for v in votes.values()])
        return {n: mask[n] | part.reshape(mask[n].shape) for n, part in zip(votes, parts, strict=True)}
