"""The trimmed mean: at each coordinate without the largest and the smallest updates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from secateur.aggregation.robust import Combined, Robust, check_hostile, hostile_of
from secateur.aggregation.updates import FEWEST, Block, Updates
from secateur.contract.state import State


@dataclass(frozen=True)
class Trimmed(Robust):
    """The mean of each coordinate without the b largest and the b smallest values of those who hold it.

    It needs more than 2 b clients; a coordinate that no more than 2 b of them hold does not move. It reads the replies
    in blocks of coordinates, and sorts each.

    Attributes:
        hostile: the share of the clients assumed to be hostile; b of K clients is ceil(hostile K).
        then: the server's step.

    Reference: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", arXiv 1803.01498.
    *Read*: CRYPTO-KU/FL-Byzantine-Library, aggregators/trimmed_mean.py, where b shrinks if clients are too few.
    """

    hostile: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_hostile(self.hostile)

    def needs(self, clients: int) -> int:
        """Return 2 b + 1."""
        return max(FEWEST, 2 * hostile_of(self.hostile, clients) + 1)

    def combine(self, updates: Updates, state: State) -> Combined:
        """Return the trimmed mean of each coordinate."""
        del state
        cut = hostile_of(self.hostile, len(updates.clients))
        return updates.made(lambda block: trimmed(block, cut)), None, {}


def trimmed(block: Block, cut: int) -> torch.Tensor:
    """Return the mean of each coordinate of a block without the ``cut`` largest and smallest; 0 if none is left."""
    if block.held is None:
        ordered = np.sort(block.values.numpy(), axis=0)
        return torch.from_numpy(ordered[cut : len(ordered) - cut].mean(axis=0, dtype=np.float64))
    ordered = np.sort(np.where(block.held.numpy(), block.values.numpy(), np.inf), axis=0)
    count, place = block.holders.numpy(), np.arange(len(ordered))[:, None]
    inner = (place >= cut) & (place < count - cut)
    summed = np.where(inner, ordered, 0.0).sum(axis=0, dtype=np.float64)
    return torch.from_numpy(summed / np.maximum(count - 2 * cut, 1))
