"""Mimic: all attackers send the reply of one honest client, which so counts several times over.

Nothing that they send is wrong. Where clients' data differ, whoever is over-represented pulls the model to itself, and
rules that trust a crowd (Krum, medians) follow. The client that is copied is the one furthest along the direction in
which honest replies differ most, z = argmax_|z|=1 sum_i <z, x_i - mean>^2: argmax_i |<z, x_i - mean>|, the earliest of
equals.

Reference: Karimireddy et al., "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", arXiv 2006.09365,
section 4.1.
Departures: direction and client are found anew in each round, from its replies alone; the paper follows z over the
first rounds and then stays with one client.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from secateur.attacks.crowd import vectors
from secateur.contract.attack import Attack, Cohort, Kind, Scene, floats, with_tensors
from secateur.wire.message import Message


@dataclass(frozen=True)
class Mimic(Attack):
    """Sends what one honest client sent; its vote too, where clients vote."""

    fits: ClassVar[frozenset[Kind]] = frozenset({"weights", "scores"})
    colludes: ClassVar[bool] = True

    def craft(self, message: Message, cohort: Cohort, scene: Scene) -> Message:
        """Return the honest client's tensors, with the attacker's own scalars."""
        if not cohort.honest:
            return message
        victim = cohort.honest[cohort.once("outermost", lambda: outermost(cohort.honest))]
        mask = victim.mask if "votes" in scene.kinds else message.mask
        return with_tensors(replace(message, mask=mask), floats(victim))


def outermost(messages: Sequence[Message]) -> int:
    """Return the place of the message that is furthest along the direction in which messages differ most."""
    points = vectors(messages)
    centred = points - points.mean(dim=0)
    # the products of all pairs have the same leading direction, seen from the messages, and are few
    leading = torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -1].abs()
    return int((leading >= leading.max() * (1 - 1e-9)).nonzero()[0])
