"""Federated Dropout: each client of a round trains a random narrower model, drawn anew each time.

    slice   of each hidden layer a client goes without floor(r u) of its u units
    merge   each weight is the mean over those clients that held it, by rows; one that nobody held stays

Paper symbol -> option: federated dropout rate: rate.

Reference: Caldas et al., "Expanding the Reach of Federated Learning by Reducing Client Resource Requirements",
arXiv 1812.07210. Known from its abstract and from what others write of it: a *reconstruction*.
Departures: activations are not scaled up for what is missing; layers without removable units stay whole; the paper's
lossy compression is a setting of the wire here (wire.values). A weight is averaged over its holders.
Not reproduced: 14 times less traffic down and 28 times up are claimed, with quantisation; we did not run that setting.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from secateur.errors import check
from secateur.method import Ask, Client, Method, Replies, State, absorb_slices, report, slice_ask
from secateur.pruning.allocation import pruned_count
from secateur.pruning.structure import slice_of
from secateur.streams import stream
from secateur.wire.message import Message


@dataclass(frozen=True)
class FederatedDropout(Method):
    """A random slice for each client and round.

    Attributes:
        rate: r, share of each hidden layer's units that a client goes without; 0 is FedAvg.
    """

    rate: float = 0.25

    def __post_init__(self) -> None:
        check(0 <= self.rate < 1, name="rate", value=self.rate, must="be in [0, 1)")

    def plan(self, state: State) -> Ask | None:
        """Draw a slice for each client of the next cohort."""
        round_, setting = state.round + 1, state.setting
        if round_ > setting.rounds:
            return None
        shapes = {name: spec.shape for name, spec in setting.specs.items()}
        slices = {}
        for client in setting.cohort(round_):
            draw = stream(setting.seed, "slice", round_, client)
            keep = {}
            for group in setting.layout.groups:
                flags = torch.ones(group.units, dtype=torch.bool)
                gone = min(pruned_count(self.rate, group.units), group.units - 1)
                flags[torch.randperm(group.units, generator=draw)[:gone]] = False
                keep[group.name] = flags
            slices[client] = slice_of(setting.layout, shapes, keep)
        return slice_ask(state, round_, slices)

    def respond(self, ask: Ask, client: Client) -> Message:
        """Train the slice."""
        weights, done = client.train(ask.message.tensors, ask.message.mask, round_=ask.round)
        return Message(weights, ask.message.mask, report(done))

    def absorb(self, state: State, replies: Replies) -> State:
        """Average each weight over its holders."""
        return absorb_slices(state, replies)
