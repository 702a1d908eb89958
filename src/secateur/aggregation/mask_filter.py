"""The mask filter: clients whose masks have little in common with the others' are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from secateur.aggregation import Holding
from secateur.aggregation.robust import Combined, Robust, Weights, chosen, stand_out
from secateur.aggregation.updates import FEWEST, Single, Updates, held_of
from secateur.contract.reduction import Made, Reduction, Sum, masks_of
from secateur.contract.reply import Reply, Sent
from secateur.contract.state import State
from secateur.contract.suspects import Sifted
from secateur.contract.weighted import Accumulator
from secateur.wire.message import Expected

_DEVIATIONS = 3.0


@dataclass(frozen=True)
class MaskFilter(Robust):
    """The mean update of the clients whose masks are like the others', and the votes of these alone.

    J_k is the median of |M_k and M_j| / |M_k or M_j| over the other clients j. A client is left out, and under
    suspicion, if J_k is more than three median absolute deviations below the median of all. It says nothing of values:
    a lie under an honest mask passes. It reads the masks in blocks: K^2 multiplications for a coordinate.

    Attributes:
        weights: what those kept weigh: one each, or by ``rows`` up to the cohort's 90th percentile.
        then: the server's step.

    Reference: *reconstruction* of the structural filter of SafeSparse, arXiv 2505.01454, from its abstract.
    """

    serves: ClassVar[frozenset[Holding]] = frozenset({"own"})

    weights: Weights = "equal"

    def why(self, holding: Holding) -> str:
        """Return why there is nothing to compare."""
        del holding
        return "it compares masks that clients made themselves"

    def combine(self, updates: Updates, state: State) -> Combined:
        """Return the mean update of the clients whose masks are like the others'."""
        del state
        found = likeness(updates.overlaps())
        keep = alike(found)
        return chosen(updates, keep, self.weights), keep, stand_out(updates, keep, "mask's likeness", found)

    def ballot(self, votes: Mapping[str, Reduction]) -> Mapping[str, Reduction]:
        """Return the consensus' reductions of the masks that are like the others'."""
        return {name: OfAlike(inner=reduction) for name, reduction in votes.items()}


@dataclass(frozen=True)
class OfAlike(Single):
    """A reduction of masks, of those alone that are like the others'."""

    of: Made = held_of
    inner: Reduction = field(default_factory=lambda: Sum(masks_of))

    def check(self, expects: Expected, clients: Sequence[int]) -> None:
        """Refuse what the inner reduction refuses."""
        super().check(expects, clients)
        self.inner.check(expects, clients)

    def finish(self, accumulator: Accumulator, state: State) -> Sifted:  # type: ignore[override]
        """Return the inner reduction of the masks that are like the others'."""
        updates, total = self.updates(accumulator, state), self.inner.zero(accumulator["spool"])
        enough = len(updates.clients) >= FEWEST
        keep = alike(likeness(updates.overlaps())).tolist() if enough else [True] * len(updates.clients)
        sent = Sent(state.setting, lambda: ({}, None))
        for place, client in enumerate(updates.clients):
            if keep[place]:
                reply = Reply(client, int(updates.rows[place]), {}, updates.mask(place), {})
                total = self.inner.add(total, reply, sent)
        left = (client for client, kept in zip(updates.clients, keep, strict=True) if not kept)
        return Sifted(
            self.inner.finish(total, state), dict.fromkeys(left, "mask_filter: its mask is unlike the others'")
        )


def likeness(overlaps: torch.Tensor) -> torch.Tensor:
    """Return the median of each client's Jaccard indices with the others; ``overlaps`` has shape (K, K), K > 1."""
    others = ~torch.eye(len(overlaps), dtype=torch.bool)
    return overlaps[others].reshape(len(overlaps), -1).quantile(0.5, dim=1)


def alike(found: torch.Tensor) -> torch.Tensor:
    """Return flags of the clients that are not more than three median absolute deviations below the median."""
    usual = found.quantile(0.5)
    return found >= usual - _DEVIATIONS * (found - usual).abs().quantile(0.5)
