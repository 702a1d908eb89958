"""Independent Subnetwork Training: the units of each hidden layer are dealt out, so that no two clients share one.

    deal    in each round the units of each hidden layer are shuffled and dealt to P hands; client i of the cohort takes
            hand i mod P
    merge   each weight is the mean over those clients that held it; one that nobody held stays

Paper symbol -> option: number of subnetworks: parts.

Reference: Yuan et al., "Distributed Learning of Deep Neural Networks using Independent Subnet Training",
arXiv 1910.02120. Known from its abstract and from what others write of it: a *reconstruction*.
Departures: layers without removable units, such as the output layer's bias, are held by everyone and averaged by rows;
where a layer has fewer units than hands, hands share units; nothing is scaled for what is missing.
Not reproduced: the paper's figures are times on its own cluster. With ten parts of a small MLP accuracy is far below
FedAvg's here (docs/results.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from secateur.errors import check
from secateur.method import Ask, Client, Method, Replies, State, absorb_slices, report, slice_ask
from secateur.pruning.structure import slice_of
from secateur.streams import stream
from secateur.wire.message import Message


@dataclass(frozen=True)
class IndependentSubnetworks(Method):
    """Disjoint slices.

    Attributes:
        parts: P, how many hands units are dealt to; 0: as many as a cohort has clients; 1 is FedAvg.
    """

    parts: int = 0

    def __post_init__(self) -> None:
        check(self.parts >= 0, name="parts", value=self.parts, must="be 0 or more")

    def plan(self, state: State) -> Ask | None:
        """Deal the units of each layer to the next cohort."""
        round_, setting = state.round + 1, state.setting
        if round_ > setting.rounds:
            return None
        cohort, draw = setting.cohort(round_), stream(setting.seed, "deal", round_)
        hands = self.parts or len(cohort)
        dealt = {group.name: torch.randperm(group.units, generator=draw) for group in setting.layout.groups}
        shapes = {name: spec.shape for name, spec in setting.specs.items()}
        slices = {}
        for place, client in enumerate(cohort):
            keep = {}
            for name, order in dealt.items():
                flags = torch.zeros(len(order), dtype=torch.bool)
                flags[order[place % min(hands, len(order)) :: hands]] = True
                keep[name] = flags
            slices[client] = slice_of(setting.layout, shapes, keep)
        return slice_ask(state, round_, slices)

    def respond(self, ask: Ask, client: Client) -> Message:
        """Train the slice."""
        weights, done = client.train(ask.message.tensors, ask.message.mask, round_=ask.round)
        return Message(weights, ask.message.mask, report(done))

    def absorb(self, state: State, replies: Replies) -> State:
        """Put the slices together."""
        return absorb_slices(state, replies)
