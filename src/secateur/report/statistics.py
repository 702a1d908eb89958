"""Statistics over seeds, and over what a run had spent when it was how good."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from scipy import stats

LEVEL = 0.05
"""The chance, of all verdicts of a kind in one table together, that any is given where nothing is."""

Key = TypeVar("Key")
Item = TypeVar("Item")

Curve = Sequence[tuple[float, float]]
"""What was spent so far, and the quality then; rising in the first."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval, mean - half to mean + half; half is infinite for a single value."""

    mean: float
    half: float
    count: int

    @property
    def error(self) -> float:
        """Return the standard error of the mean."""
        return self.half / _quantile(self.count) if self.count > 1 else math.inf


def interval(values: Sequence[float]) -> Interval:
    """Return the interval of Student's t for the mean of independent values.

    >>> found = interval([1.0, 2.0, 3.0])
    >>> round(found.mean, 3), round(found.half, 3)
    (2.0, 2.484)
    """
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, math.inf, 1)
    return Interval(mean, _quantile(count) * statistics.stdev(values) / math.sqrt(count), count)


def _quantile(count: int) -> float:
    return float(stats.t.ppf(0.975, count - 1))


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> Interval | None:
    """Return the interval of the differences one - other, seed by seed; None without a seed that both have."""
    both = sorted(one.keys() & other.keys())
    return interval([one[seed] - other[seed] for seed in both]) if both else None


def exceeds(found: Interval, bound: float = 0.0) -> float:
    """Return the p-value of Student's one-sided test that a mean lies above a bound; 1 of a single value.

    >>> round(exceeds(interval([1.0, 2.0, 3.0])), 4)  # t = 2 sqrt(3) with 2 degrees of freedom
    0.0371
    """
    if found.count < 2:
        return 1.0
    if found.error == 0:
        return 0.0 if found.mean > bound else 1.0
    return float(stats.t.sf((found.mean - bound) / found.error, found.count - 1))


def level(found: Interval, margin: float) -> float:
    """Return the p-value of equivalence: that a mean lies within ± margin, by two one-sided tests (TOST)."""
    return max(exceeds(found, -margin), exceeds(Interval(-found.mean, found.half, found.count), -margin))


def holm(chances: Mapping[Key, float]) -> dict[Key, float]:
    """Return p-values corrected for how many they are, by Holm's step-down rule.

    p'_(i) = max over j <= i of min(1, (m - j + 1) p_(j)), with p_(1) <= ... <= p_(m)
    """
    corrected, most = {}, 0.0
    for position, key in enumerate(sorted(chances, key=lambda key: chances[key])):
        most = max(most, min(1.0, (len(chances) - position) * chances[key]))
        corrected[key] = most
    return corrected


def shown(chances: Mapping[Key, float]) -> set[Key]:
    """Return what is shown by p-values of one family, corrected by Holm."""
    return {key for key, chance in holm(chances).items() if chance < LEVEL}


def at(curve: Curve, budget: float) -> float | None:
    """Return the last quality that was reached within a budget; None where nothing was."""
    within = [quality for spent, quality in curve if spent <= budget]
    return within[-1] if within else None


def reach(curve: Curve, target: float, *, least: bool = False) -> float | None:
    """Return what had been spent when a target was reached first; ``least``: lower qualities are better."""
    return next((spent for spent, quality in curve if (quality <= target if least else quality >= target)), None)


def front(
    items: Sequence[Item], cost: Callable[[Item], float], quality: Callable[[Item], float], *, least: bool = False
) -> list[Item]:
    """Return the items that nothing else beats in both cost and quality, by rising cost.

    Args:
        items: what is compared.
        cost: of an item; lower is better.
        quality: of an item; higher is better.
        least: lower qualities are better too.
    """
    points = [(cost(item), -quality(item) if least else quality(item)) for item in items]

    def beaten(point: tuple[float, float]) -> bool:
        return any(c <= point[0] and q >= point[1] and (c, q) != point for c, q in points)

    best = [number for number, point in enumerate(points) if not beaten(point)]
    return [items[number] for number in sorted(best, key=lambda number: points[number])]
