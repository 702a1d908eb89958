"""Scores of weights, as pure functions, and the settings of the statistics behind some.

What scores low is pruned first. The criteria themselves, which speak with clients, are ``methods.kit.criteria``.
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
"""A statistic of each weight that is measured by gradients; see ``secateur.learning.gradients``."""

Scope = Literal["tensor", "global"]


@dataclass(frozen=True)
class Exploration:
    """Loss exploration: explorers train from a common start and report squared deviations D_k.

    D_k = (theta_start - theta_k)^2 for every trainable scalar; uploaded once, before round 1.

    Attributes:
        epochs: E_x, the most epochs an explorer trains.
        patience: P, epochs without a better epoch-mean training loss after which it stops.
        fraction: share of all clients that explore (``perc``); at least one.
        data: share of an explorer's training rows that it uses.
        start: ``common`` (each from its own copy of theta_0) or ``sequential`` (each from where the one
            before stopped, as the published code does by accident).
        base: what deviations are measured from: ``initial`` weights or ``epoch`` (the mean of all explorers
            after one common epoch).
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
    """Which gradients are measured, at the current model before each pruning; see ``secateur.learning.gradients``.

    Attributes:
        batches: over how many a client takes the mean.
        clients: whom to ask: the ``cohort`` of the next round, or ``all``.
    """

    batches: int = 1
    clients: Literal["cohort", "all"] = "cohort"

    def __post_init__(self) -> None:
        check(self.batches >= 1, name="measure.batches", value=self.batches, must="be at least 1")


def magnitudes(weights: Tensors) -> dict[str, torch.Tensor]:
    """Return |w|."""
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
        deviations: D_k of each explorer.
        before: each D_k is scaled before the mean; else the mean is.
        scope: of minimum and maximum.
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
    """Scale to [0, 1] over each tensor, or over all; 1 where minimum equals maximum.

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
