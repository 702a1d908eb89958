"""Thresholds of units: a unit is kept while the mean magnitude of its weights exceeds its threshold."""

from __future__ import annotations

import math

import torch

from secateur.learning.supermask import straight_through
from secateur.pruning.mask import Tensors

THRESHOLD, CHANGE = "threshold", "change"


def effective(scores: Tensors) -> dict[str, torch.Tensor]:
    """Return the weights without the units below their thresholds.

    ``scores`` holds the weights by name and the thresholds under ``threshold.NAME``, shape (units,). If at most 1 % of
    a layer's units would stay, its thresholds are set to 0 first.
    """
    weights = {name: tensor for name, tensor in scores.items() if not name.startswith(THRESHOLD)}
    for name, weight in list(weights.items()):
        tau = scores.get(f"{THRESHOLD}.{name}")
        if tau is not None:
            sizes = weight.abs().flatten(1).mean(1)
            if float((sizes > tau).float().mean()) <= 0.01:
                with torch.no_grad():
                    tau.zero_()
            mask = straight_through((sizes > tau).float(), sizes - tau)
            weights[name] = weight * mask.view(-1, *[1] * (weight.dim() - 1))
    return weights


def received(message: Tensors, weights: Tensors) -> dict[str, torch.Tensor]:
    """Return a client's weights after the change of the thresholds that the message brings.

    ``message`` holds the changes under ``change.NAME``, shape (units,); each weight moves against the sign of its
    unit's sum.
    """
    pushed = dict(weights)
    for name, weight in weights.items():
        change = message.get(f"{CHANGE}.{name}")
        if change is not None:
            sign, spread = weight.flatten(1).sum(1).sign(), math.prod(weight.shape[2:] or weight.shape[1:])
            pushed[name] = weight - (sign * change / spread).view(-1, *[1] * (weight.dim() - 1))
    return pushed
