"""Distortion: how far a model's outputs move for random inputs when one of its tensors is pruned."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from secateur.contract.method import Client
from secateur.learning import resident
from secateur.methods.kit.similarity import noise
from secateur.pruning.allocation import lowest, pruned_count
from secateur.pruning.mask import Tensors


def curves(
    server: Client, weights: Tensors, scores: Tensors, names: Sequence[str], *, levels: int, proxies: int
) -> tuple[dict[str, list[float]], int]:
    """Return each tensor's distortion at 0, 1, ... ``levels`` of ``levels`` parts pruned, and inputs processed.

    The distortion is the mean over inputs of the squared distance of the outputs; lowest scores go first.
    """
    resident.load(server.model, weights)
    server.model.eval()
    inputs, state, found = noise(server, proxies), server.model.state_dict(), dict[str, list[float]]()
    with torch.no_grad():
        whole = server.model(inputs)
        for name in names:
            found[name] = [0.0]
            flat = scores[name].reshape(-1)
            for level in range(1, levels + 1):
                gone = lowest(flat, pruned_count(level / levels, flat.numel())).view(scores[name].shape)
                state[name].copy_(weights[name].masked_fill(gone, 0.0))
                found[name].append(float((server.model(inputs) - whole).square().sum(-1).mean()))
            state[name].copy_(weights[name])
    return found, proxies * (1 + levels * len(names))
