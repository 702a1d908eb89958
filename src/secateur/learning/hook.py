"""Hooks: what a method does within the steps of a local training, beyond enforcing the mask after each step."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from secateur.pruning.mask import Mask
from secateur.pruning.structure import Plan
from secateur.streams import Turn


class View:
    """The parameters of a training and the masks on them; hooks may replace ``kept`` and ``pruned``.

    Attributes:
        parameters: the model's parameters, by name.
        kept: the mask, as a factor, of each parameter with pruned entries; it is applied after every step.
        pruned: parameters with flags of the entries that take no step and must not count in a gradient's norm.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], mask: Mask | None) -> None:
        held = [(p, mask[n]) for n, p in parameters.items() if mask and n in mask]
        self.parameters = parameters
        # laid out in memory as the weights are
        self.kept: dict[torch.Tensor, torch.Tensor] = {
            p: torch.empty_like(p).copy_(keep) for p, keep in held if not bool(keep.all())
        }
        self.pruned = [(p, ~keep) for p, keep in held]


class Steps:
    """The actions of a hook in the steps of one training; this base class does nothing."""

    def before(self) -> None:
        """Act before a step's forward pass."""

    def forward(self) -> contextlib.AbstractContextManager[object]:
        """Return the context of a step's forward pass."""
        return contextlib.nullcontext()

    def gradients(self) -> None:
        """Act on the parameters and their gradients, after clipping and before the optimiser's step."""


class Hook:
    """Base of hooks, which change the steps of a local training; a method gives them to ``Client.train``.

    Hooks are frozen dataclasses of settings; the ``Steps`` that ``begin`` returns hold what one training remembers from
    step to step. Several hooks act in the order in which they are given. In a stack of clients, a hook sees each one's
    part of it; clients whose hook acts around the forward pass are trained one by one.

    Attributes:
        dense: whether training moves pruned weights too; the mask does not hold in the result then, and no unit is cut.
    """

    dense: ClassVar[bool] = False

    def begin(self, view: View, turn: Turn) -> Steps:
        """Return the actions for one training, whose draws follow from ``turn``; the view may be changed."""
        del view, turn
        return Steps()

    def slim(self, removal: Plan) -> Hook:
        """Return the same hook for a model from which the units of ``removal`` were cut."""
        del removal
        return self
