"""Aggregation: from the replies of a round to the server's next weights; one file a rule, found by listing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch

from secateur.contract.ask import Ask
from secateur.contract.client import Client
from secateur.contract.reduction import Mean, Reduction, masks_of
from secateur.contract.state import Memory, Setting, State
from secateur.pruning.mask import Mask, Tensors

Pruned = Literal["zero", "shadow", "decay"]

Holding = Literal["shared", "own", "slices"]
"""How clients hold the model in a round: all under one mask or none, answering under masks of their own, or each the
part that the server sends it."""


class Aggregator(ABC):
    """Base of aggregators, which turn the trained weights of a round into the server's next ones; frozen dataclasses.

    A server optimiser writes ``step``, and keeps the mean as its ``reduction``. A robust rule derives from
    ``aggregation.robust.Robust``, and says what single replies become.
    """

    @property
    def pruned(self) -> Pruned:
        """Return what the server does with its value of a pruned weight: sets it to ``zero``, keeps or decays it."""
        return "zero"

    @property
    def coverage(self) -> bool:
        """Return whether each coordinate is averaged over only the clients that kept it, if replies have masks."""
        return False

    def reduction(self, *, masked: bool) -> Reduction:
        """Return the reduction of a round's replies to tensors by name, empty without replies; here their mean by rows.

        Args:
            masked: whether replies have masks, which may differ from client to client.
        """
        return Mean(holders=masks_of if self.coverage and masked else None)

    @property
    def fewest(self) -> int:
        """Return how many clients must hold a coordinate for it to move."""
        return 1

    def over_holders(self) -> Reduction:
        """Return the reduction where clients hold different parts of the model; a weight that nobody holds stays."""
        return Mean(holders=masks_of, fallback="state")

    def ballot(self, votes: Mapping[str, Reduction]) -> Mapping[str, Reduction]:
        """Return the reductions of clients' own masks, by name; here those that the consensus wants, of everybody's."""
        return votes

    def check(self, setting: Setting, holding: Holding, method: str) -> None:  # noqa: B027 -- a mean serves all
        """Refuse a federation that the rule cannot serve; called before any client is asked.

        Args:
            setting: the federation.
            holding: how clients hold the model.
            method: the name of the method's class, for the error's text.

        Raises:
            ConfigError: the text names the rule and the method, and says what would go.
        """

    def in_place_of(self, before: Aggregator) -> Aggregator:
        """Return the rule as it is when a study chooses it instead of the one that its method has."""
        del before
        return self

    @property
    def refines(self) -> bool:
        """Return whether the server itself trains before each round; see ``refine``."""
        return False

    def refine(self, state: State, ask: Ask, server: Client) -> tuple[State, int]:
        """Return the state with what the rule needs of the server's own training, and the rows processed.

        Args:
            state: the server's state.
            ask: what the next cohort will be asked.
            server: the server seen as a client, with the rows of ``data.public``.
        """
        del ask, server
        return state, 0

    @abstractmethod
    def step(
        self, weights: Tensors, mean: Tensors, *, mask: Mask | None, memory: Memory
    ) -> tuple[dict[str, torch.Tensor], Memory]:
        """Return the next weights and the next memory.

        Args:
            weights: the server's weights W, by name.
            mean: the reduced replies, by name; the shapes are those of the weights.
            mask: the mask under which clients trained; None: nothing was pruned.
            memory: what earlier steps kept, such as a momentum.
        """
