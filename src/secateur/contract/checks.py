"""Checks: what the values and the mask of a reply must be, declared in an ask (``Expected.checks``)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from secateur.pruning.mask import Mask
from secateur.wire.message import Message


@dataclass(frozen=True)
class Range:
    """Every value of some tensors lies between two numbers.

    Attributes:
        names: of the tensors.
        least, most: the ends of the range; either may be infinite.
    """

    names: frozenset[str]
    least: float = -math.inf
    most: float = math.inf

    @property
    def bounded(self) -> frozenset[str]:
        """Return the names if both ends are finite."""
        return self.names if math.isfinite(self.least) and math.isfinite(self.most) else frozenset()

    def nearest(self, message: Message) -> Message:
        """Return a message whose values are within the range, where rounding on the way may have led out of it."""
        near = {n: message.tensors[n].clamp(self.least, self.most) for n in self.names & message.tensors.keys()}
        return replace(message, tensors={**message.tensors, **near})

    def wrong(self, message: Message, known: Mask | None) -> str:
        """Return which tensor has a value out of range."""
        del known
        for name in sorted(self.names & message.tensors.keys()):
            low, high = _ends(message.tensors[name])
            if low < self.least or high > self.most:
                wanted = f"{self.least:g} to {self.most:g}"
                return f"tensor {name!r} has values from {low:g} to {high:g}; {wanted} is expected"
        return ""


@dataclass(frozen=True)
class Signs:
    """Every value of some tensors is 1 or -1, or 0 where a mask prunes it.

    Attributes:
        names: of the tensors.
    """

    names: frozenset[str]

    @property
    def bounded(self) -> frozenset[str]:
        """Return the names."""
        return self.names

    def wrong(self, message: Message, known: Mask | None) -> str:
        """Return which tensor has a value that is no sign."""
        del known
        for name in sorted(self.names & message.tensors.keys()):
            kept = (message.mask or {}).get(name)
            values = message.tensors[name]
            if not bool((values.abs() == (1 if kept is None else kept.to(values.dtype))).all()):
                return f"tensor {name!r} has values that are no signs"
        return ""


@dataclass(frozen=True)
class Kept:
    """The mask keeps as many entries as it may: a vote of the budget's size.

    Attributes:
        least, most: the fewest and the most entries that it keeps, of all its tensors together.
        same: a mask may also keep as many as the one that was sent; everything, if none was.
    """

    least: int
    most: int
    same: bool = False

    @property
    def bounded(self) -> frozenset[str]:
        """Return no name: values may be any."""
        return frozenset()

    def wrong(self, message: Message, known: Mask | None) -> str:
        """Return how many entries the mask keeps, if they are too many or too few."""
        count = _count(message.mask)
        held = sum(kept.numel() for kept in (message.mask or {}).values()) if known is None else _count(known)
        if self.least <= count <= self.most or (self.same and count == held):
            return ""
        wanted = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        return f"its mask keeps {count} entries; {wanted} are expected"


@dataclass(frozen=True)
class KeptByTensor:
    """The mask keeps, of each tensor, a given number of entries.

    Attributes:
        counts: fewest and most entries by name; empty: as many of each tensor as the mask that was sent.
    """

    counts: tuple[tuple[str, int, int], ...] = ()

    @property
    def bounded(self) -> frozenset[str]:
        """Return no name: values may be any."""
        return frozenset()

    def wrong(self, message: Message, known: Mask | None) -> str:
        """Return the first tensor of which the mask keeps too many or too few entries."""
        mask = message.mask or {}
        counts = self.counts or tuple((name, int(kept.sum()), int(kept.sum())) for name, kept in (known or {}).items())
        for name, least, most in counts:
            count = int(mask[name].sum()) if name in mask else -1
            if not least <= count <= most:
                wanted = f"{least}" if least == most else f"{least} to {most}"
                return f"its mask keeps {count} entries of {name!r}; {wanted} are expected"
        return ""


@dataclass(frozen=True)
class Complement:
    """The mask keeps exactly what the mask that was sent does not."""

    @property
    def bounded(self) -> frozenset[str]:
        """Return no name: values may be any."""
        return frozenset()

    def wrong(self, message: Message, known: Mask | None) -> str:
        """Return the first tensor of which the mask is not the complement."""
        mask = message.mask or {}
        for name, kept in (known or {}).items():
            if name not in mask or bool((mask[name] == kept).any()):
                return f"its mask of {name!r} is not the complement of the one that was sent"
        return ""


def _ends(values: torch.Tensor) -> tuple[float, float]:
    """Return the least and the largest of a tensor's values; of an empty tensor, ends that are within any range."""
    if not values.numel():
        return math.inf, -math.inf
    low, high = values.aminmax()
    return float(low), float(high)


def _count(mask: Mask | None) -> int:
    return sum(int(kept.sum()) for kept in (mask or {}).values())
