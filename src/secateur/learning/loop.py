"""The local loop: a resident model, seeded batches, a mask that holds after every optimiser step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from secateur.learning.hook import Hook, Steps, View
from secateur.learning.optimiser import Optimiser, Training
from secateur.learning.resident import enforce, lay_out
from secateur.learning.task import Data
from secateur.pruning.mask import Mask
from secateur.streams import Turn, global_stream


@dataclass(frozen=True)
class Fit:
    """What a local training did: rows it holds, rows processed, optimiser steps, epochs, last epoch's loss."""

    samples: int
    processed: int
    steps: int
    epochs: int
    loss: float


@dataclass(frozen=True)
class Effort:
    """How long one call of ``fit`` trains, where that differs from the round's setting.

    Attributes:
        epochs: how many, at most.
        patience: epochs without a better mean loss after which it stops; 0: none.
        share: of the rows.
    """

    epochs: int
    patience: int = 0
    share: float = 1.0

    def rows(self, count: int) -> int:
        """Return how many of a client's rows are used."""
        return max(1, math.ceil(self.share * count))


def fit(
    model: nn.Module, data: Data, training: Training, turn: Turn, *,
    mask: Mask | None = None, effort: Effort | None = None, hooks: Sequence[Hook] = (), autocast: str = "none",
) -> Fit:  # fmt: skip
    """Train the resident model in place on a client's rows.

    After every optimiser step w <- w * M, so a pruned weight is exactly 0 whatever the momentum says, unless a hook
    trains weights whatever the mask. With ``effort.patience`` P > 0 training stops after P epochs without a better
    epoch-mean loss.

    Args:
        model: resident; its frozen parameters and constant buffers stay.
        data: the client's rows.
        training: the round's setting.
        turn: sets the learning rate, by its round, and the random streams.
        mask: what is pruned; None: nothing.
        effort: epochs, patience and share of rows where they differ from the round's setting.
        hooks: what a method does in each step besides.
        autocast: ``bf16`` computes the model in bfloat16 where torch deems it safe.

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
    done = loop(step, data, training, effort or Effort(training.epochs), turn)
    if not dense:
        enforce(model, mask)
    return done


def loop(step: Callable[[torch.Tensor], float], data: Data, training: Training, effort: Effort, turn: Turn) -> Fit:
    """Call ``step`` with the rows of each batch, epoch after epoch; it returns the batch's mean loss.

    The rows of each batch, and what dropout draws, follow from the turn.
    """
    use = effort.rows(len(data))
    drawn = orders(len(data), effort, turn)
    best, stale, epoch, processed, steps, mean_loss = math.inf, 0, 0, 0, 0, 0.0
    with global_stream(turn.seed, "dropout", turn.round, turn.client):
        for epoch, rows in enumerate(drawn, start=1):  # noqa: B007 -- the count is returned
            total = 0.0
            for index in torch.split(rows, training.batch_size):
                total += step(index) * len(index)
                steps += 1
            processed += use
            mean_loss = total / use
            stale = 0 if mean_loss < best else stale + 1
            best = min(best, mean_loss)
            if effort.patience and stale >= effort.patience:
                break
    return Fit(len(data), processed, steps, epoch, mean_loss)


def orders(count: int, effort: Effort, turn: Turn) -> Iterator[torch.Tensor]:
    """Yield the rows of each epoch, of ``count``, in the order in which a client goes through them."""
    shuffle = torch.Generator().manual_seed(turn.derive("batches"))
    use = effort.rows(count)
    rows = torch.randperm(count, generator=shuffle)[:use] if use < count else torch.arange(use)
    for _ in range(effort.epochs):
        yield rows[torch.randperm(use, generator=shuffle)]


def forward(model: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, autocast: str) -> torch.Tensor:
    """Return a model's output, in float32 where ``autocast`` lets it compute in bfloat16."""
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
        for parameter, gone in view.pruned:  # what is pruned takes no step, and must not shorten the others'
            if parameter.grad is not None:
                parameter.grad.masked_fill_(gone, 0.0)
        nn.utils.clip_grad_norm_(model.parameters(), training.clip)
    return value
