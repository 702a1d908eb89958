"""Merging statistics of clients: by their mean, or by a rule that a few of them cannot move at will.

A mean follows a single client however far it lies; with the median of each entry fewer than half of the clients lead
nowhere the others do not go, with the trimmed mean as many as are trimmed at each end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from secateur.contract.reduction import Keep, Mean, Reduction
from secateur.contract.state import State
from secateur.contract.weighted import Accumulator
from secateur.pruning.mask import Tensors

Merge = Literal["mean", "median", "trimmed"]
"""``mean``; ``median``, with an even number the mean of the middle two; ``trimmed``, the mean without the ``_TRIMMED``
share of largest and of smallest values of each entry. Where they are not means, clients count alike."""

_TRIMMED = 0.1


def trimmed_count(clients: int) -> int:
    """Return how many of the values of so many clients are left out at each end: a tenth, rounded up.

    >>> [trimmed_count(clients) for clients in (3, 10, 11, 20)]
    [1, 1, 2, 2]
    """
    return math.ceil(_TRIMMED * clients - 1e-9)


def median(values: torch.Tensor) -> torch.Tensor:
    """Return the median over the first dimension, in float64; with an even number the mean of the middle two."""
    ordered = values.double().sort(0).values
    count = len(ordered)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def trimmed(values: torch.Tensor) -> torch.Tensor:
    """Return the mean over the first dimension without the smallest and largest values, in float64.

    Of fewer than three values it is the median.
    """
    gone = trimmed_count(len(values))
    if len(values) <= 2 * gone:
        return median(values)
    return values.double().sort(0).values[gone : len(values) - gone].mean(0)


_RULES: dict[Merge, Callable[[torch.Tensor], torch.Tensor]] = {"median": median, "trimmed": trimmed}


def merged(parts: Iterable[Tensors], merge: Merge) -> dict[str, torch.Tensor]:
    """Return tensors by name, each entry by ``median`` or ``trimmed`` over the parts; all of them are held at once."""
    held = list(parts)
    return {name: _RULES[merge](torch.stack([part[name] for part in held])) for name in held[0]} if held else {}


@dataclass(frozen=True)
class Merged(Keep):
    """Statistics merged by a rule that compares clients at each entry: tensors by name, float32, empty without replies.

    Single replies are kept, on disk where they are many, and read in blocks of coordinates.

    Attributes:
        rule: how.
    """

    copies: ClassVar[bool] = True

    rule: Merge = "median"

    def finish(self, accumulator: Accumulator, state: State) -> Any:
        """Return the merged statistics."""
        kept = super().finish(accumulator, state)
        flat: dict[str, list[torch.Tensor]] = {}
        for name, _, values in kept.blocks():
            flat.setdefault(name, []).append(_RULES[self.rule](values).float())
        shapes = {name: tensor.shape for name, tensor in kept[next(iter(kept))].items()} if kept else {}
        return {name: torch.cat(parts).reshape(shapes[name]) for name, parts in flat.items()}


def reduction(merge: Merge) -> Reduction:
    """Return the reduction of clients' statistics: their mean by rows, or one of the other rules."""
    return Mean() if merge == "mean" else Merged(rule=merge)
