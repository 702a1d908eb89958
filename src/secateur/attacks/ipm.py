"""IPM, inner product manipulation: attackers send the opposite of the mean honest change.

    W - epsilon (mean - W)

With a small epsilon this stands among the honest vectors and holds a robust rule back; with f epsilon > K - f it turns
the mean of all round.

Reference: Xie et al., "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation", arXiv
1903.03936.
Departures: on changes of weights after local training, where the paper has gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from secateur.attacks.crowd import moments, single
from secateur.contract.attack import Attack, Cohort, Kind, Scene, change, changed, with_tensors, within
from secateur.wire.message import Message


@dataclass(frozen=True)
class IPM(Attack):
    """Sends -epsilon times the mean change.

    Attributes:
        epsilon: the factor; the paper tries 0.1 to 100.
        knows: whose replies the attackers see: those of ``all`` honest clients, or their ``own``.
    """

    fits: ClassVar[frozenset[Kind]] = frozenset({"weights", "scores"})
    colludes: ClassVar[bool] = True

    epsilon: float = 0.5
    knows: Literal["all", "own"] = "all"

    def __post_init__(self) -> None:
        within("epsilon", self.epsilon)

    def craft(self, message: Message, cohort: Cohort, scene: Scene) -> Message:
        """Return the opposite of the mean change, under the attacker's own mask."""
        mean = with_tensors(message, single(cohort.once("moments", lambda: moments(cohort.seen(self.knows))).mean))
        return changed(message, {n: -self.epsilon * x for n, x in change(mean, scene).items()}, scene)
