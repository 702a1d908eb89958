"""Inflated: an attacker trains as asked, and says that it has many times the rows that it has.

    n_k -> factor n_k, the weight of its reply in means by rows

Reference: none; n_k is a claim in FedAvg (arXiv 1602.05629) and in all methods that weight by rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from secateur.contract.attack import Attack, Scene, within
from secateur.wire.message import Message


@dataclass(frozen=True)
class Inflated(Attack):
    """Multiplies the claim of rows.

    Attributes:
        factor: the multiple.
    """

    factor: int = 100

    def __post_init__(self) -> None:
        within("factor", self.factor, least=1)

    def alter(self, message: Message, scene: Scene, memory: dict[str, torch.Tensor]) -> Message:
        """Return the message with the inflated claim."""
        del scene, memory
        rows = int(message.scalars.get("samples", 0))
        return replace(message, scalars={**message.scalars, "samples": rows * self.factor})
