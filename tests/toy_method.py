"""Toy: keep every second weight of each tensor, from before round 1; a method outside the package.

Reference: none; it shows how little a method needs.
"""

from dataclasses import dataclass

import torch

from secateur.contract.client import report
from secateur.contract.method import Method
from secateur.methods.kit.rounds import merged, train_ask
from secateur.wire.message import Message


@dataclass(frozen=True)
class Toy(Method):
    """Prune odd places; ``sparsity`` 0 switches it off."""

    sparsity: float = 0.5

    def plan(self, state):
        mask = state.mask
        if self.sparsity and mask is None:
            weights = [(n, state.weights[n]) for n in state.setting.layout.names("weight")]
            mask = {n: (torch.arange(w.numel()) % 2 == 0).reshape(w.shape) for n, w in weights}
        return train_ask(state, state.round + 1, mask) if state.round < state.setting.rounds else None

    def respond(self, ask, client):
        weights, done = client.train(ask.message.tensors, ask.message.mask, round_=ask.round)
        return Message(weights, ask.message.mask, report(done))

    def absorb(self, state, reduced):
        return merged(state, reduced)
