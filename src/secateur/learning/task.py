"""Tasks: the loss, the targets and the scores of what is learnt, and a client's rows of data."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from secateur.errors import ConfigError, SecateurError, unknown
from secateur.learning import metrics
from secateur.learning.metrics import Metric


class Task(ABC):
    """Base of tasks: what is learnt from rows. Your own is named ``module:Class``, a class that takes no arguments.

    Attributes:
        dtype: the dtype of targets, as they are stored and as the loss takes them.
    """

    dtype: torch.dtype = torch.int64

    @property
    def classes(self) -> bool:
        """Return whether targets are classes; False: numbers."""
        return not self.dtype.is_floating_point

    def in_units(self, target_scale: float, unit: str = "") -> Task:
        """Return the task with scores in the targets' own unit, where stored targets are divided by ``target_scale``.

        Tasks whose scores have no unit return themselves.

        Args:
            target_scale: what errors are multiplied by.
            unit: its name, such as ``years``; empty: unknown.
        """
        del target_scale, unit
        return self

    @property
    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """Return the scores of an evaluation; runs are compared by the first."""

    @abstractmethod
    def losses(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loss of each row, shape (rows,)."""

    @abstractmethod
    def scores(self, outputs: torch.Tensor, targets: torch.Tensor) -> Mapping[str, float]:
        """Return the value of each of ``metrics`` by its name, over all rows of an evaluation; NaN if undefined.

        Args:
            outputs: the model's outputs, shape (rows, outputs); at least one row.
            targets: as ``targets`` returned them.
        """

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a batch."""
        return self.losses(output, target).mean()

    def targets(self, stored: torch.Tensor) -> torch.Tensor:
        """Return stored targets as the loss takes them."""
        return stored.to(self.dtype)

    def agreed(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Return for each row whether two models' outputs are the same prediction; True if the task cannot tell."""
        return torch.ones(len(one), dtype=torch.bool) if one.shape == other.shape else torch.zeros(len(one)).bool()


class Classification(Task):
    """Classification into one of several classes, by cross-entropy; the next token of a fixed window is a class too."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Return accuracy, AUROC and the expected calibration error."""
        return metrics.ACCURACY, metrics.AUROC, metrics.ECE

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of a batch."""
        return nn.functional.cross_entropy(output, target)

    def losses(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of each row."""
        return nn.functional.cross_entropy(output, target, reduction="none")

    def scores(self, outputs: torch.Tensor, targets: torch.Tensor) -> Mapping[str, float]:
        """Return the scores over all rows."""
        return {
            metrics.ACCURACY.name: metrics.accuracy(outputs, targets),
            metrics.AUROC.name: metrics.auroc(outputs, targets),
            metrics.ECE.name: metrics.calibration_error(outputs, targets),
        }

    def agreed(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Return for each row whether both models choose the same class."""
        return one.argmax(1) == other.argmax(1)


@dataclass(frozen=True)
class Regression(Task):
    """Regression of one value, by squared error.

    Attributes:
        target_scale: what errors are multiplied by in scores, to be in the target's own unit; losses are not.
        unit: its name; empty: unknown.
    """

    dtype = torch.float32

    target_scale: float = 1.0
    unit: str = ""

    def in_units(self, target_scale: float, unit: str = "") -> Task:
        """Return the task with errors multiplied by ``target_scale``, and named with the unit."""
        return Regression(target_scale, unit)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Return the mean absolute error and R²."""
        return metrics.in_unit(metrics.MAE, self.unit), metrics.R2

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error of a batch."""
        return nn.functional.mse_loss(output.squeeze(-1), target)

    def losses(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the squared error of each row."""
        return (output.squeeze(-1) - target).square()

    def scores(self, outputs: torch.Tensor, targets: torch.Tensor) -> Mapping[str, float]:
        """Return the scores over all rows."""
        values = outputs.squeeze(-1)
        return {
            metrics.MAE.name: metrics.absolute_error(values, targets) * self.target_scale,
            metrics.R2.name: metrics.determination(values, targets),
        }


TASKS: Mapping[str, type[Task]] = {"classification": Classification, "regression": Regression}
"""The tasks of this package, by the name that data sources use."""


def find(name: str) -> Task:
    """Return a task of this package by its name, or any other by ``module:Class``.

    Raises:
        ConfigError: there is no such task, or the class is no ``Task`` or cannot be made without arguments.
    """
    if name in TASKS:
        return TASKS[name]()
    module, colon, attribute = name.partition(":")
    if not colon:
        raise unknown("task", name, TASKS)
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except SecateurError:
        raise
    except Exception as broken:  # importing and making run anyone's code
        line = " ".join(str(broken).split())
        raise ConfigError(f"task {name!r}: {type(broken).__name__}: {line}; give it as module:Class") from broken
    if not isinstance(made, Task):
        raise ConfigError(f"task {name!r} must be a class derived from secateur.learning.task.Task")
    return made


@dataclass(frozen=True)
class Data:
    """A client's rows as they are stored, and how a batch of them becomes the model's input.

    Attributes:
        x: rows, shape (n, ...); uint8 images or tokens, or float32 features.
        y: targets, shape (n,): class indices, or float32 values for regression.
        kind: ``image`` rows are divided by ``scale``; ``tokens`` become int64; ``tabular`` rows stay as they are.
        scale: the divisor of image values; see ``kind``.
        task: what is learnt from the rows.
        dtype: the dtype of floating-point inputs and targets in a batch; None: as they are.
    """

    x: torch.Tensor
    y: torch.Tensor
    kind: str = "image"
    scale: float = 255.0
    task: Task = field(default_factory=Classification)
    dtype: torch.dtype | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.y)

    def batch(self, index: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the model inputs and the targets of the rows with these indices."""
        x, y = _rows(self.x, index), _rows(self.y, index)
        if self.kind == "tokens":
            x = x.long()
        elif self.kind == "image":
            x = x / self.scale
            x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        y = self.task.targets(y)
        if self.dtype is None:
            return x, y
        return _as(x, self.dtype), _as(y, self.dtype)


def _rows(tensor: torch.Tensor, index: torch.Tensor | slice) -> torch.Tensor:
    if isinstance(index, torch.Tensor) and index.device != tensor.device:
        index = index.to(tensor.device)
    if isinstance(index, torch.Tensor) and index.dim() == 1:
        return tensor.index_select(0, index)  # copies whole rows, where indexing goes entry by entry
    return tensor[index]


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
