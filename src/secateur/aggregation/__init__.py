"""Aggregation: from the replies of a round to the server's next weights; one file a rule, found by listing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch

from secateur.contract.reduction import Mean, Reduction, masks_of
from secateur.contract.state import Memory
from secateur.pruning.mask import Mask, Tensors

Pruned = Literal["zero", "shadow", "decay"]


class Aggregator(ABC):
    """Base of aggregators, which turn the trained weights of a round into the server's next ones; frozen dataclasses.

    A server optimiser writes ``step``, and keeps the mean as its ``reduction``. A robust rule writes ``reduction``: how
    single replies become one.
    """

    @property
    def pruned(self) -> Pruned:
        """Return what the server does with its value of a pruned weight: sets it to ``zero``, keeps or decays it."""
        return "zero"

    @property
    def coverage(self) -> bool:
        """Return whether each coordinate is averaged over only the clients that kept it, if replies have masks."""
        return False

    def reduction(self, *, masked: bool) -> Reduction:
        """Return the reduction of a round's replies to tensors by name, empty without replies; here their mean by rows.

        Args:
            masked: whether replies have masks, which may differ from client to client.
        """
        return Mean(holders=masks_of if self.coverage and masked else None)

    @abstractmethod
    def step(
        self, weights: Tensors, mean: Tensors, *, mask: Mask | None, memory: Memory
    ) -> tuple[dict[str, torch.Tensor], Memory]:
        """Return the next weights and the next memory.

        Args:
            weights: the server's weights W, by name.
            mean: the reduced replies, by name; the shapes are those of the weights.
            mask: the mask under which clients trained; None: nothing was pruned.
            memory: what earlier steps kept, such as a momentum.
        """
