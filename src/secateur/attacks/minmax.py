"""Min-max: the furthest vector whose distance to any honest one is no larger than that of the two furthest honest ones.

    mean + gamma p,  the largest gamma with max_i |mean + gamma p - x_i| <= max_ij |x_i - x_j|

p, the direction, is -std (the paper's strongest), -mean/|mean| (of the change) or -sign(mean).

Reference: Shejwalkar and Houmansadr, "Manipulating the Byzantine", NDSS 2021, equations 9 and 11.
Departures: gamma is exact, the least of the positive roots of one quadratic equation for each honest vector, where the
paper searches for it by halving.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from secateur.attacks.crowd import Moments, flat, moments, single, vectors
from secateur.contract.attack import Attack, Cohort, Kind, Scene, with_tensors
from secateur.pruning.mask import Tensors
from secateur.wire.message import Message


@dataclass(frozen=True)
class MinMax(Attack):
    """Sends mean + gamma p.

    Attributes:
        direction: p: ``std``, ``unit`` or ``sign``.
        knows: whose replies the attackers see: those of ``all`` honest clients, or their ``own`` (the paper's
            agnostic attack).
    """

    fits: ClassVar[frozenset[Kind]] = frozenset({"weights", "scores"})
    colludes: ClassVar[bool] = True

    direction: Literal["std", "unit", "sign"] = "std"
    knows: Literal["all", "own"] = "all"

    def craft(self, message: Message, cohort: Cohort, scene: Scene) -> Message:
        """Return the common vector, under the attacker's own mask."""
        if self.direction == "std":  # the others depend on what the attacker was sent
            return with_tensors(message, cohort.once("vector", lambda: self._vector(cohort, scene)))
        return with_tensors(message, self._vector(cohort, scene))

    def _vector(self, cohort: Cohort, scene: Scene) -> Tensors:
        messages = cohort.seen(self.knows)
        seen = cohort.once("moments", lambda: moments(messages))
        direction = self._direction(seen, scene)
        gamma = largest_gamma(vectors(messages), flat(seen.mean), flat(direction))
        return single({name: mean + gamma * direction[name] for name, mean in seen.mean.items()})

    def _direction(self, seen: Moments, scene: Scene) -> dict[str, torch.Tensor]:
        if self.direction == "std":
            return {name: -std for name, std in seen.std.items()}
        base: Tensors = scene.base
        moved = {name: mean - base[name].double() if name in base else mean for name, mean in seen.mean.items()}
        if self.direction == "sign":
            return {name: -move.sign() for name, move in moved.items()}
        norm = flat(moved).norm().clamp(min=1e-30)
        return {name: -move / norm for name, move in moved.items()}


def largest_gamma(points: torch.Tensor, centre: torch.Tensor, direction: torch.Tensor) -> float:
    """Return the largest gamma >= 0 at which centre + gamma direction is within the points' diameter of each of them.

    Args:
        points: shape (n, d), float64.
        centre: shape (d,); within that distance itself, as a mean of the points is.
        direction: shape (d,); 0 if it is 0.
    """
    length = float(direction.square().sum())
    if length == 0:
        return 0.0
    diameter = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").max()
    away = centre - points
    along = away @ direction
    room = (diameter.square() - away.square().sum(dim=1)).clamp(min=0)
    return float(((along.square() + length * room).sqrt() - along).min() / length)
