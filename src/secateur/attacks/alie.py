"""ALIE, "a little is enough": all attackers send one vector just within the spread of the honest ones.

    mean - z std, entry by entry;  z = Phi^-1((K - f - s)/(K - f)),  s = floor(K/2 + 1) - f

so that s honest clients, enough for a majority with the f attackers, stand further from the mean than the attackers do.

Reference: Baruch et al., "A Little Is Enough: Circumventing Defenses For Distributed Learning", arXiv 1902.06156,
algorithm 3.
Departures: the paper's attackers estimate mean and deviation from their own replies (``knows = "own"``); by default
they see the honest ones, which is worse for the federation. Over own masks both are of an entry's holders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from secateur.attacks.crowd import alie_z, moments, single
from secateur.contract.attack import Attack, Cohort, Kind, Scene, with_tensors, within
from secateur.wire.message import Message


@dataclass(frozen=True)
class ALIE(Attack):
    """Sends mean - z std.

    Attributes:
        z: how many standard deviations; 0: by the formula, which gives 0.16 for 4 of 20 clients and 0.37 for 6 of 20.
        knows: whose replies the attackers see: those of ``all`` honest clients, or their ``own``.
    """

    fits: ClassVar[frozenset[Kind]] = frozenset({"weights", "scores"})
    colludes: ClassVar[bool] = True

    z: float = 0.0
    knows: Literal["all", "own"] = "all"

    def __post_init__(self) -> None:
        within("z", self.z)

    def craft(self, message: Message, cohort: Cohort, scene: Scene) -> Message:
        """Return the common vector, under the attacker's own mask."""
        del scene
        seen = cohort.once("moments", lambda: moments(cohort.seen(self.knows)))
        z = self.z or alie_z(len(cohort.honest) + len(cohort.own), len(cohort.own))
        return with_tensors(message, single({n: mean - z * seen.std[n] for n, mean in seen.mean.items()}))
