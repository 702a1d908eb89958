"""Narrow: all clients train the same smaller dense model; the control that a structured method has to beat.

    model   the leading ceil(w u) of each layer's u units, from theta_0
    round   FedAvg

Paper symbol -> option: width w: width.

Reference: Scratch-E and Scratch-B of Liu et al., "Rethinking the Value of Network Pruning", arXiv 1810.05270, where the
small model is trained from new initial weights; here its weights are drawn for the large one.
Departures: initial weights are those of the large model, so that runs of a seed share all draws.
Not reproduced: no published figure was targeted; it is a control of every comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

from secateur.contract.ask import Ask
from secateur.contract.client import Client
from secateur.contract.reducer import Reduced
from secateur.contract.state import Archive, Setting, State
from secateur.errors import check
from secateur.methods.kit.rounds import merged, train_ask, train_reply
from secateur.methods.kit.submodels import Narrowed
from secateur.pruning import mask as masks
from secateur.pruning.mask import Tensors
from secateur.wire.message import Message


@dataclass(frozen=True)
class Narrow(Narrowed):
    """Trains one narrower model on all clients.

    Attributes:
        width: w, the share of each layer's units that is kept; 1 is FedAvg.
    """

    width: float = 0.5

    def __post_init__(self) -> None:
        check(0 < self.width <= 1, name="width", value=self.width, must="be in (0, 1]")

    def start(self, setting: Setting, weights: Tensors, archive: Archive) -> State:
        """Return the first state: theta_0 under the mask of the width."""
        mask = None if self.width == 1 else self.mask(setting, self.leading(setting, self.width))
        return State(setting, 0, masks.apply(weights, mask), mask, archive=archive)

    def plan(self, state: State) -> Ask | None:
        """Ask the next cohort to train."""
        round_ = state.round + 1
        return train_ask(state, round_, state.mask) if round_ <= state.setting.rounds else None

    def respond(self, ask: Ask, client: Client) -> Message:
        """Train the narrow model."""
        return train_reply(ask, client)

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Merge by FedAvg."""
        return merged(state, reduced)
