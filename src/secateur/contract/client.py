"""What a method sees of one client while it responds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from secateur.contract.state import Setting
from secateur.learning import loop, resident
from secateur.learning.gradients import gradient_statistic
from secateur.learning.hook import Hook
from secateur.learning.loop import Effort, Fit
from secateur.learning.optimiser import Training
from secateur.learning.supermask import Effective, Penalty, learn
from secateur.learning.task import Data
from secateur.pruning import mask as masks
from secateur.pruning.criteria import Form
from secateur.pruning.mask import Mask, Tensors
from secateur.pruning.structure import plan, slim_mask, widen
from secateur.pruning.surgery import shrink
from secateur.streams import Turn
from secateur.wire.message import Scalar


@dataclass
class Client:
    """What a method sees of one client while it responds.

    Attributes:
        id: 0..K-1; ``SERVER`` where the server works on the model itself.
        setting: as on the server.
        model: the resident model; ``load`` and ``tensors`` move weights in and out.
        data: the client's own training rows.
        training: the round's local training.
        memory: tensors that this client keeps between rounds; saved with the run.
        initial: theta_0, the weights that the federation began with; both sides make them from the seed.
        fit: the local loop; ``loop.fit``, or one that trains several clients at once.
        measured: rows so far, of those processed, of which ``measure`` took gradients of all weights, pruned or not.
    """

    id: int
    setting: Setting
    model: nn.Module
    data: Data
    training: Training
    memory: dict[str, torch.Tensor] = field(default_factory=dict)
    initial: Tensors = field(default_factory=dict)
    fit: Callable[..., Fit] = loop.fit
    measured: int = 0

    def train(
        self, tensors: Tensors, mask: Mask | None, *,
        round_: int, effort: Effort | None = None, hooks: Sequence[Hook] = (),
    ) -> tuple[dict[str, torch.Tensor], Fit]:  # fmt: skip
        """Train from ``tensors`` under ``mask``; return the trained tensors, dense in shape, and what was done.

        Units that the mask leaves dead are cut out first, and a slim model is trained: less to compute, and the same
        weights but for the order of floating-point sums (and the draws of dropout layers that were cut).

        Args:
            tensors: what it begins with; all exchanged tensors.
            mask: what is pruned; None: nothing.
            round_: t.
            effort: epochs, patience and share of rows where they differ from the round's setting.
            hooks: what is done in each step besides. Where one of them is dense, the result is, and nothing is cut.
        """
        dense = any(hook.dense for hook in hooks)
        removal = plan(mask or {}, [] if dense else self.setting.layout.groups)
        hooks = [hook.slim(removal) for hook in hooks] if removal else hooks
        resident.load(self.model, tensors)
        model = shrink(self.model, removal) if removal else self.model
        held = slim_mask(mask, removal) if mask and removal else mask
        done = self.fit(model, self.data, self.training, self.turn(round_), mask=held, effort=effort, hooks=hooks)
        trained = resident.tensors_of(model)
        return masks.apply(widen(trained, removal, tensors), mask) if removal else trained, done

    def gradient_statistic(
        self, form: Form, tensors: Tensors, mask: Mask | None, *, round_: int, batches: int = 1
    ) -> tuple[dict[str, torch.Tensor], Fit]:
        """Return a statistic of each weight at ``tensors`` under ``mask``, pruned weights included; see ``measure``."""
        resident.load(self.model, masks.apply(tensors, mask))
        statistic, done = gradient_statistic(
            self.model, self.data, self.training, form, self.turn(round_), batches=batches
        )
        self.measured += done.processed
        return statistic, done

    def learn(
        self, tensors: Tensors, scores: Tensors, effective: Effective, *, round_: int, penalty: Penalty | None = None
    ) -> tuple[dict[str, torch.Tensor], Fit]:
        """Train scores from which weights are made, in a model of ``tensors``; see ``supermask.learn``."""
        resident.load(self.model, tensors)
        return learn(self.model, self.data, self.training, scores, effective, self.turn(round_), penalty=penalty)

    def turn(self, round_: int) -> Turn:
        """Return what its draws in a round follow from."""
        return Turn(self.setting.seed, round_, self.id)


def report(done: Fit) -> dict[str, Scalar]:
    """Return the scalars of ``ask.REPORT``."""
    return {"samples": done.samples, "processed": done.processed, "loss": done.loss}
