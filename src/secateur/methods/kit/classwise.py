"""Last layers that are judged and merged class by class; see ``methods.bristle``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from secateur.aggregation.updates import middle
from secateur.contract.client import Client
from secateur.contract.state import Setting, State
from secateur.learning import resident
from secateur.pruning.mask import Tensors
from secateur.pruning.structure import OUTPUT

_BATCH = 1000


def head_of(setting: Setting) -> list[str]:
    """Return the names of the last layer's tensors, which have a row for each output; empty if it was not found."""
    layers = [layer for layer, why in setting.layout.whole.items() if why == OUTPUT]
    return [name for name in setting.layout.trainable if name.rpartition(".")[0] in layers]


def outputs(server: Client, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a model's outputs on the server's rows, shape (rows, classes), and the targets."""
    resident.load(server.model, tensors)
    server.model.eval()
    found, targets = [], []
    with torch.no_grad():
        for start in range(0, len(server.data), _BATCH):
            x, y = server.data.batch(slice(start, start + _BATCH))
            found.append(server.model(x).cpu())
            targets.append(y.cpu())
    return torch.cat(found), torch.cat(targets)


def f1(found: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the F1 score of each class, NaN for one without rows; shape (classes,), float64."""
    classes = torch.arange(found.shape[1])
    said = found.argmax(dim=1)[:, None] == classes
    true = targets[:, None] == classes
    both, rows = (said & true).sum(dim=0).double(), true.sum(dim=0)
    score = 2 * both / (said.sum(dim=0) + rows).clamp(min=1)
    return torch.where(rows > 0, score, torch.nan)


def gains(scores: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Return how much better each client is than the server in each class, at least 0; NaN where nobody can tell.

    Args:
        scores: of clients, shape (clients, classes).
        before: of the server, shape (classes,).
    """
    return (scores - before).clamp(min=0.0)


def merge(state: State, rows: Sequence[Tensors], gain: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the merged last layer and running statistics.

    Args:
        state: the server's state.
        rows: what each client sent.
        gain: see ``gains``.
    """
    found = {}
    for name in head_of(state.setting):
        stack = torch.stack([tensors[name] for tensors in rows]).double()
        shares = gain.reshape(*gain.shape, *[1] * (stack.dim() - 2))
        total = shares.sum(dim=0)
        mean = (shares * stack).sum(dim=0) / total.clamp(min=1e-300)
        best = torch.where(total > 0, mean, state.weights[name].double())
        found[name] = torch.where(total.isnan(), middle(stack), best).float()
    for name in state.setting.layout.names("buffer"):
        found[name] = middle(torch.stack([tensors[name] for tensors in rows]))
    return found
