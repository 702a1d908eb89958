"""Random pruning: one fixed random mask from before round 1; the control that a criterion has to beat.

    M = the N - floor(s N) largest of N uniform draws, the same in every round and on every client

Reference: the random baseline of Stripelis et al., arXiv 2204.12430 (there on a ramp:
``schedule = "cubic"``), and of AutoFLIP, arXiv 2405.10271.
Departures: AutoFLIP's code zeroes a fresh random set after every step, which is noise injection and not a
fixed sparse model; this mask is persistent.
Reproduced: no published figure was targeted; a control in docs/results.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from secateur.methods.kit.composition import Composition
from secateur.methods.kit.criteria import Criterion, Random
from secateur.methods.kit.schedule import OneShot, Schedule


@dataclass(frozen=True)
class RandomPruning(Composition):
    """A composition: random x global x weight x before round 1 x server x mean."""

    criterion: Criterion = field(default=Random())
    schedule: Schedule = field(default=OneShot(sparsity=0.9, at=0))
