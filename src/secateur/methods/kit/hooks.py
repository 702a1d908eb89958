"""Hooks of published methods: error feedback, norms pulled to zero, widths drawn at each step, pruned activations."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.learning.hook import Hook, Steps, View
from secateur.pruning import activations
from secateur.pruning.mask import Mask
from secateur.pruning.structure import Plan, slim_mask
from secateur.streams import Turn

Shown = Sequence[tuple[torch.Tensor, torch.Tensor]]


class _Masked(Steps):
    """Steps that mask weights while a gradient is taken, and restore them afterwards."""

    def __init__(self) -> None:
        self._whole: list[tuple[torch.Tensor, torch.Tensor]] = []

    def show(self, masked: Shown) -> None:
        """Multiply weights by their masks, and remember them unmasked."""
        self._whole = [(weight, weight.clone()) for weight, _ in masked]
        for weight, keep in masked:
            weight.mul_(keep)

    def gradients(self) -> None:
        """Restore the masked weights."""
        for weight, whole in self._whole:
            weight.copy_(whole)


@dataclass(frozen=True)
class Feedback(Hook):
    """Takes gradients under the mask, but moves all weights by them; the mask does not hold in the result.

    Reference: dynamic pruning with feedback, Lin et al., arXiv 2006.07253.
    """

    dense: ClassVar[bool] = True

    def begin(self, view: View, turn: Turn) -> Steps:
        """Take the masks over from the view, so that none is applied after a step."""
        del turn
        held = [(p.detach(), keep) for p, keep in view.kept.items()]
        view.kept, view.pruned = {}, []
        return _Feedback(held)


class _Feedback(_Masked):
    def __init__(self, held: Shown) -> None:
        super().__init__()
        self._held = held

    def before(self) -> None:
        self.show(self._held)


@dataclass(frozen=True)
class Narrow(Hook):
    """Draws a mask at each step: the gradient is that of the model under the mask, and moves only what it keeps.

    Attributes:
        masks: the masks of the narrower models; at least one.

    Reference: ordered dropout, Horváth et al., arXiv 2102.13451.
    """

    masks: tuple[Mask, ...]

    def begin(self, view: View, turn: Turn) -> Steps:
        """Start the stream from which each step draws."""
        return _Narrow(self.masks, view, turn.derive("narrow"))

    def slim(self, removal: Plan) -> Hook:
        """Return the hook with the masks cut to the slim model."""
        return Narrow(tuple(slim_mask(mask, removal) for mask in self.masks))


class _Narrow(_Masked):
    def __init__(self, masks: Sequence[Mask], view: View, seed: int) -> None:
        super().__init__()
        self._masks, self._view = masks, view
        self._draw = torch.Generator().manual_seed(seed)

    def before(self) -> None:
        mask = self._masks[int(torch.randint(len(self._masks), (1,), generator=self._draw))]
        own = self._view.parameters
        shown = [(own[name], keep) for name, keep in mask.items() if name in own]
        self.show([(p.detach(), keep.float()) for p, keep in shown])
        self._view.pruned = [(p, ~keep) for p, keep in shown]

    def gradients(self) -> None:
        super().gradients()
        for parameter, gone in self._view.pruned:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(gone, 0.0)


@dataclass(frozen=True)
class Fading(Hook):
    """Pulls chosen entries to 0, by a term of ``strength`` times their L2 norm in each tensor, added to the loss.

    Attributes:
        chosen: flags of the entries, by tensor name; True: pulled.
        strength: lambda, the factor of the term.
    """

    chosen: Mask
    strength: float

    def begin(self, view: View, turn: Turn) -> Steps:
        """Look up the parameters with chosen entries."""
        del turn
        return _Fading([(p, self.chosen[n]) for n, p in view.parameters.items() if n in self.chosen], self.strength)

    def slim(self, removal: Plan) -> Hook:
        """Return the hook with the flags cut to the slim model."""
        return Fading(slim_mask(self.chosen, removal), self.strength)


class _Fading(Steps):
    def __init__(self, pulled: Sequence[tuple[torch.nn.Parameter, torch.Tensor]], strength: float) -> None:
        self._pulled, self._strength = pulled, strength

    def gradients(self) -> None:
        for parameter, chosen in self._pulled:
            if parameter.grad is not None:
                part = parameter.detach() * chosen
                parameter.grad.add_(part * (self._strength / part.norm().clamp(min=1e-12)))


@dataclass(frozen=True)
class PrunedActivations(Hook):
    """Keeps only the largest entries of each activation for the backward pass; see ``pruning.activations``.

    Attributes:
        share: the share of entries that is kept; 1: all.
    """

    share: float

    def begin(self, view: View, turn: Turn) -> Steps:
        """Return the steps that prune activations; steps that do nothing if all is kept."""
        del view, turn
        return _PrunedActivations(self.share) if self.share < 1 else Steps()


class _PrunedActivations(Steps):
    def __init__(self, share: float) -> None:
        self._share = share

    def forward(self) -> contextlib.AbstractContextManager[object]:
        return activations.keeping(self._share)
