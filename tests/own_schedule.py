"""A schedule of one's own, which looks at the weights: whatever is smaller than a threshold goes."""

from dataclasses import dataclass

from secateur.methods.kit.schedule import Schedule


@dataclass(frozen=True)
class Below(Schedule):
    """The share of prunable weights that is gone, or whose magnitude is below ``tau``."""

    tau: float = 0.1

    def level(self, state):
        gone = sum(int((~kept | (state.weights[n].abs() < self.tau)).sum()) for n, kept in state.mask.items())
        return gone / sum(kept.numel() for kept in state.mask.values())
