"""Stale: an attacker trains once, and sends that reply again in every later round.

Reference: none; a free-rider, and the worst case of a client that is late.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.contract.attack import Attack, Kind, Scene, with_tensors
from secateur.wire.message import Message


@dataclass(frozen=True)
class Stale(Attack):
    """Sends its first reply for ever; under the mask of the day where there is one."""

    fits: ClassVar[frozenset[Kind]] = frozenset({"weights", "scores", "ranks"})

    def alter(self, message: Message, scene: Scene, memory: dict[str, torch.Tensor]) -> Message:
        """Return the first reply's tensors, with the scalars and the mask of this one."""
        del scene
        if message.tensors.keys() - memory.keys():
            memory.update({name: tensor.clone() for name, tensor in message.tensors.items()})
        return with_tensors(message, {name: memory[name] for name in message.tensors})
