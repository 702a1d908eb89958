"""The method contract: what a new algorithm writes.

A method is three functions over an explicit, checkpointable state:

    plan(state)            -> Ask | None      server: what to ask whom next, and what becomes of the replies
    respond(ask, client)   -> Message         client: explore, train, vote ...
    absorb(state, reduced) -> state           server: merge what the replies became

Every phase (exploration, vote, calibration) is one more ``Ask``; the round loop knows none of them by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from secateur.contract.ask import EVALUATE, SCORES, Ask
from secateur.contract.client import Client
from secateur.contract.reducer import Reduced
from secateur.contract.state import Archive, Setting, State
from secateur.pruning.mask import Mask, Tensors
from secateur.wire.message import Expected, Message


class Method(ABC):
    """Base of all methods: frozen dataclasses whose fields are their options, defaulting to the paper's.

    Attributes:
        recommended: fields of ``Training``, by name, that the method needs where it learns something other than
            weights: scores, signs or thresholds have an optimiser and a rate of their own. They hold wherever a study
            or a suite's variant says nothing else. Methods that learn weights leave it empty, so that they are
            compared under one training.
    """

    recommended: ClassVar[Mapping[str, str | float]] = {}

    @property
    def regrows(self) -> bool:
        """Return whether a pruned weight may come back; masks are nested otherwise."""
        return False

    @property
    def trains_weights(self) -> bool:
        """Return whether the federation learns weights; else masks or signs over weights that stay what they were."""
        return True

    def start(self, setting: Setting, weights: Tensors, archive: Archive) -> State:
        """Return the state before anything was asked."""
        return State(setting, 0, weights, archive=archive)

    @property
    def personal(self) -> bool:
        """Return whether every client ends with a model of its own: runs are then scored on clients' test rows."""
        return False

    @abstractmethod
    def plan(self, state: State) -> Ask | None:
        """Return what to ask next, or None when the run is finished."""

    @abstractmethod
    def respond(self, ask: Ask, client: Client) -> Message:
        """Return a client's reply; ``REPORT``'s scalars included."""

    @abstractmethod
    def absorb(self, state: State, reduced: Reduced) -> State:
        """Return the state after the replies to ``reduced.ask``; they may be none."""

    def check(self, setting: Setting) -> None:  # noqa: B027 -- most methods serve any model
        """Refuse a federation or a model that the method cannot serve; called before anything is asked.

        Raises:
            ModelError: the text says what is missing, and what to do.
        """

    def remarks(self, setting: Setting) -> list[str]:
        """Return what the method does otherwise on this model than its paper says, in a line each; it is recorded."""
        del setting
        return []

    def accepts(self, setting: Setting) -> Expected:
        """Return what a client of this method is ready to receive."""
        return Expected(setting.specs, mask="optional")

    def final(self, state: State) -> State:
        """Return the state whose model is shipped."""
        return state

    def widths(self, state: State) -> Mapping[str, Mask]:
        """Return the narrower models that the shipped one holds, by name; each is scored at the end of a run."""
        del state
        return {}

    @property
    def refines(self) -> bool:
        """Return whether the server computes with the model itself; see ``refine``."""
        return False

    @property
    def wants_public(self) -> bool:
        """Return whether the server trains on public rows (``data.public``)."""
        return False

    def refine(self, state: State, server: Client) -> tuple[State, int]:
        """Return the state after the server's own work, before round 1 and after each, and rows processed for it.

        ``server`` is the server seen as a client: the resident model, its public rows, the clients' training.
        """
        del server
        return state, 0

    def histograms(self, state: State) -> Mapping[str, Mapping[str, list[int]]]:
        """Return what the method measured of each weight, for a drawing: by name and tensor, counts in even bins."""
        del state
        return {}

    def examine(self, state: State) -> Ask:
        """Return the ask by which all clients score the model on rows of their own that they hold out."""
        everyone = tuple(range(state.setting.clients))
        return Ask(
            EVALUATE, state.round, everyone, Message(state.model(), state.mask), Expected({}, scalars=SCORES), {}
        )

    def uses(self, message: Message, client: Client) -> Tensors:
        """Return the model that a client scores when it is sent ``examine``'s message; client side."""
        del client
        return message.tensors
