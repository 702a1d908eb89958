"""Multi-Krum: the mean update of the clients that are nearest to most others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.aggregation import Holding
from secateur.aggregation.krum import farthest, scores
from secateur.aggregation.robust import (
    Combined,
    Robust,
    Weights,
    check_hostile,
    chosen,
    hostile_of,
    without_highest,
)
from secateur.aggregation.updates import FEWEST, Updates
from secateur.contract.state import State


@dataclass(frozen=True)
class Multikrum(Robust):
    """The mean update of the K - f clients with the least scores of Krum; with f = 0 that is the mean of all.

    It needs K >= 2 f + 3 clients. The f others are under suspicion, in honest rounds as well. Where masks differ, two
    clients are compared over what both hold. Its cost is Krum's, and one more pass over the replies.

    Attributes:
        hostile: the share of the clients assumed to be hostile; f of K clients is ceil(hostile K).
        weights: what those kept weigh: one each, or by ``rows`` up to the cohort's 90th percentile.
        then: the server's step.

    Reference: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017,
    arXiv 1703.02757.
    """

    serves: ClassVar[frozenset[Holding]] = frozenset({"shared", "own", "slices"})

    hostile: float = 0.2
    weights: Weights = "equal"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_hostile(self.hostile)

    def needs(self, clients: int) -> int:
        """Return 2 f + 3."""
        return max(FEWEST, 2 * hostile_of(self.hostile, clients) + 3)

    def combine(self, updates: Updates, state: State) -> Combined:
        """Return the mean update of the clients with the least scores."""
        del state
        hostile = hostile_of(self.hostile, len(updates.clients))
        found = scores(updates.products.distances, hostile)
        keep = without_highest(found, hostile)
        return chosen(updates, keep, self.weights), keep, farthest(updates, found, self.hostile)
