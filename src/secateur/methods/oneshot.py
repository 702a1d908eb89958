"""One-shot magnitude pruning: dense until ten rounds before the end, one global cut, then tuning.

    after round T - 10:  keep the N - floor(s N) largest |w|;  train the rest under that mask

Reference: the OneShot baseline of Stripelis et al., arXiv 2204.12430.
Departures: as ``fedsparsify``. If T < 10, weights are pruned before round 1.
Reproduced in part: clearly below the progressive ramp, as published (docs/results.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from secateur.methods.kit.composition import Composition
from secateur.methods.kit.schedule import OneShot, Schedule


@dataclass(frozen=True)
class OneShotMagnitude(Composition):
    """A composition: magnitude x global x weight x one shot x server x mean."""

    schedule: Schedule = field(default=OneShot(sparsity=0.9, at=-10))
