"""What a method may do within the steps of a local training, beyond the mask that holds after each of them."""

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
    """A training's parameters, and which of their entries a mask prunes; hooks may change both of the latter.

    Attributes:
        parameters: by name.
        kept: for each parameter of which something is pruned the mask as a factor, that holds after every step.
        pruned: parameters with flags of entries that take no step, and so must not count in a gradient's norm.
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
    """What a hook does in the steps of one training; this does nothing."""

    def before(self) -> None:
        """Act before a step's forward pass."""

    def forward(self) -> contextlib.AbstractContextManager[object]:
        """Return the context of a step's forward pass."""
        return contextlib.nullcontext()

    def gradients(self) -> None:
        """Act on parameters and their gradients, clipped if they are to be, before the optimiser moves anything."""


class Hook:
    """What a method does otherwise in each step of a local training; given to ``Client.train`` by the method.

    Hooks are frozen and say what is done; what one training remembers from step to step lies in the ``Steps`` that
    ``begin`` makes. Several go together in the order in which they are given. Clients with a hook are trained one by
    one, not several in one batched step.

    Attributes:
        dense: training moves weights whatever the mask, which does not hold in the result: no unit is cut out.
    """

    dense: ClassVar[bool] = False

    def begin(self, view: View, turn: Turn) -> Steps:
        """Return what is done in the steps of one training, which is ``turn``'s; it may change what the view holds."""
        del view, turn
        return Steps()

    def slim(self, removal: Plan) -> Hook:
        """Return the same for a model from which units were cut."""
        del removal
        return self
