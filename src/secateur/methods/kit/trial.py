"""Trials of the merged model at the server, on random inputs and with some tensors changed."""

from __future__ import annotations

import torch

from secateur.contract.client import Client
from secateur.learning import resident
from secateur.methods.kit.similarity import random_inputs
from secateur.pruning.mask import Tensors
from secateur.pruning.roles import stored


class ServerTrial:
    """Computes outputs of the resident model, in evaluation mode, on random inputs.

    Args:
        server: the server, seen as a client.
        weights: the model's unchanged weights.

    Attributes:
        processed: the number of inputs computed.
    """

    def __init__(self, server: Client, weights: Tensors) -> None:
        self.processed = 0
        self._server, self._weights = server, weights
        self._inputs: dict[int, torch.Tensor] = {}
        resident.load(server.model, weights)
        server.model.eval()

    def outputs(self, changed: Tensors, inputs: int) -> torch.Tensor:
        """Return the outputs with some tensors changed, shape (inputs, classes)."""
        if inputs not in self._inputs:
            self._inputs[inputs] = random_inputs(self._server, inputs)
        state = stored(self._server.model)
        self.processed += inputs
        with torch.no_grad():
            for name, tensor in changed.items():
                state[name].copy_(tensor)
            outputs: torch.Tensor = self._server.model(self._inputs[inputs])
            for name in changed:
                state[name].copy_(self._weights[name])
        return outputs
