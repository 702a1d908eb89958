"""A model that predicts in the target's own unit; of a table, from a row in its own units, with its schema inside."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx, nn

from secateur.data.schema import Schema
from secateur.data.shards import Shape
from secateur.learning.task import Data


class Deployed(nn.Module):
    """A model behind the steps of ``Schema.rows``, and before those that undo ``Schema.targets``.

    Its input is (rows, features) in the order of the schema's features, best in double precision: numbers in their own
    units, categories as their places in the schema's lists (any other number: none of them), NaN where a cell is
    missing. Its output has the classes' logits, or a number in the target's own unit.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    numbers: torch.Tensor
    words: torch.Tensor
    codes: torch.Tensor
    marks: torch.Tensor

    def __init__(self, schema: Schema, model: nn.Module) -> None:
        super().__init__()
        numbers = [at for at, f in enumerate(schema.features) if not f.categories]
        words = [(at, code) for at, f in enumerate(schema.features) for code in range(len(f.categories))]
        marks = [at for at, mark in enumerate(schema.marked) if mark]
        self.register_buffer("mean", torch.tensor([schema.mean[at] for at in numbers], dtype=torch.float64))
        self.register_buffer("scale", torch.tensor([schema.scale[at] for at in numbers], dtype=torch.float64))
        self.register_buffer("numbers", torch.tensor(numbers, dtype=torch.int64))
        self.register_buffer("words", torch.tensor([at for at, _ in words], dtype=torch.int64))
        self.register_buffer("codes", torch.tensor([code for _, code in words], dtype=torch.float64))
        self.register_buffer("marks", torch.tensor(marks, dtype=torch.int64))
        self._has = bool(numbers), bool(words), bool(marks)
        self._target = None if schema.classes else (schema.target_mean, schema.target_scale)
        self.model = model

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        """Return predictions for rows in their own units."""
        raw = raw.double()
        parts = []
        if self._has[0]:
            scaled = (raw.index_select(1, self.numbers) - self.mean) / self.scale
            parts.append(torch.where(torch.isnan(scaled), torch.zeros_like(scaled), scaled).float())
        if self._has[1]:
            parts.append((raw.index_select(1, self.words) == self.codes).float())
        if self._has[2]:
            parts.append(torch.isnan(raw.index_select(1, self.marks)).float())
        output: torch.Tensor = self.model(torch.cat(parts, 1))
        return output if self._target is None else output * self._target[1] + self._target[0]


class InUnit(nn.Module):
    """A model whose output, a number, is brought to the target's own unit."""

    def __init__(self, model: nn.Module, mean: float, scale: float) -> None:
        super().__init__()
        self.model = model
        self._mean, self._scale = mean, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return predictions for a model's inputs."""
        output: torch.Tensor = self.model(x)
        return output * self._scale + self._mean


def deployed(schema: Schema | None, shape: Shape, model: nn.Module) -> nn.Module:
    """Return a model with its schema inside, or the target's unit; itself where there is neither.

    What torch.fx has traced gets torch's own layers.
    """
    if schema is None and not _scaled(shape):
        return model
    wrapped = InUnit(model, shape.target_mean, shape.target_scale) if schema is None else Deployed(schema, model)
    whole = wrapped.eval()
    return fx.symbolic_trace(whole).eval() if isinstance(model, fx.GraphModule) else whole


def _scaled(shape: Shape) -> bool:
    return (shape.target_mean, shape.target_scale) != (0.0, 1.0)


def undone(schema: Schema | None, shape: Shape, rows: Data) -> Data:
    """Return rows of a table, and numbers that rows teach, in their own units again; anything else as it is."""
    if schema is None and not _scaled(shape):
        return rows
    if schema is None:
        y = rows.y * shape.target_scale + shape.target_mean
        return replace(rows, y=y, task=rows.task.in_units(1.0, shape.unit))
    raw = torch.from_numpy(schema.undone(rows.x.numpy()))
    y = rows.y if schema.classes else rows.y * schema.target_scale + schema.target_mean
    return Data(raw, y, rows.kind, rows.scale, rows.task.in_units(1.0, schema.unit))
