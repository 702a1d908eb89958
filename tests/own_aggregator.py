"""An aggregator of one's own: the server goes half of the way to the mean."""

from dataclasses import dataclass

from secateur.pruning.mask import apply


@dataclass(frozen=True)
class HalfWay:
    """W <- (W + mean) / 2, pruned weights at zero; it has the verbs of an aggregator and derives from nothing."""

    coverage = False
    pruned = "zero"

    def step(self, weights, mean, *, mask, memory):
        return apply({n: (weights[n] + m) / 2 for n, m in mean.items()}, mask), memory
