"""Reputations: who sends updates like the others' gains one, and is rewarded by it; see ``methods.rffl``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from secateur.contract.reduction import Keep
from secateur.contract.state import State
from secateur.contract.suspects import Sifted
from secateur.contract.weighted import Accumulator
from secateur.pruning.allocation import lowest
from secateur.pruning.mask import Mask, Tensors

STANDING, REPUTATION, REPUTABLE = "standing", "reputation", "reputable"
"""The group of the server's memory that holds reputations, and its tensors: r, and who may have one."""

_FIRST_REMOVAL = 11


@dataclass(frozen=True)
class Standing(Keep):
    """The aggregate of updates by reputation, the new reputations, and under suspicion who is removed for their sake.

    Attributes:
        norm, alpha, threshold: see ``RFFL``.
    """

    norm: float = field(kw_only=True)
    alpha: float = field(kw_only=True)
    threshold: float = field(kw_only=True)

    def finish(self, accumulator: Accumulator, state: State) -> Sifted:  # type: ignore[override]
        """Return the aggregate by name, ``reputation`` and ``reputable``; nothing without replies."""
        kept = super().finish(accumulator, state)
        if not kept:
            return Sifted({})
        before, members = state.memory[STANDING][REPUTATION], state.memory[STANDING][REPUTABLE]
        factors = {client: shortening(kept[client], self.norm) for client in kept}
        total: dict[str, torch.Tensor] = {}
        for client, factor in factors.items():
            for name, change in kept[client].items():
                part = change.double() * factor * before[client]
                total[name] = total[name] + part if name in total else part
        likeness = {client: cosine(kept[client], total) for client in kept}
        after = reputations(before, likeness, members, self.alpha)
        out: dict[int, str] = {}
        if state.round + 1 >= _FIRST_REMOVAL:
            least = self.threshold / max(1, int(members.sum()))
            low = [client for client in likeness if bool(members[client]) and float(after[client]) < least]
            out = {who: f"rffl: its reputation fell to {float(after[who]):.3g}, below {least:.3g}" for who in low}
            members = members.clone()
            members[low] = False
            after = normalised(torch.where(members, after, torch.zeros(()).double()), after)
        aggregate = {name: part.float() for name, part in total.items()}
        return Sifted({**aggregate, REPUTATION: after, REPUTABLE: members}, out)


def reputations(
    before: torch.Tensor, likeness: Mapping[int, float], members: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Return the reputations after a round, which add up to 1.

    Args:
        before: r, shape (clients,).
        likeness: the cosine of each client of the round with the aggregate.
        members: who is reputable; others have none.
        alpha: the weight of the past.
    """
    after = before.clone()
    for client, one in likeness.items():
        after[client] = alpha * before[client] + (1 - alpha) * one
    return normalised(torch.where(members, after, torch.zeros(()).double()), before)


def normalised(reputation: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Return reputations divided by their sum; those of before if that is not above 0."""
    total = float(reputation.sum())
    return reputation / total if total > 0 else before


def cosine(one: Tensors, other: Tensors) -> float:
    """Return the cosine of two updates; 0 if one of them is 0."""
    inner = sum(float((change.double() * other[name].double()).sum()) for name, change in one.items())
    lengths = _length(one) * _length(other)
    return inner / lengths if lengths > 0 else 0.0


def shortening(update: Tensors, norm: float) -> float:
    """Return the factor by which an update is made as long as ``norm``; 1 if it is no longer."""
    length = _length(update)
    return norm / length if length > norm else 1.0


def scaled(update: Tensors, factor: float) -> dict[str, torch.Tensor]:
    """Return an update times a factor."""
    return {name: change * factor for name, change in update.items()}


def largest(update: Tensors, share: float) -> Mask:
    """Return the mask of the ceil(share n) largest of each tensor's n entries, by magnitude.

    >>> largest({"w": torch.tensor([0.1, -3.0, 2.0])}, 0.5)["w"].tolist()
    [False, True, True]
    """
    found = {}
    for name, change in update.items():
        gone = change.numel() - math.ceil(share * change.numel() - 1e-9)
        found[name] = ~lowest(change.abs().reshape(-1), gone).reshape(change.shape)
    return found


def _length(update: Tensors) -> float:
    return math.sqrt(sum(float(change.double().square().sum()) for change in update.values()))
