"""Two of one's own: clients vote with as many voices as they have rows; every second cohort trains the dense model."""

from dataclasses import dataclass

from secateur.contract.reduction import Sum, masks_of
from secateur.methods.kit.consensus import Consensus


@dataclass(frozen=True)
class Quorum(Consensus):
    """An entry stays that clients with at least a share of all rows kept."""

    share: float = 0.5

    @property
    def ballot(self):
        return {"rows": Sum(masks_of, by="rows")}

    def vote(self, state, reduced, budget):
        return {name: rows >= self.share * sum(reduced.rows.values()) for name, rows in reduced["rows"].items()}


@dataclass(frozen=True)
class Alternating(Consensus):
    """Dense and sparse by turns (AC/DC, Peste et al., arXiv 2106.12379); the model that is shipped is sparse."""

    regrows = True

    def mask_after(self, state, prune):
        return state.mask

    def mask_for(self, state, cohort, prune):
        return None if cohort is not None and state.round % 2 == 0 else prune(cohort, anew=True)
