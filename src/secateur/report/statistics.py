"""Statistics over seeds (intervals, paired tests, Holm's correction), and of curves of quality against cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from scipy import stats

SIGNIFICANCE = 0.05
"""The family-wise error rate: the chance that any verdict of a kind in one table is a false positive."""

Key = TypeVar("Key")
Item = TypeVar("Item")

Curve = Sequence[tuple[float, float]]
"""Pairs of what was spent so far and the quality then, by rising cost."""


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

    >>> value = interval([1.0, 2.0, 3.0])
    >>> round(value.mean, 3), round(value.half, 3)
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


def p_greater(value: Interval, bound: float = 0.0) -> float:
    """Return the p-value of Student's one-sided test that a mean lies above a bound; 1 for a single value.

    >>> round(exceeds(interval([1.0, 2.0, 3.0])), 4)  # t = 2 sqrt(3) with 2 degrees of freedom
    0.0371
    """
    if value.count < 2:
        return 1.0
    if value.error == 0:
        return 0.0 if value.mean > bound else 1.0
    return float(stats.t.sf((value.mean - bound) / value.error, value.count - 1))


def p_equivalent(value: Interval, margin: float) -> float:
    """Return the p-value of the two one-sided tests (TOST) that a mean lies within ± margin."""
    return max(p_greater(value, -margin), p_greater(Interval(-value.mean, value.half, value.count), -margin))


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Return p-values corrected for multiple testing, by Holm's step-down rule.

    p'_(i) = max over j <= i of min(1, (m - j + 1) p_(j)), with p_(1) <= ... <= p_(m)
    """
    corrected, most = {}, 0.0
    for position, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        most = max(most, min(1.0, (len(p_values) - position) * p_values[key]))
        corrected[key] = most
    return corrected


def significant(p_values: Mapping[Key, float]) -> set[Key]:
    """Return the keys of the p-values that are significant after Holm's correction, all being one family."""
    return {key for key, p in holm(p_values).items() if p < SIGNIFICANCE}


def quality_within(curve: Curve, budget: float) -> float | None:
    """Return the last quality that a curve has within a budget; None where its first point is beyond it."""
    within = [quality for spent, quality in curve if spent <= budget]
    return within[-1] if within else None


def cost_to_reach(curve: Curve, target: float, *, lower_is_better: bool = False) -> float | None:
    """Return the cost at which a curve first reaches a target; None where it never does."""
    return next(
        (spent for spent, quality in curve if (quality <= target if lower_is_better else quality >= target)), None
    )


def front(
    items: Sequence[Item],
    cost: Callable[[Item], float],
    quality: Callable[[Item], float],
    *,
    lower_is_better: bool = False,
) -> list[Item]:
    """Return the Pareto front: the items that no other beats in both cost and quality, by rising cost.

    Args:
        items: the candidates.
        cost: the cost of an item; lower is better.
        quality: the quality of an item; higher is better, unless ``lower_is_better``.
        lower_is_better: quality is an error.
    """
    points = [(cost(item), -quality(item) if lower_is_better else quality(item)) for item in items]

    def beaten(point: tuple[float, float]) -> bool:
        return any(c <= point[0] and q >= point[1] and (c, q) != point for c, q in points)

    best = [number for number, point in enumerate(points) if not beaten(point)]
    return [items[number] for number in sorted(best, key=lambda number: points[number])]
