"""LASA: layer by layer, clients whose sparse update is unusual in norm or in sign are left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.aggregation import Holding
from secateur.aggregation.robust import Combined, Robust
from secateur.aggregation.updates import Block, Updates
from secateur.contract.state import State
from secateur.errors import check


@dataclass(frozen=True)
class Lasa(Robust):
    """Clips updates to the median norm, keeps each one's largest entries, and filters clients for each tensor.

    Of a tensor those clients are averaged whose norm, and whose share of positive among nonzero entries, are within
    ``norms`` and ``signs`` standard deviations of the median; all of them if none is. A client that is left out
    of every tensor is under suspicion, in honest rounds as well. One client's update and one tensor of all clients are
    in memory at a time.

    Attributes:
        keep: the share of an update's largest entries, by magnitude among the surviving weights, that stays.
        norms: lambda_n, how many standard deviations a norm may be from the median.
        signs: lambda_s, the same for the share of positive entries.
        then: the server's step.

    Reference: Xu et al., "Achieving Byzantine-Resilient Federated Learning via Layer-Adaptive Sparsified Model
    Aggregation", WACV 2025, arXiv 2409.01435. *Read*: JiiahaoXU/LASA (algorithms/defense/lasa.py, utils/mask_help.py,
    main.py), where ``keep`` is 0.7 by default, of matrices and kernels alone; there the share of positive entries is
    scaled, which no number of standard deviations sees.
    """

    serves: ClassVar[frozenset[Holding]] = frozenset({"shared", "own"})

    keep: float = 0.9
    norms: float = 1.0
    signs: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.keep <= 1, name="aggregator.keep", value=self.keep, must="be in (0, 1]")
        for name in ("norms", "signs"):
            check(getattr(self, name) > 0, name=f"aggregator.{name}", value=getattr(self, name), must="be above 0")

    def why(self, holding: Holding) -> str:
        """Return why parts of the model cannot be compared so."""
        del holding
        return "the norm of a layer is that of a client's part of it"

    def combine(self, updates: Updates, state: State) -> Combined:
        """Return the mean of each tensor over the clients that are usual in it."""
        del state
        norms = updates.products.norms
        clip = (norms.quantile(0.5) / norms.clamp(min=1e-300)).clamp(max=1.0)
        least = torch.tensor([self._least(updates.one(place)) for place in range(len(norms))])
        keep, zero = torch.zeros(len(norms), dtype=torch.bool), torch.zeros((), dtype=torch.float64)

        def mean(block: Block) -> torch.Tensor:
            large = block.values.abs() >= least[:, None]
            sparse = torch.where(large, block.values.double() * clip[:, None], zero)
            benign = self.usual(sparse)
            keep.logical_or_(benign)
            shares = benign.double()
            return (shares @ sparse) / (shares @ block.flags).clamp(min=1.0)

        found = updates.made(mean, whole=True)
        out = (client for client, kept in zip(updates.clients, keep.tolist(), strict=True) if not kept)
        return found, keep, dict.fromkeys(out, "its update of every tensor is unusual in norm or in signs")

    def usual(self, sparse: torch.Tensor) -> torch.Tensor:
        """Return flags of the clients whose updates of a tensor are usual; of all, if none is.

        Args:
            sparse: their updates, shape (clients, entries).
        """
        signs = sparse.sign()
        positive = 0.5 * (1 + signs.sum(dim=1) / signs.abs().sum(dim=1).clamp(min=1))
        near = _within(sparse.norm(dim=1), self.norms) & _within(positive, self.signs)
        return near if bool(near.any()) else torch.ones_like(near)

    def _least(self, update: torch.Tensor) -> float:
        """Return the magnitude from which an update's entries stay."""
        count = len(update)
        gone = count - max(1, int(self.keep * count + 1e-9))
        return float(update.abs().kthvalue(gone + 1).values) if count else 0.0


def _within(values: torch.Tensor, most: float) -> torch.Tensor:
    """Return which values are less than ``most`` standard deviations from the median; those of no spread all are."""
    return (values - values.quantile(0.5)).abs() < most * values.std(correction=0).clamp(min=1e-300)
