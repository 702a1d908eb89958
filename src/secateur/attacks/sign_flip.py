"""Sign flip: the opposite of what an attacker's training changed.

    W - factor (w - W)

Reference: Li et al., "RSA: Byzantine-Robust Stochastic Aggregation Methods", arXiv 1811.03761 (sign-flipping attack,
whose factor is -4 on the message; here it is on the change).
Departures: the factor's default is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.contract.attack import Attack, Kind, Scene, change, changed, within
from secateur.wire.message import Message


@dataclass(frozen=True)
class SignFlip(Attack):
    """Turns the direction of training round.

    Attributes:
        factor: how much further than honest training the attacker goes, in the opposite direction.
    """

    fits: ClassVar[frozenset[Kind]] = frozenset({"weights", "scores"})

    factor: float = 1.0

    def __post_init__(self) -> None:
        within("factor", self.factor)

    def alter(self, message: Message, scene: Scene, memory: dict[str, torch.Tensor]) -> Message:
        """Return the message with its change turned round."""
        del memory
        return changed(message, {n: -self.factor * x for n, x in change(message, scene).items()}, scene)
