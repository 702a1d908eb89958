"""Messages: named tensors, an optional mask and a few scalars; and descriptions of what a receiver accepts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch

from secateur.wire.values import Values

Tensors = Mapping[str, torch.Tensor]
Masks = Mapping[str, torch.Tensor]
Scalar = bool | int | float | str


@dataclass(frozen=True)
class Message:
    """A message between the server and one client, in one direction.

    Attributes:
        tensors: tensors by name, of float32, int64, int32, uint8 or bool.
        mask: boolean tensors for some of ``tensors``; where False, the value is 0 and is not sent. None: no mask.
        scalars: scalars by name; the size of a number does not depend on its value.
    """

    tensors: Tensors
    mask: Masks | None = None
    scalars: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def size(self) -> int:
        """Return the number of entries."""
        return math.prod(self.shape)


def specs_of(tensors: Tensors) -> dict[str, Spec]:
    """Return each tensor's shape and dtype by its name."""
    return {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


class Check(Protocol):
    """Something that the values or the mask of a message must be; see ``contract.checks``."""

    @property
    def bounded(self) -> frozenset[str]:
        """Return the names of the tensors whose values lie between two finite numbers if the check passes."""

    def wrong(self, message: Message, known: Masks | None) -> str:
        """Return what is wrong with a message, in words; empty: nothing. ``known`` is the mask that was sent."""


@dataclass(frozen=True)
class Expected:
    """The description of messages that a receiver accepts; every length is checked against it before allocating.

    Attributes:
        tensors: the tensors that a message must have, by name.
        mask: ``none`` may come; a fresh one is ``optional`` or ``required``; or exactly the ``same`` as known.
        maskable: names that a fresh mask may cover (None: any), and must all cover when it is ``required``.
        known: the mask that the receiver holds already; a mask may come as a change of it.
        within: a fresh mask must not keep anything that ``known`` prunes; tensors that it does not cover are kept.
        scalars: exactly these names and types; None: any, at most 64.
        optional: some or all of the tensors may be missing.
        template: the tensors that a message names by a hash; None: all of ``tensors``.
        context: the request that must be answered, see ``codec.context_of``; None: any.
        values: the format in which float values must come, see ``values.FORMATS``; None: any.
        holds: digests of the groups of tensors that the receiver knows, see ``known``; a message may name these only.
        infinite: names of tensors whose values may be infinite, where they come as fp32; no value may be NaN.
        checks: what values and masks must be besides; they are looked at in the message that is meant: an update is
            added to what was sent first.
        ranges: least and most of scalars, by name.
    """

    tensors: Mapping[str, Spec]
    mask: Literal["none", "optional", "required", "same"] = "none"
    maskable: frozenset[str] | None = None
    known: Masks | None = None
    within: bool = False
    scalars: Mapping[str, type] | None = None
    optional: bool = False
    template: Mapping[str, Spec] | None = None
    context: int | None = None
    values: Values | None = None
    holds: frozenset[str] = frozenset()
    infinite: frozenset[str] = frozenset()
    checks: tuple[Check, ...] = ()
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, tensors: Tensors, **changes: Any) -> Expected:
        """Return the description that accepts exactly the names, shapes and dtypes of these tensors."""
        return replace(cls(specs_of(tensors)), **changes)
