"""Likeness: how alike clients' models act on random inputs, and how much each should listen to each other one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from secateur import training
from secateur.method import Client
from secateur.pruning.mask import Tensors
from secateur.streams import stream


def embedding(weights: Tensors, client: Client, count: int) -> torch.Tensor:
    """Return the mean of what enters the model's last linear layer for ``count`` random inputs, shape (width,).

    The inputs are the same for every client of a run: token ids, or values drawn N(0, 1).
    """
    entering: list[torch.Tensor] = []
    last = [m for m in client.model.modules() if isinstance(m, nn.Linear)][-1]
    hook = last.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    training.load(client.model, weights)
    client.model.eval()
    with torch.no_grad():
        client.model(_inputs(client, count))
    hook.remove()
    return entering[-1].flatten(0, -2).mean(0)


def alike(embeddings: Mapping[int, torch.Tensor], tau: float) -> dict[int, dict[int, float]]:
    """Return for each client i the share exp(tau cos(h_i, h_j)) / sum_k exp(tau cos(h_i, h_k)) of each client j."""
    if not embeddings:
        return {}
    unit = nn.functional.normalize(torch.stack(list(embeddings.values())).double(), dim=1)
    shares = torch.softmax(tau * unit @ unit.T, dim=1).tolist()
    return {i: dict(zip(embeddings, row, strict=True)) for i, row in zip(embeddings, shares, strict=True)}


def _inputs(client: Client, count: int) -> torch.Tensor:
    draw = stream(client.setting.seed, "proxies")
    shape = (count, *client.data.x.shape[1:])
    if client.data.kind != "tokens":
        return torch.randn(shape, generator=draw)
    ids = next(m.num_embeddings for m in client.model.modules() if isinstance(m, nn.Embedding))
    return torch.randint(ids, shape, generator=draw)
