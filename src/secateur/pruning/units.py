"""Units as labels: every output of a layer has a number, and what must be removed together gets the same number.

A label is a positive integer; 0 stands where there is no unit. Every dimension of a parameter has a label for each of
its indices, and every value has one for each of its entries, in a tensor of the value's shape: what moves entries
(``view``, ``permute``, ``cat``) is followed by doing the same to the labels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from secateur.errors import ModelError

Part = Literal["weights", "incoming", "statistics", "outgoing", "numbers", "calls"]
"""What a parameter's dimension is to its units, or an attribute or call that counts them; see ``structure.Group``."""


@dataclass(frozen=True)
class Axis:
    """A dimension of a parameter or buffer: a label for each index, and what it is to those units."""

    tensor: str
    dim: int
    labels: torch.Tensor
    part: Part


class Units:
    """The labels of one model: which are one unit, which cannot be removed and why, and where they lie in tensors.

    Attributes:
        axes: the labelled dimensions of parameters, by name and dimension, in the order in which they were met.
        fixed: labels that cannot be removed, with the reason, in the order in which that was found.
        heads: labels of attention heads.
        audible: labels of units that are read while they are not zero.
        families: by label, the name of the layers that must keep equally many units.
        names: by label, the name of a group where its layer has several.
        alone: by layer, the labels of units that it treats each alone (a depthwise convolution), and that others make.
    """

    def __init__(self) -> None:
        self.axes: dict[tuple[str, int], Axis] = {}
        self.fixed: list[tuple[torch.Tensor, str]] = []
        self.heads: list[torch.Tensor] = []
        self.audible: list[torch.Tensor] = []
        self.families: dict[int, str] = {}
        self.names: dict[int, str] = {}
        self.alone: dict[str, torch.Tensor] = {}
        self._roots = torch.zeros(1, dtype=torch.int64)

    def fresh(self, count: int) -> torch.Tensor:
        """Return new labels; zeros for a single one, since the last unit of a layer is never removed."""
        if count == 1:
            return torch.zeros(1, dtype=torch.int64)
        first = len(self._roots)
        self._roots = torch.cat([self._roots, torch.arange(first, first + count)])
        return torch.arange(first, first + count)

    def roots(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the labels with one number for all that are one unit; constant dimensions are not stored."""
        return compact(self._roots[_core(labels)].expand(labels.shape))

    def fix(self, labels: torch.Tensor, reason: str) -> None:
        """Keep the units of these labels, for a reason."""
        self.fixed.append((distinct(_core(labels)), reason))

    def join(self, one: torch.Tensor, other: torch.Tensor, reason: str = "it meets what has no such units") -> None:
        """Make one unit of each pair of labels; a unit that meets none is fixed, for the given reason.

        Args:
            one, other: labels of shapes that broadcast.
            reason: why what meets no unit must stay.
        """
        one, other = _broadcast(*map(_core, _broadcast(one, other)))
        one, other = self._roots[one.reshape(-1)], self._roots[other.reshape(-1)]
        lonely = torch.cat([one[other == 0], other[one == 0]])
        if lonely.any():
            self.fixed.append((distinct(lonely), reason))
        pairs = distinct((one * len(self._roots) + other)[(one != other) & (one > 0) & (other > 0)])
        if len(pairs):
            self._merge((pairs // len(self._roots)).tolist(), (pairs % len(self._roots)).tolist())

    def _merge(self, ones: Iterable[int], others: Iterable[int]) -> None:
        parent: dict[int, int] = {}

        def root(label: int) -> int:
            while label in parent:
                label = parent[label]
            return label

        for one, other in zip(ones, others, strict=True):
            first, second = sorted((root(one), root(other)))
            if first != second:
                parent[second] = first
        renamed = torch.arange(len(self._roots))
        for label in parent:
            renamed[label] = root(label)
        self._roots = renamed[self._roots]

    def bind(self, tensor: str, dim: int, labels: torch.Tensor, part: Part) -> None:
        """Say which units lie along a dimension of a tensor; those that lay there already are the same units."""
        known = self.axes.get((tensor, dim))
        if known is None:
            self.axes[tensor, dim] = Axis(tensor, dim, labels.clone(), part)
            return
        if known.part == "outgoing" != part:
            self.axes[tensor, dim] = Axis(tensor, dim, known.labels, part)
        self.join(known.labels, labels, f"{tensor!r} is used more than once, and not for the same units")


def _broadcast(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = np.broadcast_shapes(one.shape, other.shape)  # torch's own imports its compiler
    return one.expand(shape), other.expand(shape)


def distinct(labels: torch.Tensor) -> torch.Tensor:
    """Return each label once, rising."""
    found: torch.Tensor = labels.unique()  # type: ignore[no-untyped-call]
    return found


def varying(labels: torch.Tensor) -> tuple[int, ...]:
    """Return the dimensions along which compact labels differ."""
    return tuple(d for d in range(labels.dim()) if labels.shape[d] > 1 and labels.stride(d) != 0)


def compact(labels: torch.Tensor) -> torch.Tensor:
    """Return equal labels that are stored once along each dimension in which they do not differ."""
    for dim in varying(labels):
        stored = _core(labels)
        if bool((stored == stored.narrow(dim, 0, 1)).all()):
            labels = labels.narrow(dim, 0, 1).expand(labels.shape)
    return labels


def _core(labels: torch.Tensor) -> torch.Tensor:
    """Return the stored part of labels: size 1 along the dimensions that are only expanded."""
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1 and labels.stride(dim) == 0:
            labels = labels.narrow(dim, 0, 1)
    return labels


@dataclass(frozen=True)
class Flow:
    """What is known of a value: the label of each entry, and whether an entry is zero when its unit is removed."""

    labels: torch.Tensor
    zero: bool = True

    def along(self, dim: int, units: Units) -> torch.Tensor:
        """Return the labels along one dimension; units that lie along others as well become one there.

        Raises:
            ModelError: the units do not lie along that dimension.
        """
        dim %= self.labels.dim()
        labels = units.roots(self.labels)
        places = varying(labels)
        if places and dim not in places:
            raise ModelError("its units lie along another dimension")
        line = labels.movedim(dim, -1)
        first = line[(0,) * (line.dim() - 1)]
        if len(places) > 1:
            units.join(line, first)
        return units.roots(first)
