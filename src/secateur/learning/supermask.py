"""Supermasks: training of scores from which a model's weights are made, by masks, signs or thresholds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from secateur.learning.loop import Effort, Fit, loop, normalises
from secateur.learning.optimiser import Optimiser, Training
from secateur.learning.task import Data
from secateur.pruning.mask import Tensors
from secateur.streams import Turn

Effective = Callable[[Tensors], dict[str, torch.Tensor]]
Penalty = Callable[[Tensors], torch.Tensor]


def learn(
    model: nn.Module, data: Data, training: Training, scores: Tensors, effective: Effective, turn: Turn, *,
    penalty: Penalty | None = None,
) -> tuple[dict[str, torch.Tensor], Fit]:  # fmt: skip
    """Train scores by the loss of a model whose weights are made of them; return the trained scores and what was done.

    Args:
        model: the resident model; weights that are not made of scores are used unchanged; running statistics move.
        data: the client's rows.
        training: the settings of the training, for the scores.
        scores: the tensors to train, by name.
        effective: the function from scores to weights by name; its gradient may be a straight-through one.
        turn: the key of the batches, which are those of ``loop.fit``.
        penalty: a function of the scores that is added to the loss; the reported loss is without it.
    """
    held = {name: nn.Parameter(tensor.detach().clone()) for name, tensor in scores.items()}
    optimiser = Optimiser(held.values(), training, max(1, turn.round))

    def step(index: torch.Tensor) -> float:
        x, y = data.batch(index)
        optimiser.clear()
        loss = data.task.loss(torch.func.functional_call(model, effective(held), (x,)), y)
        (loss if penalty is None else loss + penalty(held)).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        return loss.item()

    model.train()
    done = loop(step, data, training, Effort(training.epochs), turn, paired=normalises(model))
    return {name: tensor.detach() for name, tensor in held.items()}, done


def signed_constants(tensors: Tensors, names: list[str], gain: float) -> dict[str, torch.Tensor]:
    """Return the sign of each named weight times gain/sqrt(fan-in) of its layer; other tensors stay as they are.

    Reference: Ramanujan et al., "What's Hidden in a Randomly Weighted Neural Network?", arXiv 1911.13299.
    """
    made = dict(tensors)
    for name in names:
        weight = tensors[name]
        fan_in = max(1, weight[0].numel()) if weight.dim() > 1 else weight.numel()
        made[name] = torch.where(weight < 0, -1.0, 1.0) * (gain * fan_in**-0.5)
    return made


def straight_through(hard: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """Return the values of ``hard``, bit for bit, with the gradient of ``soft``; both have one shape."""
    passed: torch.Tensor = _StraightThrough.apply(hard, soft)  # type: ignore[no-untyped-call]
    return passed


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: object, hard: torch.Tensor, _soft: torch.Tensor) -> torch.Tensor:
        return hard.clone()

    @staticmethod
    def backward(_ctx: object, slope: torch.Tensor) -> Any:
        return None, slope
