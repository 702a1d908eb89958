"""The coordinate-wise median of the clients' updates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from secateur.aggregation.robust import Combined, Robust
from secateur.aggregation.updates import Block, Updates, middle
from secateur.contract.state import State


@dataclass(frozen=True)
class Median(Robust):
    """The median of each coordinate over those who hold it; of an even number of holders the mean of the middle two.

    It is wrong only where half of the holders of a coordinate lie. Where clients have different rows it favours what
    most have in common. It reads the replies in blocks of coordinates, and sorts each: K log K for a coordinate.

    Attributes:
        then: the server's step.

    Reference: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", arXiv 1803.01498.
    """

    def combine(self, updates: Updates, state: State) -> Combined:
        """Return the median of each coordinate."""
        del state
        return updates.made(medians), None, {}


def medians(block: Block) -> torch.Tensor:
    """Return the median of each coordinate of a block over its holders."""
    if block.held is None:
        return middle(block.values)
    ordered = np.sort(np.where(block.held.numpy(), block.values.numpy(), np.inf), axis=0)
    count, columns = block.holders.numpy(), np.arange(ordered.shape[1])
    low, high = (ordered[place, columns].astype(np.float64) for place in ((count - 1) // 2, count // 2))
    return torch.from_numpy((low + high) / 2)
