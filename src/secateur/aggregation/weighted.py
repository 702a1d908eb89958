"""A weighted mean of tensors at hand, summed in the order in which they are added, in O(model) memory."""

from __future__ import annotations

import torch

from secateur.contract.weighted import Accumulator, add_weighted, weighted_mean
from secateur.pruning.mask import Mask, Tensors


class WeightedMean:
    """The running mean sum_k n_k w_k / sum_k n_k, summed in float64 in the order of ``add``.

    Args:
        coverage: divide each coordinate by the weight of the clients that kept it (FedSparsify's normalised masked
            average, FedAvgNNZ); the mean is 0 where no client did.
    """

    def __init__(self, *, coverage: bool = False) -> None:
        self.coverage = coverage
        self._sums: Accumulator = {}

    def add(self, tensors: Tensors, weight: float, mask: Mask | None = None) -> None:
        """Add one client's tensors with its weight n_k."""
        add_weighted(self._sums, tensors, float(weight), (mask or {}) if self.coverage else None)

    def mean(self) -> dict[str, torch.Tensor]:
        """Return the mean in float32, by name; empty if nothing was added or all weights are 0."""
        return weighted_mean(self._sums)
