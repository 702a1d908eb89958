"""A recovery of one's own: survivors are shrunk (Ash and Adams, arXiv 1910.08475, without the noise)."""

from dataclasses import dataclass, replace

from secateur.methods.kit.recovery import Recovery


@dataclass(frozen=True)
class Shrink(Recovery):
    """Survivors go on from a share of what they were trained to."""

    share: float = 0.5

    def recover(self, state):
        return replace(state, weights={n: self.share * t for n, t in state.weights.items()})
