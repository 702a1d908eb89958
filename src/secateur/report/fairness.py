"""Fairness: how the clients fare that fare worst."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def worst_tenth(values: Sequence[float], *, lower_is_better: bool = False) -> float:
    """Return the mean of the worst tenth of the values, of at least one; 0 where there are none.

    >>> worst_tenth([0.2, 0.1, 0.9]), worst_tenth([0.2, 0.1, 0.9], lower_is_better=True)
    (0.1, 0.9)
    """
    worst = sorted(values, reverse=lower_is_better)[: max(1, len(values) // 10)]
    return statistics.fmean(worst) if worst else 0.0
