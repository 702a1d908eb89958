"""Hooks of published methods: error feedback, pulls towards zero, widths drawn at each step, pruned activations."""

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
    """Weights that are shown masked while a gradient is taken, and brought back."""

    def __init__(self) -> None:
        self._whole: list[tuple[torch.Tensor, torch.Tensor]] = []

    def show(self, masked: Shown) -> None:
        """Multiply weights by masks."""
        self._whole = [(weight, weight.clone()) for weight, _ in masked]
        for weight, keep in masked:
            weight.mul_(keep)

    def gradients(self) -> None:
        """Bring back what was shown masked."""
        for weight, whole in self._whole:
            weight.copy_(whole)


@dataclass(frozen=True)
class Feedback(Hook):
    """Gradients are taken under the mask, but move all weights, and the mask does not hold in the result.

    Reference: dynamic pruning with feedback, Lin et al., arXiv 2006.07253.
    """

    dense: ClassVar[bool] = True

    def begin(self, view: View, turn: Turn) -> Steps:
        """Take the masks from the view: nothing holds after a step."""
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
    """Each step draws one of some masks: its gradient is that of the model under it, and moves only what it keeps.

    Attributes:
        masks: of the narrower models; one at least.

    Reference: ordered dropout, Horváth et al., arXiv 2102.13451.
    """

    masks: tuple[Mask, ...]

    def begin(self, view: View, turn: Turn) -> Steps:
        """Begin a stream of draws."""
        return _Narrow(self.masks, view, turn.derive("narrow"))

    def slim(self, removal: Plan) -> Hook:
        """Cut the masks."""
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
    """Entries are pulled to 0 beside the loss, by ``strength`` times the L2 norm of each tensor's.

    Attributes:
        chosen: which entries, by tensor; True: pulled.
        strength: lambda.
    """

    chosen: Mask
    strength: float

    def begin(self, view: View, turn: Turn) -> Steps:
        """Find the parameters."""
        del turn
        return _Fading([(p, self.chosen[n]) for n, p in view.parameters.items() if n in self.chosen], self.strength)

    def slim(self, removal: Plan) -> Hook:
        """Cut what is pulled."""
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
    """Of each activation the largest entries alone are kept for the backward pass; see ``pruning.activations``.

    Attributes:
        share: of the entries, that is kept; 1: all.
    """

    share: float

    def begin(self, view: View, turn: Turn) -> Steps:
        """Keep the share."""
        del view, turn
        return _PrunedActivations(self.share) if self.share < 1 else Steps()


class _PrunedActivations(Steps):
    def __init__(self, share: float) -> None:
        self._share = share

    def forward(self) -> contextlib.AbstractContextManager[object]:
        return activations.keeping(self._share)
