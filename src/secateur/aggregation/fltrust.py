"""FLTrust: updates count as far as they point where the server's own one points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.aggregation import Holding
from secateur.aggregation.robust import Combined, Robust
from secateur.aggregation.updates import Updates
from secateur.contract.ask import Ask
from secateur.contract.client import Client
from secateur.contract.state import Memory, State
from secateur.errors import ConfigError
from secateur.pruning.mask import Mask, Tensors

_TRUSTED = "trusted"


@dataclass(frozen=True)
class Fltrust(Robust):
    """sum_k t_k (|a_0| / |a_k|) a_k / sum_k t_k, with t_k = max(0, cos(a_k, a_0)) and a_0 the server's own update.

    Before each round the server trains on its public rows (``data.public``, a hundred or more) from the weights that
    clients are sent, under the same mask. If nobody points in its direction, the model stays. Clients with t_k = 0 are
    under suspicion. Its cost beside the server's training is two passes over the replies in blocks.

    Attributes:
        then: the server's step.

    Reference: Cao et al., "FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping", arXiv 2012.13995.
    """

    serves: ClassVar[frozenset[Holding]] = frozenset({"shared", "own"})

    @property
    def refines(self) -> bool:
        """Return True: the server trains before each round."""
        return True

    def why(self, holding: Holding) -> str:
        """Return why the server's update is no measure for parts of the model."""
        del holding
        return "the server's update is that of the whole model, and a part of it trains otherwise"

    def refine(self, state: State, ask: Ask, server: Client) -> tuple[State, int]:
        """Return the state with the server's own update from what the next cohort is sent, and the rows processed.

        Raises:
            ConfigError: the server has no rows.
        """
        if not len(server.data):
            raise ConfigError("aggregator fltrust trains at the server: give it rows with data.public = N, 100 or more")
        sent, mask = ask.message.tensors, ask.message.mask
        trained, done = server.train(sent, mask, round_=ask.round)
        names = [name for name in trained if name not in state.setting.layout.names("buffer")]
        own = {name: trained[name] - sent[name] for name in names}
        return State(**{**vars(state), "memory": {**state.memory, _TRUSTED: own}}), done.processed

    def combine(self, updates: Updates, state: State) -> Combined:
        """Return the mean of the updates by trust, each as long as the server's own."""
        own = {name: part.reshape(-1).double() for name, part in state.memory[_TRUSTED].items()}
        inner, mine, theirs = (torch.zeros(len(updates.clients), dtype=torch.float64) for _ in range(3))
        for block in updates.blocks():
            values, direction = block.values.double(), own[block.name][block.where]
            inner += values @ direction
            theirs += values.square().sum(dim=1)
            mine += block.flags @ direction.square()
        length = (mine.sqrt() * theirs.sqrt()).clamp(min=1e-300)
        trust = (inner / length).clamp(min=0.0)
        ratio = mine.sqrt() / theirs.sqrt().clamp(min=1e-300)
        away = (client for client, one in zip(updates.clients, trust.tolist(), strict=True) if one <= 0)
        why = dict.fromkeys(away, "it does not point where the server's own update points")
        keep = trust > 0 if bool((trust > 0).any()) else None
        return updates.weighed(trust * ratio, trust), keep, why

    def step(
        self, weights: Tensors, mean: Tensors, *, mask: Mask | None, memory: Memory
    ) -> tuple[dict[str, torch.Tensor], Memory]:
        """Return the next weights, and the memory without the server's update, which was of this round."""
        after, memory = super().step(weights, mean, mask=mask, memory=memory)
        return after, {name: group for name, group in memory.items() if name != _TRUSTED}
