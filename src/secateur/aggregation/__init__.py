"""From the replies of a round to the server's next weights: one file for each rule, found by listing this room."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch

from secateur.contract.reduction import Mean, Reduction, masks_of
from secateur.contract.state import Memory
from secateur.pruning.mask import Mask, Tensors

Pruned = Literal["zero", "shadow", "decay"]


class Aggregator(ABC):
    """What becomes of trained weights at the server; a frozen dataclass.

    A robust rule says in ``reduction`` that it wants single replies, and what it makes of them; a server optimiser
    takes the mean, and differs in ``step``.
    """

    @property
    def pruned(self) -> Pruned:
        """Return what becomes of the server's own value of a pruned weight: it is ``zero``, a ``shadow``, or decays."""
        return "zero"

    @property
    def coverage(self) -> bool:
        """Return whether each coordinate counts those clients alone that kept it, where replies have masks."""
        return False

    def reduction(self, *, masked: bool) -> Reduction:
        """Return what a round's replies are reduced to: tensors by name, none of no reply. Here their mean by rows.

        Args:
            masked: replies have masks, which may differ from client to client.
        """
        return Mean(holders=masks_of if self.coverage and masked else None)

    @abstractmethod
    def step(
        self, weights: Tensors, mean: Tensors, *, mask: Mask | None, memory: Memory
    ) -> tuple[dict[str, torch.Tensor], Memory]:
        """Return the next weights and the next memory from what the replies were reduced to."""
