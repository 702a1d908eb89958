"""Divide and conquer: clients that stand out along the direction in which updates differ most are left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.aggregation import Holding
from secateur.aggregation.robust import (
    Combined,
    Robust,
    Weights,
    check_hostile,
    chosen,
    hostile_of,
    without_highest,
)
from secateur.aggregation.updates import FEWEST, Updates
from secateur.contract.state import State
from secateur.errors import check
from secateur.streams import stream


@dataclass(frozen=True)
class Dnc(Robust):
    """The mean update of those clients that stand out in none of several samples of coordinates.

    Of each sample, v is the first right singular vector of the updates less their mean, and the share ``remove`` f of
    the highest <Delta_k - mean, v>^2 is left out. Samples are of surviving weights; those left out are under suspicion,
    in honest rounds as well. If the samples leave nobody, the one that is left out of the fewest counts. It needs
    K >= 2 f + 1 clients, and memory for K times ``sample`` numbers.

    Attributes:
        hostile: the share of the clients assumed to be hostile; f of K clients is ceil(hostile K).
        remove: c, how many are left out of each sample for each hostile one.
        sample: how many coordinates a sample has.
        samples: how many samples are drawn.
        weights: what those kept weigh: one each, or by ``rows`` up to the cohort's 90th percentile.
        then: the server's step.

    Reference: Shejwalkar and Houmansadr, "Manipulating the Byzantine: Optimizing Model Poisoning Attacks and Defenses
    for Federated Learning", NDSS 2021. *Read*: CRYPTO-KU/FL-Byzantine-Library (aggregators/dnc.py) and JiiahaoXU/LASA
    (algorithms/defense/dnc.py), which draws one sample of 1,000.
    """

    serves: ClassVar[frozenset[Holding]] = frozenset({"shared", "own"})

    hostile: float = 0.2
    remove: float = 1.0
    sample: int = 10_000
    samples: int = 5
    weights: Weights = "equal"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_hostile(self.hostile)
        check(self.remove > 0, name="aggregator.remove", value=self.remove, must="be above 0")
        check(self.sample >= 1, name="aggregator.sample", value=self.sample, must="be at least 1")
        check(self.samples >= 1, name="aggregator.samples", value=self.samples, must="be at least 1")

    def needs(self, clients: int) -> int:
        """Return 2 f + 1, and one more than are left out of a sample."""
        hostile = hostile_of(self.hostile, clients)
        return max(FEWEST, 2 * hostile + 1, self._removed(clients) + 1)

    def why(self, holding: Holding) -> str:
        """Return why parts of the model cannot be compared so."""
        del holding
        return "clients with different parts differ most by their parts"

    def _removed(self, clients: int) -> int:
        return int(self.remove * hostile_of(self.hostile, clients) + 1e-9)

    def combine(self, updates: Updates, state: State) -> Combined:
        """Return the mean update of the clients that no sample leaves out."""
        missed, turn = torch.zeros(len(updates.clients), dtype=torch.int64), state.round + 1
        streams = [stream(state.setting.seed, "dnc", turn, number) for number in range(self.samples)]
        drawn = [torch.randperm(updates.size, generator=draw)[: self.sample].sort().values for draw in streams]
        for values, held in _sampled(updates, drawn):
            missed += ~without_highest(outlying(values, held), self._removed(len(missed)))
        keep = missed == missed.min()
        why = {
            client: f"it stands out in {count} of {self.samples} samples"
            for client, count, kept in zip(updates.clients, missed.tolist(), keep.tolist(), strict=True)
            if not kept
        }
        return chosen(updates, keep, self.weights), keep, why


def outlying(values: torch.Tensor, held: torch.Tensor | None) -> torch.Tensor:
    """Return <Delta_k - mean, v>^2 of each client, v being the direction in which they differ most.

    Args:
        values: the updates, shape (clients, coordinates), float64.
        held: who holds what, as numbers; a client is at the mean where it holds nothing. None: everybody holds all.
    """
    if held is None:
        centred = values - values.mean(dim=0)
    else:
        centred = (values - values.sum(dim=0) / held.sum(dim=0).clamp(min=1)) * held
        centred *= (held.shape[1] / held.sum(dim=1, keepdim=True).clamp(min=1)).sqrt()
    spread, sides = torch.linalg.eigh(centred @ centred.T)  # of the small side: v itself is not needed
    score: torch.Tensor = spread[-1].clamp(min=0.0) * sides[:, -1].square()
    return score


def _sampled(updates: Updates, drawn: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Yield, for each sample of places among the coordinates that somebody holds, the updates there and who holds them.

    One pass over the blocks serves all samples.
    """
    values: list[list[torch.Tensor]] = [[] for _ in drawn]
    flags: list[list[torch.Tensor]] = [[] for _ in drawn]
    start, differ = 0, False
    for block in updates.blocks():
        end = start + block.values.shape[1]
        for places, found, held in zip(drawn, values, flags, strict=True):
            within = places[(places >= start) & (places < end)] - start
            found.append(block.values[:, within].double())
            held.append(block.flags[:, within])
        differ, start = differ or block.held is not None, end
    for found, held in zip(values, flags, strict=True):
        yield torch.cat(found, dim=1), torch.cat(held, dim=1) if differ else None
