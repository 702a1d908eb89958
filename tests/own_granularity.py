"""A granularity of one's own: all weights of an output unit go together, its bias stays."""

from dataclasses import dataclass

from secateur.pruning.granularity import Granularity


@dataclass(frozen=True)
class Rows(Granularity):
    """Whole rows of each weight, by their mean score."""

    def prunable(self, layout):
        return layout.names("weight")

    def mask(self, scores, layout, *, allocation, sparsity):
        rows = {n: scores[n].flatten(1) for n in self.prunable(layout)}
        kept = allocation.keep({n: r.mean(1) for n, r in rows.items()}, sparsity)
        return {n: kept[n][:, None].expand_as(r).reshape(scores[n].shape).clone() for n, r in rows.items()}
