"""A weighted mean of tensors at hand, summed in the order in which they are added, in O(model) memory."""

from __future__ import annotations

import torch

from secateur.pruning.mask import Mask, Tensors


class WeightedMean:
    """The running mean sum_k n_k w_k / sum_k n_k, summed in float64 in the order of ``add``.

    Args:
        coverage: divide each coordinate by the weight of the clients that kept it (FedSparsify's normalised masked
            average, FedAvgNNZ); the mean is 0 where no client did.
    """

    def __init__(self, *, coverage: bool = False) -> None:
        self.coverage = coverage
        self.total = 0.0
        self._sums: dict[str, torch.Tensor] = {}
        self._covered: dict[str, torch.Tensor] = {}

    def add(self, tensors: Tensors, weight: float, mask: Mask | None = None) -> None:
        """Add one client's tensors with its weight n_k."""
        self.total += weight
        for name, tensor in tensors.items():
            part = tensor.to(torch.float64, copy=True).mul_(weight)
            self._sums[name] = self._sums[name].add_(part) if name in self._sums else part
            if self.coverage:
                held = mask[name] if mask is not None and name in mask else torch.ones_like(tensor, dtype=torch.bool)
                gain = held.double() * weight
                self._covered[name] = self._covered[name].add_(gain) if name in self._covered else gain

    def mean(self) -> dict[str, torch.Tensor]:
        """Return the mean in float32, by name; empty if nothing was added or all weights are 0."""
        if not self.total:
            return {}
        if self.coverage:
            return {
                name: torch.where(c > 0, self._sums[name] / c.clamp(min=1e-300), 0.0).float()
                for name, c in self._covered.items()
            }
        return {name: (s / self.total).float() for name, s in self._sums.items()}
