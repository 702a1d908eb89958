"""A robust rule of one's own in one file: the coordinate-wise median of single replies."""

from dataclasses import dataclass

import torch

from secateur.aggregation import Aggregator
from secateur.contract.reduction import Keep
from secateur.pruning.mask import apply


@dataclass(frozen=True)
class Middle(Keep):
    """The median of each coordinate, read in blocks; the lower one where there are two."""

    def finish(self, accumulator, state):
        kept, found = super().finish(accumulator, state), {}
        for name, _, values in kept.blocks():
            found.setdefault(name, []).append(values.median(dim=0).values)
        return {name: torch.cat(parts).reshape(state.setting.specs[name].shape) for name, parts in found.items()}


@dataclass(frozen=True)
class Median(Aggregator):
    """W <- the median of the clients' weights."""

    def reduction(self, *, masked):
        return Middle()

    def step(self, weights, mean, *, mask, memory):
        return apply(mean, mask), memory
