"""Label flip: an attacker trains as asked, on rows whose labels are turned round.

    y -> classes - 1 - y

Reference: Fang et al., "Local Model Poisoning Attacks to Byzantine-Robust Federated Learning", arXiv 1911.11815 (label
flipping attack).
Departures: none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from secateur.contract.attack import Attack
from secateur.contract.state import Setting
from secateur.errors import ConfigError
from secateur.learning.task import Data, Task


@dataclass(frozen=True)
class LabelFlip(Attack):
    """Poisons the attackers' training rows; whatever they train, score, rank or vote follows from these."""

    def check(self, setting: Setting, task: Task) -> None:
        """Refuse targets that are no classes."""
        del setting
        if not task.classes:
            raise ConfigError("attack label_flip: the task learns numbers, which have no labels; take sign_flip")

    def poison(self, data: Data, classes: int) -> Data:
        """Return the rows with flipped labels."""
        return replace(data, y=classes - 1 - data.y)
