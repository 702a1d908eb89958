"""Norm clipping: no client's update is longer than the cohort's median one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.aggregation.robust import Combined, Robust, Weights, client_weights
from secateur.aggregation.updates import Updates
from secateur.contract.state import State


@dataclass(frozen=True)
class Clip(Robust):
    """The mean of the updates, those longer than the median norm scaled down to it.

    It bounds what a huge update can do, and stops no other attack. A client that holds a part of the model is measured
    by its root mean square. It reads the replies in blocks, twice.

    Attributes:
        weights: what clients weigh: by ``rows`` up to the cohort's 90th percentile, or one each.
        then: the server's step.

    Reference: norm bounding of Sun et al., "Can You Really Backdoor Federated Learning?", arXiv 1911.07963; the median
    as its threshold: Xu et al., "Byzantine-robust Federated Learning through Collaborative Malicious Gradient
    Filtering" (SignGuard), arXiv 2109.05872.
    """

    compares: ClassVar[bool] = False

    weights: Weights = "rows"

    def combine(self, updates: Updates, state: State) -> Combined:
        """Return the mean of the clipped updates."""
        del state
        norms = updates.products.norms
        limit, weights = norms.quantile(0.5), client_weights(updates, self.weights)
        return updates.weighed(weights * (limit / norms.clamp(min=1e-300)).clamp(max=1.0), weights), None, {}
