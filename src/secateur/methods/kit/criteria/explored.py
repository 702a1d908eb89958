"""A criterion from an exploration before the federation starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from secateur.contract.ask import Ask
from secateur.contract.client import Client
from secateur.contract.reducer import Reduced
from secateur.contract.state import State
from secateur.methods.kit import exploration
from secateur.methods.kit.criteria import Criterion
from secateur.methods.kit.merging import Merge, merged
from secateur.pruning.criteria import Exploration, Scope, guidance, min_max
from secateur.pruning.mask import Mask, Tensors
from secateur.wire.message import Message


@dataclass(frozen=True)
class Deviation(Criterion):
    """The guidance G of AutoFLIP: how far explorers moved each weight, scaled to [0, 1].

    d = mean_k D_k,  G = (d - min d) / (max d - min d) for each tensor; G = 1 if max = min, so that a
    constant tensor is never pruned and never NaN.

    Attributes:
        explore: the settings of the exploration.
        normalise: scale ``after`` the mean over explorers (the published code), or ``before`` it, client by client
            (FedLEx's figure; a client with huge deviations then counts no more than another).
        merge: what becomes of explorers' deviations, their ``mean``, ``median`` or ``trimmed`` mean; see
            ``methods.kit.merging``.
        scope: take minimum and maximum of each ``tensor``, or of the whole model (``global``).

    Reference: AutoFLIP, arXiv 2405.10271, the pruning guidance matrix; reconstructed, the full text was not
    available.
    """

    explore: Exploration = field(default_factory=Exploration)
    normalise: Literal["after", "before"] = "after"
    scope: Scope = "tensor"
    merge: Merge = "mean"

    def scores(self, weights: Tensors, statistics: Iterable[Tensors], *, seed: int) -> dict[str, torch.Tensor]:
        """Return G in float64; weights without a statistic (buffers) have no score."""
        del weights, seed
        before = self.normalise == "before"
        if self.merge == "mean":
            return guidance(statistics, before=before, scope=self.scope)
        parts = (min_max(part, self.scope) if before else part for part in statistics)
        found = merged(parts, self.merge)
        return found if before else min_max(found, self.scope)

    def ask(self, state: State, *, due: bool) -> Ask | None:
        """Ask the explorers for their deviations before round 1."""
        del due
        return exploration.ask(self.explore, state)

    def respond(self, ask: Ask, client: Client) -> Message:
        """Explore, and return the deviations."""
        return exploration.respond(self.explore, ask, client)

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Keep each explorer's deviations in the archive."""
        return exploration.absorb(self.explore, state, reduced)

    def statistics(self, state: State, cohort: tuple[int, ...] | None) -> Iterable[Tensors] | None:
        """Return D_k of the explorers in the cohort, or of all explorers if the cohort has none."""
        explored = exploration.known(state)
        return exploration.deviations(state, cohort) if explored else None

    def own(self, client: Client, weights: Tensors, mask: Mask | None, round_: int) -> tuple[Tensors | None, int]:
        """Return the client's own D_k; None if it never explored, or lost it."""
        del weights, mask, round_
        return {n: t for n, t in client.memory.items() if n in client.setting.specs} or None, 0

    @property
    def by_training(self) -> int | None:
        """Return the explorers' epochs if each starts from theta_0 and sends D_k only, otherwise None."""
        plain = self.explore.start == "common" and self.explore.base == "initial" and not self.explore.warm_start
        return self.explore.epochs if plain else None

    def histograms(self, state: State) -> Mapping[str, Mapping[str, list[int]]]:
        """Return histograms of the guidance over [0, 1], in 40 bins."""
        deviations = self.statistics(state, None)
        scores = {} if deviations is None else self.scores(state.weights, deviations, seed=state.setting.seed)
        names = state.setting.layout.names("weight")
        counts = {n: torch.histc(scores[n].double(), 40, 0, 1).int().tolist() for n in names if n in scores}
        return {"guidance": counts} if counts else {}
