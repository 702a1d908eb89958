"""HeteroFL: clients of different strength train nested widths of one model.

    widths   client k has width 2^-(k mod L) and holds the leading ceil(2^-(k mod L) u) of each hidden layer's u units
    merge    each weight is the mean over those clients that held it, by rows; one that nobody held stays

Paper symbol -> option: number of computation complexity levels L: levels.

Reference: Diao et al., "HeteroFL", arXiv 2010.01264. *Read*: the published code and Flower's reproduction of it.
Departures: no scaler (activations divided by the width), no static batch norm, no masked loss for labels that a client
lacks; strength follows from the client's number; layers without removable units (residual sums, group norm) stay whole.
Not reproduced: 87.5 % with five widths (CIFAR-10, PreResNet-18) is claimed; we did not run that setting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from secateur.errors import check
from secateur.method import Ask, Client, Method, Replies, Setting, State, absorb_slices, report, slice_ask
from secateur.pruning.mask import Mask
from secateur.pruning.structure import slice_of
from secateur.wire.message import Message


@dataclass(frozen=True)
class HeteroFL(Method):
    """Nested widths.

    Attributes:
        levels: L, how many widths: 1, 1/2, 1/4, ...; 1 is FedAvg.
    """

    levels: int = 3

    def __post_init__(self) -> None:
        check(1 <= self.levels <= 16, name="levels", value=self.levels, must="be 1 to 16")

    def plan(self, state: State) -> Ask | None:
        """Give each client of the next cohort its width."""
        round_ = state.round + 1
        if round_ > state.setting.rounds:
            return None
        slices = {client: self.width(state.setting, client) for client in state.setting.cohort(round_)}
        return slice_ask(state, round_, slices)

    def respond(self, ask: Ask, client: Client) -> Message:
        """Train the narrower model."""
        weights, done = client.train(ask.message.tensors, ask.message.mask, round_=ask.round)
        return Message(weights, ask.message.mask, report(done))

    def absorb(self, state: State, replies: Replies) -> State:
        """Average each weight over its holders."""
        return absorb_slices(state, replies)

    def width(self, setting: Setting, client: int) -> Mask:
        """Return a client's slice: the leading units of each hidden layer."""
        share = 2.0 ** -(client % self.levels)
        keep = {g.name: torch.arange(g.units) < math.ceil(share * g.units) for g in setting.layout.groups}
        return slice_of(setting.layout, {name: spec.shape for name, spec in setting.specs.items()}, keep)
