"""Figures over single clients."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def worst_tenth(values: Sequence[float], *, least: bool = False) -> float:
    """Return the mean over the tenth, one at least, that fares worst; 0 of none. ``least``: lower values are better.

    >>> worst_tenth([0.2, 0.1, 0.9]), worst_tenth([0.2, 0.1, 0.9], least=True)
    (0.1, 0.9)
    """
    worst = sorted(values, reverse=least)[: max(1, len(values) // 10)]
    return statistics.fmean(worst) if worst else 0.0
