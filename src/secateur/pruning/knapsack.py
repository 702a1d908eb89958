"""A knapsack: how many entries of each tensor to prune, given a distortion for each and a budget for all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def knapsack(
    sizes: Mapping[str, int],
    curves: Mapping[str, Sequence[float]],
    target: int,
    *,
    bins: int = 2000,
    least: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Return how many entries to prune of each tensor, ``target`` in all, so that the sum of distortions is smallest.

    The budget is counted in ``bins``, so that the result is optimal up to one bin for each tensor. Entries beyond the
    budget are given back where distortion is largest. At least ``least`` entries of each tensor are pruned: those that
    are pruned already.

    >>> knapsack({"a": 10, "b": 10}, {"a": [0.0, 1.0, 9.0], "b": [0.0, 2.0, 3.0]}, 10)
    {'a': 0, 'b': 10}
    """
    unit = max(1.0, target / bins)
    need = math.ceil(target / unit)
    best, chosen = {0: 0.0}, dict[int, dict[str, int]]({0: {}})
    for name, curve in curves.items():
        parts = len(curve) - 1
        bound = (least or {}).get(name, 0)
        counts = [max(bound, math.floor(sizes[name] * level / parts + 1e-9)) for level in range(parts + 1)]
        options = list(zip(counts, curve, strict=True))
        found: dict[int, float] = {}
        ways: dict[int, dict[str, int]] = {}
        for used, cost in best.items():
            for count, value in options:
                total = min(need, used + round(count / unit))
                if cost + value < found.get(total, math.inf):
                    found[total], ways[total] = cost + value, {**chosen[used], name: count}
        best, chosen = found, ways
    gone = chosen[max(chosen)]
    surplus = sum(gone.values()) - target
    for name in sorted(gone, key=lambda n: -curves[n][-1] * gone[n] / max(1, sizes[n])):
        back = max(gone[name] - sizes[name], min(surplus, gone[name] - (least or {}).get(name, 0)))
        gone[name] -= back
        surplus -= back
    return gone
