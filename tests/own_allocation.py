"""An allocation of one's own: the first and the last tensor stay whole."""

from dataclasses import dataclass

import torch

from secateur.pruning.allocation import Allocation, highest, pruned_count


@dataclass(frozen=True)
class Ends(Allocation):
    """The lowest scores of all tensors between the ends, together."""

    def keep(self, scores, sparsity):
        first, *between, last = scores
        inner = {name: scores[name] for name in between}
        total = sum(s.numel() for s in inner.values())
        kept = highest(inner, total - pruned_count(sparsity, total))
        return {n: kept.get(n, torch.ones_like(scores[n], dtype=torch.bool)) for n in (first, *between, last)}
