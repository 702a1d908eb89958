"""Models compared by what they compute: features, their effective rank, similarity of clients, and distillation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from secateur.contract.client import Client
from secateur.contract.reply import Reply, Sent
from secateur.contract.spool import Kept
from secateur.contract.state import Setting
from secateur.errors import ModelError
from secateur.learning import resident
from secateur.learning.metrics import Metric
from secateur.learning.task import Data, Task
from secateur.pruning.mask import Tensors
from secateur.streams import stream


def last_layer_inputs(weights: Tensors, client: Client, inputs: torch.Tensor) -> torch.Tensor:
    """Return the features that enter the linear layer which runs last, for some inputs, shape (inputs, width)."""
    seen: list[torch.Tensor] = []
    linear = [m for m in client.model.modules() if isinstance(m, nn.Linear)]
    hooks = [m.register_forward_pre_hook(lambda _, entered: seen.append(entered[0])) for m in linear]
    resident.load(client.model, weights)
    client.model.eval()
    with torch.no_grad():
        client.model(inputs)
    for hook in hooks:
        hook.remove()
    return seen[-1].flatten(0, -2)


def last_layer_width(setting: Setting) -> int:
    """Return how many features enter the linear layer that runs last; where it was not found, the last weight's inputs.

    Raises:
        ModelError: that weight is not of a linear layer.
    """
    if setting.layout.features:
        return setting.layout.features
    last = setting.layout.names("weight")[-1]
    if len(setting.specs[last].shape) != 2:
        raise ModelError(f"what enters a linear last layer is compared, and {last} is none; set tau = 0")
    return setting.specs[last].shape[1]


def embedding(weights: Tensors, client: Client, count: int) -> torch.Tensor:
    """Return the mean of the last layer's inputs over ``count`` random inputs of the model, shape (width,)."""
    return last_layer_inputs(weights, client, random_inputs(client, count)).mean(0)


def effective_rank(features: torch.Tensor) -> float:
    """Return the effective rank of features: exp of the entropy of their singular values' shares; at most the width.

    ``features`` has the shape (inputs, width).

    Reference: Garrido et al. (RankMe), arXiv 2210.02885.
    """
    sizes = torch.linalg.svdvals(features.double())
    shares = sizes / sizes.sum().clamp(min=1e-300)
    return float(torch.exp(torch.special.entr(shares).sum()))


EMBEDDING = "embedding"
"""The name of a model's embedding among the tensors of a reply."""


@dataclass(frozen=True)
class Distillation(Task):
    """Distillation: the targets are a teacher's outputs, and the loss is the divergence from them."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Return the divergence, the only score."""
        return (Metric("divergence", higher=False, most=None),)

    def scores(self, outputs: torch.Tensor, targets: torch.Tensor) -> Mapping[str, float]:
        """Return the mean divergence over all rows."""
        return {"divergence": float(self.losses(outputs, targets).mean())}

    def targets(self, stored: torch.Tensor) -> torch.Tensor:
        """Return the teacher's outputs as they are."""
        return stored

    def losses(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return each row's KL divergence from the teacher's classes; for a single output the squared error."""
        if target.shape[-1] == 1:
            return (output - target).square().squeeze(-1)
        return nn.functional.kl_div(output.log_softmax(-1), target.softmax(-1), reduction="none").sum(-1)

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean of ``losses``."""
        if target.shape[-1] == 1:
            return nn.functional.mse_loss(output, target)
        return nn.functional.kl_div(output.log_softmax(-1), target.softmax(-1), reduction="batchmean")


def distillation_data(weights: Tensors, teacher: Client, inputs: torch.Tensor) -> Data:
    """Return inputs with the teacher's outputs at ``weights`` as their targets."""
    resident.load(teacher.model, weights)
    teacher.model.eval()
    with torch.no_grad():
        kind = "tokens" if teacher.data.kind == "tokens" else "tabular"
        return Data(inputs, teacher.model(inputs), kind, task=Distillation())


def mixing_shares(embeddings: Mapping[int, torch.Tensor], tau: float) -> dict[int, dict[int, float]]:
    """Return for each client i the share exp(tau cos(h_i, h_j)) / sum_k exp(tau cos(h_i, h_k)) of each client j.

    ``embeddings`` maps each client to h, shape (width,).
    """
    if not embeddings:
        return {}
    unit = nn.functional.normalize(torch.stack(list(embeddings.values())).double(), dim=1)
    shares = torch.softmax(tau * unit @ unit.T, dim=1).tolist()
    return {i: dict(zip(embeddings, row, strict=True)) for i, row in zip(embeddings, shares, strict=True)}


def weights_of(reply: Reply, sent: Sent) -> Tensors:
    """Return the tensors of a reply without its embedding."""
    del sent
    return {name: tensor for name, tensor in reply.tensors.items() if name != EMBEDDING}


def embedding_of(reply: Reply, sent: Sent) -> Tensors:
    """Return a reply's embedding."""
    del sent
    return {EMBEDDING: reply.tensors[EMBEDDING]}


def mixtures(
    kept: Kept, shares: Mapping[int, Mapping[int, float]], *, together: int = 8
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Yield for each client i the mean sum_j a_ij w_j of the kept weights, in float32; the shares of a client sum to 1.

    The weights are read in blocks of coordinates, once for each group of ``together`` clients, whose means fit in
    memory.
    """
    clients = list(shares)
    for start in range(0, len(clients), together):
        group = clients[start : start + together]
        factors = torch.tensor([[shares[i][j] for j in kept] for i in group], dtype=torch.float64)
        parts: dict[str, list[torch.Tensor]] = {}
        for name, _, values in kept.blocks():
            parts.setdefault(name, []).append((factors @ values.double()).float())
        shapes = {name: tensor.shape for name, tensor in kept[group[0]].items()}
        flat = {name: torch.cat(blocks, dim=1) for name, blocks in parts.items()}
        for place, client in enumerate(group):
            yield client, {name: flat[name][place].reshape(shape) for name, shape in shapes.items()}


def random_inputs(client: Client, count: int) -> torch.Tensor:
    """Return ``count`` random inputs, the same in every process: token ids, or values from N(0, 1)."""
    draw = stream(client.setting.seed, "proxies")
    shape = (count, *client.data.x.shape[1:])
    if client.data.kind != "tokens":
        return torch.randn(shape, generator=draw)
    ids = next(m.num_embeddings for m in client.model.modules() if isinstance(m, nn.Embedding))
    return torch.randint(ids, shape, generator=draw)
