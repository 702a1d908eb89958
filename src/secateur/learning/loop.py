"""The local training loop: a resident model, seeded batches, and a mask applied after every optimiser step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from secateur.errors import DataError
from secateur.learning.hook import Hook, Steps, View
from secateur.learning.optimiser import Optimiser, Training
from secateur.learning.resident import enforce
from secateur.learning.task import Data
from secateur.models.memory_format import lay_out
from secateur.pruning.mask import Mask
from secateur.streams import Turn, global_stream


@dataclass(frozen=True)
class Fit:
    """What a local training did.

    Attributes:
        samples: the number of the client's rows.
        processed: rows processed, over all epochs.
        steps: optimiser steps.
        epochs: epochs trained.
        loss: the mean training loss of the last epoch.
    """

    samples: int
    processed: int
    steps: int
    epochs: int
    loss: float


@dataclass(frozen=True)
class Effort:
    """How long one call of ``fit`` trains, if that differs from the settings of the training.

    Attributes:
        epochs: the most epochs.
        patience: the number of epochs without a better mean loss after which training stops; 0: it never stops early.
        share: the share of the client's rows that is used, in (0, 1].
    """

    epochs: int
    patience: int = 0
    share: float = 1.0

    def rows(self, count: int) -> int:
        """Return how many of a client's ``count`` rows are used; at least 1."""
        return max(1, math.ceil(self.share * count))


def fit(
    model: nn.Module, data: Data, training: Training, turn: Turn, *,
    mask: Mask | None = None, effort: Effort | None = None, hooks: Sequence[Hook] = (), autocast: str = "none",
) -> Fit:  # fmt: skip
    """Train the resident model in place on a client's rows.

    After every optimiser step w <- w * M, so that a pruned weight is exactly 0 whatever the momentum, unless a hook is
    dense. With ``effort.patience`` P > 0 training stops after P epochs without a better epoch-mean loss.

    Args:
        model: the resident model; its frozen parameters and constant buffers do not change.
        data: the client's rows.
        training: the settings of the training.
        turn: the key of the random draws; its round sets the learning rate.
        mask: the entries to keep, by name; None: all.
        effort: epochs, patience and share of rows, if they differ from the settings.
        hooks: what a method does in each step besides.
        autocast: ``bf16`` computes the model in bfloat16 in the operations that torch deems safe.

    Guarantees:
        The same turn and weights give the same bits in any process with one thread.
    """
    lay_out(model)
    dense = any(hook.dense for hook in hooks)
    enforce(model, None if dense else mask)
    parameters = dict(model.named_parameters())
    view = View(parameters, mask)
    steps = [hook.begin(view, turn) for hook in hooks]
    optimiser = Optimiser(parameters.values(), training, max(1, turn.round), view.kept)
    anchor = [p.detach().clone() for p in parameters.values()] if training.prox else []

    def step(index: torch.Tensor) -> float:
        for part in steps:
            part.before()
        optimiser.clear()
        loss = _gradient(model, data.batch(index), data, training, anchor, view, steps, autocast)
        for part in steps:
            part.gradients()
        optimiser.step()
        return loss

    if not model.training:
        model.train()
    done = loop(step, data, training, effort or Effort(training.epochs), turn, paired=normalises(model))
    if not dense:
        enforce(model, mask)
    return done


def loop(
    step: Callable[[torch.Tensor], float], data: Data, training: Training, effort: Effort, turn: Turn, *,
    paired: bool = False,
) -> Fit:  # fmt: skip
    """Call ``step`` with the row indices of each batch, epoch after epoch; it returns the batch's mean loss.

    The batches, and the draws of dropout, follow from the turn. ``paired`` is that of ``batches``.

    Raises:
        DataError: there are no rows.
    """
    if not len(data):
        raise DataError("this client has no training rows")
    use = effort.rows(len(data))
    drawn = orders(len(data), effort, turn)
    best, stale, epoch, processed, steps, mean_loss = math.inf, 0, 0, 0, 0, 0.0
    with global_stream(turn.seed, "dropout", turn.round, turn.client):
        for epoch, rows in enumerate(drawn, start=1):  # noqa: B007 -- the count is returned
            total = 0.0
            for index in batches(rows, training.batch_size, paired=paired):
                total += step(index) * len(index)
                steps += 1
            processed += use
            mean_loss = total / use
            stale = 0 if mean_loss < best else stale + 1
            best = min(best, mean_loss)
            if effort.patience and stale >= effort.patience:
                break
    return Fit(len(data), processed, steps, epoch, mean_loss)


def batches(rows: torch.Tensor, size: int, *, paired: bool, most: int | None = None) -> list[torch.Tensor]:
    """Return the first ``most`` batches of rows, or all; the last one may be smaller than ``size``.

    Where ``paired``, a last batch of one row joins the one before it: torch cannot normalise one row by itself, and no
    row goes unused.
    """
    parts = list(torch.split(rows, size))[:most]
    if paired and len(parts) > 1 and len(parts[-1]) == 1 < size:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def normalises(model: nn.Module) -> bool:
    """Return whether some layer normalises by statistics of a batch, as batch norm does in training."""
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) or "running_mean" in layer._buffers  # noqa: SLF001
               for layer in model.modules())  # fmt: skip


def orders(count: int, effort: Effort, turn: Turn) -> Iterator[torch.Tensor]:
    """Yield the row indices of each epoch, out of ``count`` rows, in the order in which a client uses them."""
    shuffle = torch.Generator().manual_seed(turn.derive("batches"))
    use = effort.rows(count)
    rows = torch.randperm(count, generator=shuffle)[:use] if use < count else torch.arange(use)
    for _ in range(effort.epochs):
        yield rows[torch.randperm(use, generator=shuffle)]


def forward(model: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, autocast: str) -> torch.Tensor:
    """Return a model's output; in float32 too if ``autocast`` lets the model compute in bfloat16."""
    if autocast == "none":
        return model(x)
    with torch.autocast(x.device.type, torch.bfloat16):
        output = model(x)
    return output.float()


def _gradient(
    model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], data: Data, training: Training,
    anchor: list[torch.Tensor], view: View, steps: Sequence[Steps], autocast: str,
) -> float:  # fmt: skip
    x, y = batch
    with contextlib.ExitStack() as around:
        for part in steps:
            around.enter_context(part.forward())
        output = forward(model, x, autocast)
    loss = data.task.loss(output, y)
    value = loss.item()
    for parameter, start in zip(model.parameters(), anchor, strict=False):
        loss = loss + 0.5 * training.prox * (parameter - start).square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    if training.clip:
        for parameter, gone in view.pruned:  # pruned entries take no step, and must not shorten the others
            if parameter.grad is not None:
                parameter.grad.masked_fill_(gone, 0.0)
        nn.utils.clip_grad_norm_(model.parameters(), training.clip)
    return value
