"""Statistics over seeds, and over what a run had spent when it was how good."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

Curve = Sequence[tuple[float, float]]
"""What was spent so far, and the quality then; rising in the first."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval, mean - half to mean + half; half is infinite for a single value."""

    mean: float
    half: float
    count: int

    @property
    def above(self) -> bool:
        """Return whether the whole interval lies above 0."""
        return self.mean - self.half > 0

    @property
    def below(self) -> bool:
        """Return whether the whole interval lies below 0."""
        return self.mean + self.half < 0


def interval(values: Sequence[float]) -> Interval:
    """Return the interval of Student's t for the mean of independent values.

    >>> found = interval([1.0, 2.0, 3.0])
    >>> round(found.mean, 3), round(found.half, 3)
    (2.0, 2.484)
    """
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, math.inf, 1)
    quantile = float(stats.t.ppf(0.975, count - 1))
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(count), count)


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> Interval | None:
    """Return the interval of the differences one - other, seed by seed; None without a seed that both have."""
    both = sorted(one.keys() & other.keys())
    return interval([one[seed] - other[seed] for seed in both]) if both else None


def at(curve: Curve, budget: float) -> float | None:
    """Return the last quality that was reached within a budget; None where nothing was."""
    within = [quality for spent, quality in curve if spent <= budget]
    return within[-1] if within else None


def reach(curve: Curve, target: float, *, least: bool = False) -> float | None:
    """Return what had been spent when a target was reached first; ``least``: lower qualities are better."""
    return next((spent for spent, quality in curve if (quality <= target if least else quality >= target)), None)


def front(points: Mapping[str, tuple[float, float]], *, least: bool = False) -> list[str]:
    """Return the names of what nothing else beats in both cost and quality, by rising cost.

    Args:
        points: (cost, quality) by name; lower costs are better.
        least: lower qualities are better too.
    """
    sign = -1 if least else 1

    def beaten(name: str) -> bool:
        cost, quality = points[name]
        return any(
            c <= cost and sign * q >= sign * quality and (c, q) != (cost, quality) for c, q in points.values()
        )  # fmt: skip

    return sorted((name for name in points if not beaten(name)), key=lambda name: points[name])
