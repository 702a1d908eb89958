"""A client as a method sees it while it responds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from secateur.contract.state import Setting
from secateur.learning.evaluate import Score
from secateur.learning.hook import Hook
from secateur.learning.loop import Effort, Fit
from secateur.learning.optimiser import Training
from secateur.learning.supermask import Effective, Penalty
from secateur.learning.task import Data
from secateur.learning.work import Evaluate, Learn, Measure, Train, Worker, alone
from secateur.pruning import mask as masks
from secateur.pruning.criteria import Form
from secateur.pruning.mask import Mask, Tensors
from secateur.pruning.structure import plan, slim_mask, widen
from secateur.streams import Turn
from secateur.wire.message import Scalar


@dataclass
class Client:
    """A client as a method sees it while it responds.

    Attributes:
        id: the client's number, 0 to K-1; ``SERVER`` if the server works on the model itself.
        setting: the federation, the same as on the server.
        model: the resident model; ``resident.load`` and ``resident.tensors_of`` move weights in and out.
        data: the client's own training rows.
        training: the settings of its local training.
        memory: tensors that this client keeps between rounds, by name; they are saved with the run.
        initial: theta_0, the weights that the federation began with; both sides make them from the seed.
        work: does the jobs of the client's code: at once, or when other clients have the same to do.
        measured: the number of processed rows for which ``gradient_statistic`` took gradients of all weights, pruned
            ones included.
        restore: puts back what the model keeps beside its exchanged tensors (counters, attributes); each training and
            measuring begins with it.
    """

    id: int
    setting: Setting
    model: nn.Module
    data: Data
    training: Training
    memory: dict[str, torch.Tensor] = field(default_factory=dict)
    initial: Tensors = field(default_factory=dict)
    work: Worker = alone
    measured: int = 0
    restore: Callable[[], None] = lambda: None

    def train(
        self, tensors: Tensors, mask: Mask | None, *,
        round_: int, effort: Effort | None = None, hooks: Sequence[Hook] = (),
    ) -> tuple[dict[str, torch.Tensor], Fit]:  # fmt: skip
        """Train from ``tensors`` under ``mask``; return the trained tensors in their full shapes, and what was done.

        Units that the mask prunes whole are cut out of the model before training. That saves computation and gives the
        same weights up to the order of floating-point sums (and the draws of dropout layers that were cut).

        Args:
            tensors: all exchanged tensors, by name: the weights to start from.
            mask: the entries to keep, by name; None: all.
            round_: t, from which the learning rate and the random draws follow.
            effort: epochs, patience and share of rows, if they differ from the settings of the training.
            hooks: what is done in each step besides. If one of them is dense, nothing is cut and the result is dense.
        """
        dense = any(hook.dense for hook in hooks)
        removal = plan(mask or {}, [] if dense else self.setting.layout.groups)
        hooks = [hook.slim(removal) for hook in hooks] if removal else hooks
        held = slim_mask(mask, removal) if mask and removal else mask
        job = Train(
            self.model,
            tensors,
            self.data,
            self.training,
            self.turn(round_),
            held,
            effort,
            tuple(hooks),
            removal,
            self.restore,
        )
        trained, done = self.work(job)
        return masks.apply(widen(trained, removal, tensors), mask) if removal else trained, done

    def gradient_statistic(
        self, form: Form, tensors: Tensors, mask: Mask | None, *, round_: int, batches: int = 1
    ) -> tuple[dict[str, torch.Tensor], Fit]:
        """Return a statistic of each weight at ``tensors`` under ``mask``, and what was done; nothing is trained.

        Statistics have the names and shapes of the trained parameters; pruned weights have one too. The forms are
        those of ``secateur.learning.gradients.gradient_statistic``.
        """
        statistic, done = self.work(
            Measure(
                self.model,
                masks.apply(tensors, mask),
                self.data,
                self.training,
                form,
                self.turn(round_),
                batches,
                self.restore,
            )
        )
        self.measured += done.processed
        return statistic, done

    def learn(
        self, tensors: Tensors, scores: Tensors, effective: Effective, *, round_: int, penalty: Penalty | None = None
    ) -> tuple[dict[str, torch.Tensor], Fit]:
        """Train scores from which a model's weights are made, starting from ``tensors``; see ``supermask.learn``."""
        learnt, done = self.work(
            Learn(
                self.model,
                tensors,
                self.data,
                self.training,
                scores,
                effective,
                self.turn(round_),
                penalty,
                self.restore,
            )
        )
        return learnt, done

    def score(self, tensors: Tensors, data: Data | None = None) -> Score:
        """Return the scores of the model with these tensors, on the client's training rows or others of its own."""
        score: Score = self.work(Evaluate(self.model, tensors, self.data if data is None else data, self.restore))
        return score

    def turn(self, round_: int) -> Turn:
        """Return the key of this client's random draws in a round."""
        return Turn(self.setting.seed, round_, self.id)


def report(done: Fit) -> dict[str, Scalar]:
    """Return the scalars of ``ask.REPORT`` for a finished training."""
    return {"samples": done.samples, "processed": done.processed, "loss": done.loss}
