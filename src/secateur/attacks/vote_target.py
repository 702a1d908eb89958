"""Vote target: attackers vote a whole layer away.

Their votes keep nothing of one layer, and as many entries as an honest vote in all.

Reference: none; layer collapse (Tanaka et al., SynFlow, arXiv 2006.05467) made on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.attacks.vote_flip import voted
from secateur.contract.attack import Attack, Kind, Scene
from secateur.contract.state import Setting
from secateur.errors import unknown
from secateur.learning.task import Task
from secateur.wire.message import Message


@dataclass(frozen=True)
class VoteTarget(Attack):
    """Votes against one layer.

    Attributes:
        layer: the name of the layer's weight; empty: the last of those that clients vote on, the model's outputs.
    """

    fits: ClassVar[frozenset[Kind]] = frozenset({"votes"})

    layer: str = ""

    def check(self, setting: Setting, task: Task) -> None:
        """Refuse a layer that the model does not have."""
        del task
        names = setting.layout.names("weight")
        if self.layer and self.layer not in names:
            raise unknown("layer of attack vote_target", self.layer, names)

    def alter(self, message: Message, scene: Scene, memory: dict[str, torch.Tensor]) -> Message:
        """Return the message with a mask that keeps the layer last."""
        del memory
        honest = message.mask or {}
        target = self.layer or [name for name in scene.setting.specs if name in honest][-1]
        wish = {n: torch.where(kept, message.tensors[n].abs() + 1, 0.0) for n, kept in honest.items()}
        if target in wish:
            wish[target] = torch.full_like(wish[target], -1.0)
        return voted(message, wish, scene)
