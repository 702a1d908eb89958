"""The optimisers of ``learning.optimiser`` on tensors of several clients, stacked along their first dimension."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from secateur.learning.optimiser import BETAS, EPSILON, Training
from secateur.learning.stack import Chosen, along


class StackedOptimiser:
    """SGD, Adam or AdamW on stacked tensors, with the moments of each client."""

    def __init__(self, weights: Mapping[str, torch.Tensor], training: Training, round_: int) -> None:
        self._training, self._rate = training, training.rate(round_)
        moments = 2 if training.rule.adaptive else int(training.momentum > 0)
        self._moments = {name: [torch.zeros_like(t) for _ in range(moments)] for name, t in weights.items()}
        self._taken = {name: torch.zeros(len(t), dtype=torch.float64, device=t.device) for name, t in weights.items()}

    def move(self, name: str, weights: torch.Tensor, slope: torch.Tensor, chosen: Chosen) -> None:
        """Move ``weights``, the entries ``chosen`` of a stack, in place."""
        rule, decay = self._training.rule, self._training.weight_decay
        if decay and rule.decoupled:
            weights.mul_(1 - self._rate * decay)
        elif decay:
            slope = slope.add(weights, alpha=decay)
        if rule.adaptive:
            slope = self._adam(name, slope, chosen)
        elif self._training.momentum:
            velocity = self._moments[name][0]
            slope = velocity[chosen] * self._training.momentum + slope
            velocity[chosen] = slope
        weights.add_(slope, alpha=-self._rate)

    def _adam(self, name: str, slope: torch.Tensor, chosen: Chosen) -> torch.Tensor:
        first, second = self._moments[name]
        first[chosen] = first[chosen].lerp(slope, 1 - BETAS[0])
        second[chosen] = second[chosen] * BETAS[1] + slope.square() * (1 - BETAS[1])
        self._taken[name][chosen] += 1
        taken = self._taken[name][chosen]
        far, near = (along(1 - beta**taken, slope).to(slope.dtype) for beta in BETAS)
        return first[chosen] / far / ((second[chosen] / near).sqrt() + EPSILON)
