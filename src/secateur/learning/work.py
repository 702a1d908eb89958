"""Work: what a client's code needs computed (train, measure, learn, score), and how it is done for one client alone.

A job holds all that it needs and changes nothing but the resident model, so that whoever computes may do it at once, or
wait for other clients' jobs of the same kind and do them together (``learning.batched``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.learning import gradients, loop, resident, supermask
from secateur.learning.compute import Compute
from secateur.learning.evaluate import Score, evaluate
from secateur.learning.hook import Hook
from secateur.learning.loop import Effort, Fit
from secateur.learning.optimiser import Training
from secateur.learning.supermask import Effective, Penalty
from secateur.learning.task import Data
from secateur.pruning.criteria import Form
from secateur.pruning.mask import Mask, Tensors
from secateur.pruning.structure import Plan
from secateur.pruning.surgery import shrink
from secateur.streams import Turn


def leave() -> None:
    """Leave a model as it is."""


Made = tuple[dict[str, torch.Tensor], Fit]


@dataclass(frozen=True)
class Train:
    """A local training; see ``loop.fit``. Its result is the trained tensors, slim if units are cut, and what was done.

    Attributes:
        model: the resident model.
        tensors: all exchanged tensors to start from, in their full shapes.
        data, training, turn, mask, effort, hooks: those of ``loop.fit``; mask and hooks are slim if units are cut.
        removal: the units that are cut out of the model first.
        restore: puts back what the model keeps beside its exchanged tensors; called first.
    """

    model: nn.Module
    tensors: Tensors
    data: Data
    training: Training
    turn: Turn
    mask: Mask | None = None
    effort: Effort | None = None
    hooks: Sequence[Hook] = ()
    removal: Plan = Plan()  # noqa: RUF009 -- frozen
    restore: Callable[[], None] = leave

    def alone(self, compute: Compute) -> Made:
        """Train one client; without cuts, the resident model holds the trained tensors afterwards."""
        self.restore()
        resident.load(self.model, self.tensors)
        model = compute.model(shrink(self.model, self.removal) if self.removal else self.model)
        with compute.draws(self.turn.derive("dropout")):
            done = loop.fit(
                model, compute.data(self.data), self.training, self.turn, mask=compute.moved(self.mask),
                effort=self.effort, hooks=compute.moved(self.hooks), autocast=compute.autocast,
            )  # fmt: skip
        trained = returned(resident.tensors_of(model), self.tensors)
        self.settle(trained)
        return trained, done

    def settle(self, trained: Tensors) -> None:
        """Leave the resident model as a training alone leaves it."""
        if not self.removal:
            resident.load(self.model, trained)

    @property
    def passes(self) -> Effort:
        """Return epochs, patience and share of rows."""
        return self.effort or Effort(self.training.epochs)


@dataclass(frozen=True)
class Measure:
    """A statistic of gradients; see ``gradients.gradient_statistic``, whose result it has.

    Attributes:
        model: the resident model.
        tensors: the tensors at which gradients are taken.
        data, training, form, turn, batches: those of ``gradient_statistic``.
        restore: as for ``Train``.
    """

    model: nn.Module
    tensors: Tensors
    data: Data
    training: Training
    form: Form
    turn: Turn
    batches: int = 1
    restore: Callable[[], None] = leave

    def alone(self, compute: Compute) -> Made:
        """Measure one client's gradients."""
        self.restore()
        resident.load(self.model, self.tensors)
        model = compute.model(self.model)
        with compute.draws(self.turn.derive("dropout")):
            statistic, done = gradients.gradient_statistic(
                model, compute.data(self.data), self.training, self.form, self.turn, batches=self.batches
            )
        return returned(statistic, self.tensors), done


@dataclass(frozen=True)
class Learn:
    """A training of scores; see ``supermask.learn``, whose result it has.

    Attributes:
        model: the resident model.
        tensors: the tensors that are loaded first.
        data, training, scores, effective, turn, penalty: those of ``learn``.
        restore: as for ``Train``.
    """

    model: nn.Module
    tensors: Tensors
    data: Data
    training: Training
    scores: Tensors
    effective: Effective
    turn: Turn
    penalty: Penalty | None = None
    restore: Callable[[], None] = leave

    def alone(self, compute: Compute) -> Made:
        """Learn one client's scores; the resident model keeps the weights that are not made of scores."""
        self.restore()
        resident.load(self.model, self.tensors)
        model, scores = compute.model(self.model), {n: compute.tensor(t) for n, t in self.scores.items()}
        if compute.dtype:
            scores = {name: score.to(compute.dtype) for name, score in scores.items()}
        with compute.draws(self.turn.derive("dropout")):
            learnt, done = supermask.learn(
                model, compute.data(self.data), self.training, scores, placed(self.effective, compute), self.turn,
                penalty=self.penalty and fined(self.penalty, compute),
            )  # fmt: skip
        if model is not self.model:
            resident.load(self.model, resident.tensors_of(model))
        return returned(learnt, self.scores), done

    def settle(self, moved: Tensors) -> None:
        """Leave the resident model as learning alone leaves it: with running statistics that moved."""
        resident.load(self.model, {**self.tensors, **moved})


@dataclass(frozen=True)
class Evaluate:
    """An evaluation; see ``evaluate``, whose result it has.

    Attributes:
        model: the resident model.
        tensors: the tensors that are evaluated.
        data: the rows.
        restore: as for ``Train``.
    """

    model: nn.Module
    tensors: Tensors
    data: Data
    restore: Callable[[], None] = leave

    def alone(self, compute: Compute) -> Score:
        """Evaluate one client's tensors."""
        self.restore()
        resident.load(self.model, self.tensors)
        return evaluate(compute.model(self.model), compute.data(self.data))


Job = Train | Measure | Learn | Evaluate
Worker = Callable[[Any], Any]
"""A function that does a job and returns its result."""


_PLAIN = Compute()


def alone(job: Job, compute: Compute = _PLAIN) -> Any:
    """Do one client's job at once."""
    return job.alone(compute)


def returned(made: Mapping[str, torch.Tensor], given: Tensors) -> dict[str, torch.Tensor]:
    """Return what was computed on the CPU, each tensor in the dtype of the given one of its name."""
    return {n: t.to("cpu", given[n].dtype) if n in given else t.cpu() for n, t in made.items()}


def placed(effective: Effective, compute: Compute) -> Effective:
    """Return a function from scores to weights whose result lies on the device, in the precision.

    On a device the function itself runs on the CPU: it holds tensors of its client.
    """
    if compute.plain:
        return effective

    def made(scores: Tensors) -> dict[str, torch.Tensor]:
        return {name: part.to(compute.device, compute.dtype) for name, part in effective(here(scores)).items()}

    return made


def fined(penalty: Penalty, compute: Compute) -> Penalty:
    """Return a penalty whose result lies on the device; it is computed as ``placed`` says."""
    return penalty if compute.plain else lambda scores: penalty(here(scores)).to(compute.device)


def here(scores: Tensors) -> dict[str, torch.Tensor]:
    """Return scores on the CPU, where clients' own functions of them are computed; gradients pass."""
    return {name: score.cpu() for name, score in scores.items()}
