"""The method contract: the functions that a new algorithm writes.

A method is three functions over an explicit, checkpointable state:

    plan(state)            -> Ask | None      server: the next request, and how its replies are reduced
    respond(ask, client)   -> Message         client: explore, train, vote ...
    absorb(state, reduced) -> state           server: the next state, from the reduced replies

Every phase (exploration, vote, calibration) is one more ``Ask``; the round loop knows none of them by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import ClassVar

from secateur.contract.ask import EVALUATE, SCORES, Ask
from secateur.contract.client import Client
from secateur.contract.reducer import Reduced
from secateur.contract.state import Archive, Setting, State
from secateur.errors import ModelError
from secateur.pruning.mask import Mask, Tensors
from secateur.wire.message import Expected, Message


def check_prunable(names: Collection[str]) -> None:
    """Refuse a model of which no tensor can be pruned; ``names`` are those that can.

    Raises:
        ModelError: there is none.
    """
    if not names:
        raise ModelError(
            "nothing of this model can be pruned: none of its layers' weights is trained, and frozen parameters, "
            "biases, norms, scales and what parametrisations compute weights from are not pruned; train a layer, or "
            "use fedavg"
        )


class Method(ABC):
    """Base of all methods: frozen dataclasses whose fields are their options, defaulting to the paper's.

    Attributes:
        recommended: fields of ``Training``, by name, for methods that learn something other than weights: scores, signs
            and thresholds need their own optimiser and rate. They are used unless a study or a suite's variant says
            otherwise. Methods that learn weights leave it empty, so that they are compared under one training.
        later: options that came after a method's first runs had names; at their defaults they change none.
    """

    recommended: ClassVar[Mapping[str, str | float]] = {}
    later: ClassVar[frozenset[str]] = frozenset()

    @property
    def regrows(self) -> bool:
        """Return whether a pruned weight may come back; if not, each mask lies within the one before."""
        return False

    @property
    def trains_weights(self) -> bool:
        """Return whether the federation learns weights; False: masks, signs or thresholds over weights that stay."""
        return True

    def start(self, setting: Setting, weights: Tensors, archive: Archive) -> State:
        """Return the first state, before any client is asked; ``weights`` are theta_0."""
        return State(setting, 0, weights, archive=archive)

    @property
    def personal(self) -> bool:
        """Return whether every client ends with its own model; runs are then scored on the clients' test rows."""
        return False

    @abstractmethod
    def plan(self, state: State) -> Ask | None:
        """Return the next ask, or None when the run is finished."""

    @abstractmethod
    def respond(self, ask: Ask, client: Client) -> Message:
        """Return a client's reply, with the scalars of ``REPORT``."""

    @abstractmethod
    def absorb(self, state: State, reduced: Reduced) -> State:
        """Return the state after an exchange, from the reduced replies to ``reduced.ask``; there may be no reply."""

    def check(self, setting: Setting) -> None:
        """Refuse a federation or a model that the method cannot serve; called before any client is asked.

        Raises:
            ModelError: the model lacks something; the text says what, and what to do. By default: it has no weights.
        """
        check_prunable(setting.layout.names("weight"))

    def remarks(self, setting: Setting) -> list[str]:
        """Return a line for each departure from the paper that this model causes; the run's records repeat them."""
        del setting
        return []

    def accepts(self, setting: Setting) -> Expected:
        """Return what requests to a client of this method may look like."""
        return Expected(setting.specs, mask="optional")

    def final(self, state: State) -> State:
        """Return the state whose model is shipped, from the last state of the run."""
        return state

    def widths(self, state: State) -> Mapping[str, Mask]:
        """Return the masks of narrower models within the shipped one, by name; each is scored at the end of a run."""
        del state
        return {}

    @property
    def refines(self) -> bool:
        """Return whether the server itself computes with the model; see ``refine``."""
        return False

    @property
    def wants_public(self) -> bool:
        """Return whether the server trains on public rows (``data.public``)."""
        return False

    def refine(self, state: State, server: Client) -> tuple[State, int]:
        """Return the state after the server's own work, and the rows processed; called before round 1 and after each.

        ``server`` is the server seen as a client: the resident model, the public rows, the clients' training settings.
        """
        del server
        return state, 0

    def histograms(self, state: State) -> Mapping[str, Mapping[str, list[int]]]:
        """Return histograms of the method's weight scores: by name and tensor, counts in bins of equal width."""
        del state
        return {}

    def examine(self, state: State) -> Ask:
        """Return the ask by which all clients score the model on their own held-out rows."""
        everyone = tuple(range(state.setting.clients))
        return Ask(
            EVALUATE, state.round, everyone, Message(state.model(), state.mask), Expected({}, scalars=SCORES), {}
        )

    def uses(self, message: Message, client: Client) -> Tensors:
        """Return the model that a client scores when it gets the message of ``examine``; called at the client."""
        del client
        return message.tensors
