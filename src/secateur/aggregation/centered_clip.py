"""Centred clipping: updates are clipped around the last round's, not around zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from secateur.aggregation.robust import Combined, Robust
from secateur.aggregation.updates import Block, Updates
from secateur.contract.state import Memory, State
from secateur.errors import check
from secateur.pruning.mask import Mask, Tensors, apply

_CENTRE = "centre"


@dataclass(frozen=True)
class CenteredClip(Robust):
    """v <- v + mean_k (Delta_k - v) min(1, radius / |Delta_k - v|), from the v of the round before, 0 at first.

    v is the update itself. Where the mask changes, it is 0 at weights that were pruned when it was made. A client says
    nothing of a coordinate that it does not hold. Each iteration reads the replies twice, in blocks; v is kept in the
    server's memory, as large as the model.

    Attributes:
        radius: how far from v an update may be; 0: the median distance of the cohort's, which has the scale of the
            model and of its training, where a number has not. The paper's is 10 for its own.
        iterations: how often v is moved in a round.
        then: the server's step.

    Reference: Karimireddy et al., "Learning from History for Byzantine Robust Optimization", arXiv 2012.10333. There
    clients send a momentum of their gradients (0.9); here they send updates, and ``training.momentum`` is theirs.
    """

    radius: float = 0.0
    iterations: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.radius >= 0, name="aggregator.radius", value=self.radius, must="be 0 or more")
        check(self.iterations >= 1, name="aggregator.iterations", value=self.iterations, must="be at least 1")

    def combine(self, updates: Updates, state: State) -> Combined:
        """Return the new centre."""
        centre = {name: part.reshape(-1) for name, part in state.memory.get(_CENTRE, {}).items()}
        for _ in range(self.iterations):
            moved = self._moved(updates, centre)
            centre = {name: part.reshape(-1) for name, part in moved.items()}
        return moved, None, {}

    def _moved(self, updates: Updates, centre: Tensors) -> dict[str, torch.Tensor]:
        distances = _distances(updates, centre)
        limit = self.radius or float(distances.quantile(0.5))
        share = (limit / distances.clamp(min=1e-300)).clamp(max=1.0)

        def step(block: Block) -> torch.Tensor:
            away, before = _away(block, centre)
            return before + (share @ away) / block.holders.clamp(min=1)

        return updates.made(step)

    def step(
        self, weights: Tensors, mean: Tensors, *, mask: Mask | None, memory: Memory
    ) -> tuple[dict[str, torch.Tensor], Memory]:
        """Return the next weights, and the memory with v under the key ``centre``."""
        after, memory = super().step(weights, mean, mask=mask, memory=memory)
        return after, {**memory, _CENTRE: apply(mean, mask)}


def _away(block: Block, centre: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each update less the centre, 0 where it is not held, and the centre; in float64."""
    width = block.values.shape[1]
    before = centre[block.name][block.where].double() if block.name in centre else torch.zeros(width).double()
    return (block.values.double() - before) * block.flags, before


def _distances(updates: Updates, centre: Tensors) -> torch.Tensor:
    """Return how far each update is from the centre, as if its client held all coordinates."""
    squares = torch.zeros(len(updates.clients), dtype=torch.float64)
    held = squares.clone()
    for block in updates.blocks():
        away, _ = _away(block, centre)
        squares += away.square().sum(dim=1)
        held += block.flags.sum(dim=1)
    return (squares * updates.size / held.clamp(min=1)).sqrt()
