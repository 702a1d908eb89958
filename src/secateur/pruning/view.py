"""The view that a training step has of a model's weights: masked, masked for the gradient alone, or narrowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from secateur.pruning.mask import Mask


class View:
    """What a model's weights are while a gradient is taken.

    Plain: masked, as every step leaves them (``kept``: masks as factors). ``feedback``: the gradient sees masked
    weights, the step moves all. ``narrow``: the gradient of each step sees one of these masks, drawn anew, and the step
    moves what it left.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        mask: Mask | None,
        *,
        feedback: bool,
        narrow: Sequence[Mask],
        seed: int,
    ) -> None:
        held = [(n, p, mask[n]) for n, p in parameters.items() if mask and n in mask]
        # laid out in memory as the weights are
        pruned = [(p, torch.empty_like(p).copy_(keep)) for _, p, keep in held if not bool(keep.all())]
        self._held = [(p.detach(), keep) for p, keep in pruned]
        self.kept: dict[torch.Tensor, torch.Tensor] = {} if feedback else dict(pruned)
        self.pruned = [] if feedback else [(p, ~keep) for _, p, keep in held]
        self._feedback, self._narrow = feedback, narrow
        self._parameters = parameters
        self._draw = torch.Generator().manual_seed(seed)
        self._dense: list[tuple[torch.Tensor, torch.Tensor]] = []

    def enter(self) -> None:
        """Show the masked weights."""
        if self._feedback:
            self._show(self._held)
        if self._narrow:
            mask = self._narrow[int(torch.randint(len(self._narrow), (1,), generator=self._draw))]
            shown = [(self._parameters[n], keep) for n, keep in mask.items() if n in self._parameters]
            self._show([(p.detach(), keep.float()) for p, keep in shown])
            self.pruned = [(p, ~keep) for p, keep in shown]

    def _show(self, masked: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._dense = [(weight, weight.clone()) for weight, _ in masked]
        for weight, keep in masked:
            weight.mul_(keep)

    def leave(self) -> None:
        """Bring back what was shown masked; of a narrow model nothing but its own part has a gradient."""
        for weight, whole in self._dense:
            weight.copy_(whole)
        for parameter, gone in self.pruned if self._narrow else ():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(gone, 0.0)
