"""Weighted means from sums in float64 that can be taken in parts; in O(model) memory."""

from __future__ import annotations

from typing import Any

import torch

from secateur.pruning.mask import Tensors

Accumulator = dict[str, Any]
"""The intermediate result of a reduction: for a linear one tensors by name, and two are merged by adding them."""


def add_weighted(accumulator: Accumulator, tensors: Tensors, weight: float, held: Tensors | None = None) -> Accumulator:
    """Return the accumulator of a weighted mean with one more part; the one given is used up.

    Args:
        accumulator: it begins empty.
        tensors: the part, by name.
        weight: of the part.
        held: masks of the coordinates at which the part counts; a tensor without one counts as a whole. None: the mean
            is not over holders; the same for all parts.
    """
    for name, value in tensors.items():
        total = accumulator.get(f"sum {name}")
        if total is None:
            total = accumulator[f"sum {name}"] = value.to(torch.float64, copy=True).mul_(weight)
        else:
            # without a copy in float64: a weight of up to 29 bits times a float32 is exact there, fused or not
            total.add_(value, alpha=weight)
        if held is not None:
            gain = torch.full_like(total, weight) if name not in held else held[name].double() * weight
            add_part(accumulator, f"held {name}", gain)
    accumulator["weight"] = accumulator.get("weight", 0.0) + weight
    return accumulator


def weighted_mean(accumulator: Accumulator, fallback: Tensors | None = None) -> dict[str, torch.Tensor]:
    """Return the mean in float32, by name; empty without parts of any weight.

    A coordinate that no part holds is that of ``fallback``, or 0 without one.
    """
    weight = accumulator.get("weight", 0.0)
    sums = {name.removeprefix("sum "): part for name, part in accumulator.items() if name.startswith("sum ")}
    mean = {}
    for name, part in sums.items() if weight else ():
        held = accumulator.get(f"held {name}")
        if held is None:
            mean[name] = (part / weight).float()
            continue
        otherwise = torch.zeros((), dtype=part.dtype) if fallback is None else fallback[name].double()
        mean[name] = torch.where(held > 0, part / held.clamp(min=1e-300), otherwise).float()
    return mean


def add_part(accumulator: Accumulator, name: str, part: torch.Tensor) -> None:
    """Add a part to what stands under a name, in place."""
    accumulator[name] = accumulator[name].add_(part) if name in accumulator else part
