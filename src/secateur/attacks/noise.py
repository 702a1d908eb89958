"""Noise: what an attacker trained, plus Gaussian noise of a fixed size.

    x + N(0, sigma^2), entry by entry

Reference: Li et al., "RSA: Byzantine-Robust Stochastic Aggregation Methods", arXiv 1811.03761 (Gaussian attack).
Departures: the noise is added to the honest reply, where that paper sends noise alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.contract.attack import Attack, Kind, Scene, changed, floats, within
from secateur.contract.attack import change as change_of
from secateur.wire.message import Message


@dataclass(frozen=True)
class Noise(Attack):
    """Adds noise to trained weights or scores.

    Attributes:
        sigma: the standard deviation of the noise, in units of the weights.
    """

    fits: ClassVar[frozenset[Kind]] = frozenset({"weights", "scores"})

    sigma: float = 1.0

    def __post_init__(self) -> None:
        within("sigma", self.sigma)

    def alter(self, message: Message, scene: Scene, memory: dict[str, torch.Tensor]) -> Message:
        """Return the noisy message."""
        del memory
        draws, names = scene.generator(), sorted(floats(message))
        noise = {name: self.sigma * torch.randn(message.tensors[name].shape, generator=draws) for name in names}
        return changed(message, {name: x + noise[name] for name, x in change_of(message, scene).items()}, scene)
