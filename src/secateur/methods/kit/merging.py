"""Merging statistics of clients: by their mean, or by a rule that a few of them cannot move at will.

A mean follows a single client however far it lies; with the median of each entry fewer than half of the clients lead
nowhere the others do not go, with the trimmed mean as many as are trimmed at each end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from secateur.aggregation.robust import hostile_of
from secateur.aggregation.trimmed import trimmed
from secateur.aggregation.updates import Block, middle
from secateur.contract.reduction import Keep, Mean, Reduction
from secateur.contract.state import State
from secateur.contract.weighted import Accumulator
from secateur.pruning.mask import Tensors

Merge = Literal["mean", "median", "trimmed"]
"""``mean``; ``median``, with an even number the mean of the middle two; ``trimmed``, the mean of each entry without a
fifth of the clients (rounded up) at each end. Where they are not means, clients count alike."""

_HOSTILE = 0.2


def _trimmed(values: torch.Tensor) -> torch.Tensor:
    """Return the trimmed mean over the first dimension; of fewer than three values it is the median."""
    cut = hostile_of(_HOSTILE, len(values))
    flat = values.flatten(1)
    if len(values) <= 2 * cut:
        return middle(values)
    return trimmed(Block("", torch.arange(flat.shape[1]), flat, None), cut).float().reshape(values.shape[1:])


_RULES: dict[Merge, Callable[[torch.Tensor], torch.Tensor]] = {"median": middle, "trimmed": _trimmed}


def merged(parts: Iterable[Tensors], merge: Merge) -> dict[str, torch.Tensor]:
    """Return tensors by name, each entry by a rule that is no mean; all of them are held at once."""
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
            flat.setdefault(name, []).append(_RULES[self.rule](values))
        shapes = {name: tensor.shape for name, tensor in kept[next(iter(kept))].items()} if kept else {}
        return {name: torch.cat(parts).reshape(shapes[name]) for name, parts in flat.items()}


def reduction(merge: Merge) -> Reduction:
    """Return the reduction of clients' statistics: their mean by rows, or one of the other rules."""
    return Mean() if merge == "mean" else Merged(rule=merge)
