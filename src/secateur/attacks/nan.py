"""NaN: no value is a number.

Reference: none; what a broken client sends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.contract.attack import FLOATS, Attack, Kind, Scene, floats, with_tensors
from secateur.wire.message import Message


@dataclass(frozen=True)
class NotANumber(Attack):
    """Sends NaN everywhere; where the wire's format has none (int8), the largest value that it carries."""

    fits: ClassVar[frozenset[Kind]] = FLOATS

    def alter(self, message: Message, scene: Scene, memory: dict[str, torch.Tensor]) -> Message:
        """Return the message with every value replaced."""
        del scene, memory
        return with_tensors(message, {n: torch.full_like(x, torch.nan) for n, x in floats(message).items()})
