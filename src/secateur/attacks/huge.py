"""Huge: every value is one enormous, finite number.

Reference: none; a single such reply decides any mean (Blanchard et al., "Machine Learning with Adversaries", NeurIPS
2017, proposition 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.contract.attack import FLOATS, Attack, Kind, Scene, floats, with_tensors, within
from secateur.wire.message import Message


@dataclass(frozen=True)
class Huge(Attack):
    """Sends one enormous number everywhere.

    Attributes:
        value: the number; where the wire's format ends earlier, the largest that it carries is sent.
    """

    fits: ClassVar[frozenset[Kind]] = FLOATS

    value: float = 1e30

    def __post_init__(self) -> None:
        within("value", self.value)

    def alter(self, message: Message, scene: Scene, memory: dict[str, torch.Tensor]) -> Message:
        """Return the message with every value replaced."""
        del scene, memory
        return with_tensors(message, {n: torch.full_like(x, self.value) for n, x in floats(message).items()})
