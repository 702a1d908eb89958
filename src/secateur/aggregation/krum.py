"""Krum: the update of the one client that is nearest to most others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.aggregation import Holding
from secateur.aggregation.robust import (
    Combined,
    Robust,
    check_hostile,
    chosen,
    hostile_of,
    stand_out,
    without_highest,
)
from secateur.aggregation.updates import FEWEST, Updates
from secateur.contract.state import State


@dataclass(frozen=True)
class Krum(Robust):
    """The update of the client with the least score; the score is the sum of its K - f - 2 least squared distances.

    It needs K >= 2 f + 3 clients. One client's update has that client's bias. The f highest scores are under suspicion,
    in honest rounds as well. Distances are those of the updates over the surviving weights, from one pass over the
    replies in blocks: K^2 multiplications for a coordinate.

    Attributes:
        hostile: the share of the clients assumed to be hostile; f of K clients is ceil(hostile K).
        then: the server's step.

    Reference: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017,
    arXiv 1703.02757.
    """

    serves: ClassVar[frozenset[Holding]] = frozenset({"shared"})

    hostile: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_hostile(self.hostile)

    def needs(self, clients: int) -> int:
        """Return 2 f + 3."""
        return max(FEWEST, 2 * hostile_of(self.hostile, clients) + 3)

    def why(self, holding: Holding) -> str:
        """Return why one client's update is not enough."""
        del holding
        return "it takes the update of one client, and what that client does not hold would never move"

    def combine(self, updates: Updates, state: State) -> Combined:
        """Return the update of the client with the least score."""
        del state
        found = scores(updates.products.distances, hostile_of(self.hostile, len(updates.clients)))
        best = torch.arange(len(found)) == int(found.argmin())
        return chosen(updates, best, "equal"), best, farthest(updates, found, self.hostile)


def scores(distances: torch.Tensor, hostile: int) -> torch.Tensor:
    """Return the sum of each client's K - f - 2 least squared distances to others.

    Args:
        distances: shape (K, K), 0 on the diagonal.
        hostile: f.
    """
    others = distances.clone().fill_diagonal_(torch.inf).sort(dim=1).values
    return others[:, : len(distances) - hostile - 2].sum(dim=1)


def farthest(updates: Updates, found: torch.Tensor, hostile: float) -> dict[int, str]:
    """Return the reason for each client whose score is among the f highest."""
    return stand_out(updates, without_highest(found, hostile_of(hostile, len(found))), "score", found)
