"""An input of a model whose own inputs are not at hand, made up from the sizes of its first layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

_SIDES = (8, 32, 28, 16, 64, *(side for side in range(1, 64) if side not in {8, 16, 28, 32}), 96, 128, 224)
_STEPS = (5, 16, 8, 32, 64, 1)


def example_of(model: nn.Module) -> torch.Tensor | None:
    """Return zeros that the model takes, shape (1, ...); None if it takes none of those that its first layer suggests.

    They have the first layer's channels or features, and the smallest common side or number of steps that runs.
    """
    copied = copy.deepcopy(model).eval()
    return next((x for x in _candidates(copied) if _runs(copied, x)), None)


def _candidates(model: nn.Module) -> Iterator[torch.Tensor]:
    for layer in model.modules():
        if isinstance(layer, nn.modules.conv._ConvNd):  # noqa: SLF001 -- torch's own base class
            yield from (torch.zeros(1, layer.in_channels, *[side] * (layer.weight.dim() - 2)) for side in _SIDES)
        elif isinstance(layer, nn.Linear):
            yield from (torch.zeros(1, *steps, layer.in_features) for steps in ((), *((n,) for n in _STEPS)))
        elif isinstance(layer, nn.RNNBase):
            yield from (torch.zeros(1, steps, layer.input_size) for steps in _STEPS)
        elif isinstance(layer, nn.Embedding):
            yield from (torch.zeros(1, steps, dtype=torch.int64) for steps in _STEPS)
        else:
            continue
        return


def _runs(model: nn.Module, x: torch.Tensor) -> bool:
    try:
        with torch.no_grad():
            model(x)
    except Exception:  # noqa: BLE001 -- a model's own code raises whatever it likes
        return False
    return True
