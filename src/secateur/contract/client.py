"""What a method sees of one client while it responds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from secateur.contract.state import Setting
from secateur.learning import training as local
from secateur.learning.gradients import measure
from secateur.learning.supermask import Effective, Penalty, learn
from secateur.pruning import mask as masks
from secateur.pruning.criteria import Form
from secateur.pruning.mask import Mask, Tensors
from secateur.pruning.structure import plan, slim_mask, widen
from secateur.pruning.surgery import shrink
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
        fit: the local loop; ``training.fit``, or one that trains several clients at once.
        measured: rows so far, of those processed, of which ``measure`` took gradients of all weights, pruned or not.
    """

    id: int
    setting: Setting
    model: nn.Module
    data: local.Data
    training: local.Training
    memory: dict[str, torch.Tensor] = field(default_factory=dict)
    initial: Tensors = field(default_factory=dict)
    fit: Callable[..., local.Fit] = local.fit
    measured: int = 0

    def train(
        self, tensors: Tensors, mask: Mask | None, *, round_: int, effort: local.Effort | None = None,
        feedback: bool = False, narrow: Sequence[Mask] = (), fading: Mask | None = None, fade: float = 0.0,
    ) -> tuple[dict[str, torch.Tensor], local.Fit]:  # fmt: skip
        """Train from ``tensors`` under ``mask``; return the trained tensors, dense in shape, and what was done.

        Units that the mask leaves dead are cut out first, and a slim model is trained: less to compute, and the same
        weights but for the order of floating-point sums (and the draws of dropout layers that were cut).

        With ``feedback`` the result is dense, and nothing is cut. ``narrow`` masks are those of narrower models, of
        which each step trains one; see ``training.fit``.
        """
        removal = plan(mask or {}, [] if feedback else self.setting.layout.groups)
        narrow = [slim_mask(part, removal) for part in narrow]
        local.load(self.model, tensors)
        model = shrink(self.model, removal) if removal else self.model
        held = slim_mask(mask, removal) if mask and removal else mask
        fading = slim_mask(fading, removal) if fading and removal else fading
        done = self.fit(
            model, self.data, self.training,
            round_=round_, seed=self.setting.seed, client=self.id, mask=held, effort=effort, feedback=feedback,
            narrow=narrow, fading=fading, fade=fade,
        )  # fmt: skip
        trained = local.tensors_of(model)
        return masks.apply(widen(trained, removal, tensors), mask) if removal else trained, done

    def measure(
        self, form: Form, tensors: Tensors, mask: Mask | None, *, round_: int, batches: int = 1
    ) -> tuple[dict[str, torch.Tensor], local.Fit]:
        """Return a statistic of each weight at ``tensors`` under ``mask``, pruned weights included; see ``measure``."""
        local.load(self.model, masks.apply(tensors, mask))
        found, done = measure(
            self.model, self.data, self.training, form,
            round_=round_, seed=self.setting.seed, client=self.id, batches=batches,
        )  # fmt: skip
        self.measured += done.processed
        return found, done

    def learn(
        self, tensors: Tensors, scores: Tensors, effective: Effective, *, round_: int, penalty: Penalty | None = None
    ) -> tuple[dict[str, torch.Tensor], local.Fit]:
        """Train scores from which weights are made, in a model of ``tensors``; see ``supermask.learn``."""
        local.load(self.model, tensors)
        return learn(
            self.model, self.data, self.training, scores, effective,
            round_=round_, seed=self.setting.seed, client=self.id, penalty=penalty,
        )  # fmt: skip


def report(done: local.Fit) -> dict[str, Scalar]:
    """Return the scalars of ``ask.REPORT``."""
    return {"samples": done.samples, "processed": done.processed, "loss": done.loss}
