"""Scores of weights, as pure functions, and the settings of the statistics that some scores need.

The lowest scores are pruned first. The criteria themselves, which ask clients, are in ``methods.kit.criteria``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from secateur.errors import ConfigError, check
from secateur.pruning.mask import Tensors
from secateur.streams import stream

Form = Literal["gradient", "square", "saliency", "curvature", "flow"]
"""The statistics of each weight that gradients give; see ``secateur.learning.gradients``."""

Scope = Literal["tensor", "global"]


@dataclass(frozen=True)
class Exploration:
    """Loss exploration: explorers train from a common start and report squared deviations D_k.

    D_k = (theta_start - theta_k)^2 for every trainable scalar; sent once, before round 1.

    Attributes:
        epochs: E_x, the most epochs that an explorer trains.
        patience: P, the number of epochs without a better epoch-mean training loss after which it stops.
        fraction: the share of all clients that explore (``perc``); at least one explores.
        data: the share of its training rows that an explorer uses.
        start: ``common`` (each explorer from its own copy of theta_0) or ``sequential`` (each from where the one
            before stopped, as the published code does by accident).
        base: the weights from which deviations are measured: the ``initial`` ones, or after one ``epoch`` (the mean
            of all explorers after one common epoch).
        warm_start: start the federation from the mean of the explored weights instead of theta_0.

    Reference: AutoFLIP, arXiv 2405.10271; learning spread of Guided Transfer Learning, arXiv 2303.16154.
    """

    epochs: int = 150
    patience: int = 40
    fraction: float = 1.0
    data: float = 1.0
    start: Literal["common", "sequential"] = "common"
    base: Literal["initial", "epoch"] = "initial"
    warm_start: bool = False

    def __post_init__(self) -> None:
        check(self.epochs >= 1, name="explore.epochs", value=self.epochs, must="be at least 1")
        check(self.patience >= 1, name="explore.patience", value=self.patience, must="be at least 1")
        for name in ("fraction", "data"):
            value = getattr(self, name)
            check(0 < value <= 1, name=f"explore.{name}", value=value, must="be in (0, 1]")
        if self.start == "sequential" and self.base == "epoch":
            raise ConfigError(
                "explore.start = 'sequential' cannot be combined with explore.base = 'epoch': "
                "a chain of explorers has no common epoch; choose one of the two"
            )


@dataclass(frozen=True)
class Gradients:
    """How gradients are measured at the current model before each pruning; see ``secateur.learning.gradients``.

    Attributes:
        batches: the number of batches over which a client takes the mean.
        clients: the clients to ask: the ``cohort`` of the next round, or ``all``.
    """

    batches: int = 1
    clients: Literal["cohort", "all"] = "cohort"

    def __post_init__(self) -> None:
        check(self.batches >= 1, name="measure.batches", value=self.batches, must="be at least 1")


def magnitudes(weights: Tensors) -> dict[str, torch.Tensor]:
    """Return |w| of each weight, by name."""
    return {name: w.abs() for name, w in weights.items()}


def uniform(weights: Tensors, seed: int) -> dict[str, torch.Tensor]:
    """Return uniform numbers in [0, 1), float64, one stream for each tensor name."""
    return {
        name: torch.rand(w.shape, generator=stream(seed, "random criterion", name), dtype=torch.float64)
        for name, w in weights.items()
    }


def guidance(deviations: Iterable[Tensors], *, before: bool, scope: Scope) -> dict[str, torch.Tensor]:
    """Return G of AutoFLIP in float64, the mean of squared deviations scaled to [0, 1]; see ``min_max``.

    Args:
        deviations: D_k of each explorer, by name.
        before: scale each D_k before the mean is taken; False: scale the mean.
        scope: the entries of which minimum and maximum are taken.
    """
    total: dict[str, torch.Tensor] = {}
    count = 0
    for deviation in deviations:
        part = min_max(deviation, scope) if before else deviation
        # float64, so that the order of explorers cannot show in a float32 sum
        total = {n: d.double() + total[n] if count else d.double() for n, d in part.items()}
        count += 1
    mean = {name: tensor / count for name, tensor in total.items()}
    return mean if before else min_max(mean, scope)


def min_max(tensors: Tensors, scope: Scope) -> dict[str, torch.Tensor]:
    """Return tensors scaled to [0, 1], each by itself or all together; 1 if minimum equals maximum.

    >>> min_max({"a": torch.tensor([1.0, 3.0, 2.0]), "b": torch.tensor([5.0])}, "tensor")["b"]
    tensor([1.])
    """
    bounds = {name: (t.min(), t.max()) for name, t in tensors.items() if t.numel()}
    if scope == "global" and bounds:
        low = torch.stack([b[0] for b in bounds.values()]).min()
        high = torch.stack([b[1] for b in bounds.values()]).max()
        bounds = dict.fromkeys(bounds, (low, high))
    scaled = {}
    for name, tensor in tensors.items():
        low, high = bounds.get(name, (torch.zeros(()), torch.zeros(())))
        scaled[name] = torch.ones_like(tensor) if high == low else (tensor - low) / (high - low)
    return scaled
