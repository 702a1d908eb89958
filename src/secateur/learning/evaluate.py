"""Evaluation: a model's loss and scores on a set of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from secateur.learning.task import Data, Task
from secateur.models.memory_format import lay_out


@dataclass(frozen=True)
class Score:
    """The scores of a model on a set of rows.

    Attributes:
        metric: the task's main score, such as accuracy in [0, 1] or the mean absolute error; NaN without rows.
        loss: the mean loss over rows; NaN without rows.
        samples: the number of rows.
        further: the task's other scores, by name; scores that are not defined on these rows are left out.
    """

    metric: float
    loss: float
    samples: int
    further: Mapping[str, float] = field(default_factory=dict)


def evaluate(model: nn.Module, data: Data, *, batch_size: int = 1000) -> Score:
    """Return the scores of the resident model; the batches are fixed, so that every process gets the same figures."""
    if not len(data):
        return Score(math.nan, math.nan, 0)
    model.eval()
    lay_out(model)
    outputs, targets = list[torch.Tensor](), list[torch.Tensor]()
    with torch.no_grad():
        for start in range(0, len(data), batch_size):
            x, y = data.batch(slice(start, start + batch_size))
            outputs.append(model(x).cpu())
            targets.append(y.cpu())
    return scored(torch.cat(outputs), torch.cat(targets), data.task, batch_size)


def scored(outputs: torch.Tensor, targets: torch.Tensor, task: Task, batch_size: int) -> Score:
    """Return the scores of a model's outputs on at least one row; its loss is summed by batches."""
    pairs = zip(torch.split(outputs, batch_size), torch.split(targets, batch_size), strict=True)
    total = sum(float(task.loss(output, y)) * len(y) for output, y in pairs)
    scores = task.scores(outputs, targets)
    main, *others = (metric.name for metric in task.metrics)
    further = {name: scores[name] for name in others if not math.isnan(scores[name])}
    return Score(scores[main], total / len(targets), len(targets), further)
