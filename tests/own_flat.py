"""An attack of one's own: colluding attackers who send zeros."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.contract.attack import Attack, floats, with_tensors


@dataclass(frozen=True)
class Flat(Attack):
    """Sends zeros, which are packed to a few bytes."""

    colludes: ClassVar[bool] = True

    def craft(self, message, cohort, scene):
        return with_tensors(message, {n: torch.zeros_like(t) for n, t in floats(message).items()})
