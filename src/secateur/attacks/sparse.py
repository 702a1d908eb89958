"""Sparse: attackers shift hard what a pruner holds dear, and stay within the spread elsewhere.

    mean - std (scale on the sensitive entries, z elsewhere);  z as in ``alie``

Sensitive are the entries of highest first-order saliency |w u|, which pruning at initialisation keeps (SNIP, FORCE): w
is the server's weight, u the mean honest change, which stands for the gradient that attackers do not have. A pruned
model has few weights that carry much each, so that this is the attack on what pruning leaves.

Reference: Ozfatura et al., "Aggressive or Imperceptible, or Both: Network Pruning Assisted Hybrid Byzantines in
Federated Learning", arXiv 2404.06230. *Read*: CRYPTO-KU/FL-Byzantine-Library (the sparse attack).
Departures: *reconstruction*: the published mask is made once, by FORCE or ERK on the attackers' data; ours is made in
every round, from what they see; scale and share are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from secateur.attacks.crowd import Moments, alie_z, flat, moments, single
from secateur.contract.attack import Attack, Cohort, Kind, Scene, with_tensors, within
from secateur.errors import check
from secateur.wire.message import Message


@dataclass(frozen=True)
class Sparse(Attack):
    """Sends mean - scale std on sensitive entries, mean - z std elsewhere.

    Attributes:
        scale: how many standard deviations on sensitive entries.
        z: how many elsewhere; 0: by the formula of ``alie``.
        share: the share of a model's entries that are sensitive.
        knows: whose replies the attackers see: those of ``all`` honest clients, or their ``own``.
    """

    fits: ClassVar[frozenset[Kind]] = frozenset({"weights"})
    colludes: ClassVar[bool] = True

    scale: float = 3.0
    z: float = 0.0
    share: float = 0.1
    knows: Literal["all", "own"] = "all"

    def __post_init__(self) -> None:
        within("scale", self.scale)
        within("z", self.z)
        check(0 < self.share <= 1, name="share", value=self.share, must="be above 0 and at most 1")

    def craft(self, message: Message, cohort: Cohort, scene: Scene) -> Message:
        """Return the common vector, under the attacker's own mask."""
        seen = cohort.once("moments", lambda: moments(cohort.seen(self.knows)))
        z = self.z or alie_z(len(cohort.honest) + len(cohort.own), len(cohort.own))
        dear = self.sensitive(seen, scene)
        shift = {name: torch.where(dear[name], self.scale, z) * std for name, std in seen.std.items()}
        return with_tensors(message, single({name: mean - shift[name] for name, mean in seen.mean.items()}))

    def sensitive(self, seen: Moments, scene: Scene) -> dict[str, torch.Tensor]:
        """Return flags of the sensitive entries, by name: the ``share`` of highest |w u| of all that can be pruned."""
        weights = [name for name in scene.setting.layout.names("weight") if name in seen.mean]
        scores = {n: (scene.base[n] * (seen.mean[n] - scene.base[n])).abs() for n in weights}
        ranked = flat(scores)
        kept = int((ranked > 0).sum())
        count = min(max(1, round(self.share * ranked.numel())), kept)
        least = ranked.topk(count).values[-1] if count else torch.inf
        return {
            name: scores[name] >= least if name in scores else torch.zeros_like(mean, dtype=torch.bool)
            for name, mean in seen.mean.items()
        }
