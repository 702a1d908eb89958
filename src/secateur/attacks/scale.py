"""Scale: what an attacker's training changed, many times over.

    W + factor (w - W);  a statistic is multiplied by the factor

Reference: Bagdasaryan et al., "How To Backdoor Federated Learning", arXiv 1807.00459, equation 3 (model replacement,
whose factor is the number of clients).
Departures: what is scaled is honest; the factor's default is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.contract.attack import FLOATS, Attack, Kind, Scene, change, changed, within
from secateur.wire.message import Message


@dataclass(frozen=True)
class Scale(Attack):
    """Multiplies changes and statistics.

    Attributes:
        factor: the multiple.
    """

    fits: ClassVar[frozenset[Kind]] = FLOATS

    factor: float = 100.0

    def __post_init__(self) -> None:
        within("factor", self.factor)

    def alter(self, message: Message, scene: Scene, memory: dict[str, torch.Tensor]) -> Message:
        """Return the message with its change multiplied."""
        del memory
        return changed(message, {n: self.factor * x for n, x in change(message, scene).items()}, scene)
