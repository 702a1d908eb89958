"""Criteria: tensors -> scores of the same shapes; what scores low is pruned first.

A criterion that needs more than the weights names the client statistic it needs (``statistic``), so that the
round can ask for it. Each docstring says where the non-linear step stands, before or after the mean over
clients: |mean g| and mean |g| are different criteria.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from secateur.errors import ConfigError, check
from secateur.pruning.mask import Tensors
from secateur.streams import stream


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
    """Statistics of gradients, measured at the current model before each pruning; see ``secateur.learning.gradients``.

    Attributes:
        batches: over how many a client takes the mean.
        clients: whom to ask: the ``cohort`` of the next round, or ``all``.
    """

    batches: int = 1
    clients: Literal["cohort", "all"] = "cohort"

    def __post_init__(self) -> None:
        check(self.batches >= 1, name="measure.batches", value=self.batches, must="be at least 1")


class Criterion(Protocol):
    """What a criterion offers."""

    @property
    def statistic(self) -> Exploration | Gradients | None:
        """What clients must measure before this criterion can score; None: the weights are enough."""

    def scores(self, weights: Tensors, statistics: Iterable[Tensors], *, seed: int) -> dict[str, torch.Tensor]:
        """Return one score for each entry of ``weights`` (same names and shapes)."""


@dataclass(frozen=True)
class Magnitude:
    """|w| of the merged weights (the absolute value stands after the mean over clients).

    Reference: FedSparsify, arXiv 2204.12430.
    """

    @property
    def statistic(self) -> None:
        """The weights are enough."""
        return

    def scores(self, weights: Tensors, statistics: Iterable[Tensors], *, seed: int) -> dict[str, torch.Tensor]:
        """Return |w|."""
        del statistics, seed
        return {name: w.abs() for name, w in weights.items()}


@dataclass(frozen=True)
class Random:
    """Uniform draws, fixed by the run's seed: the same entries go first in every round and on every client.

    Reference: the random control of FedSparsify, arXiv 2204.12430 (one fixed permutation).
    """

    @property
    def statistic(self) -> None:
        """The seed is enough."""
        return

    def scores(self, weights: Tensors, statistics: Iterable[Tensors], *, seed: int) -> dict[str, torch.Tensor]:
        """Return uniform numbers in [0, 1), one stream for each tensor name."""
        del statistics
        return {
            name: torch.rand(w.shape, generator=stream(seed, "random criterion", name), dtype=torch.float64)
            for name, w in weights.items()
        }


@dataclass(frozen=True)
class Deviation:
    """The guidance G of AutoFLIP: how far explorers moved each weight, scaled to [0, 1].

    d = mean_k D_k,  G = (d - min d) / (max d - min d) for each tensor; G = 1 where max = min, so that a
    constant tensor is never pruned and never NaN.

    Attributes:
        explore: what the explorers do.
        normalise: ``after`` the mean over explorers (the published code), or ``before`` it, client by client
            (FedLEx's figure; one client with huge deviations then counts no more than another).
        scope: minimum and maximum of each ``tensor`` or over the whole model (``global``).

    Reference: AutoFLIP, arXiv 2405.10271, the pruning guidance matrix; reconstructed, the full text was not
    available.
    """

    explore: Exploration = field(default_factory=Exploration)
    normalise: Literal["after", "before"] = "after"
    scope: Literal["tensor", "global"] = "tensor"

    @property
    def statistic(self) -> Exploration:
        """Squared deviations of the explorers."""
        return self.explore

    def scores(self, weights: Tensors, statistics: Iterable[Tensors], *, seed: int) -> dict[str, torch.Tensor]:
        """Return G; names of ``weights`` that the statistics lack (buffers) are left out."""
        del weights, seed
        total: dict[str, torch.Tensor] = {}
        count = 0
        for deviation in statistics:
            part = min_max(deviation, self.scope) if self.normalise == "before" else deviation
            # float64, so that the order of explorers cannot show in a float32 sum
            total = {n: d.double() + total[n] if count else d.double() for n, d in part.items()}
            count += 1
        mean = {name: tensor / count for name, tensor in total.items()}
        return min_max(mean, self.scope) if self.normalise == "after" else mean


Form = Literal["gradient", "square", "saliency", "curvature", "flow"]


@dataclass(frozen=True)
class Measured(ABC):
    """Base of criteria that score each weight by itself and one statistic of it, the mean over clients."""

    measure: Gradients = field(default_factory=Gradients)

    @property
    def statistic(self) -> Gradients:
        """On which rows of which clients."""
        return self.measure

    @property
    @abstractmethod
    def form(self) -> Form:
        """What a client reports; see ``secateur.learning.gradients``."""

    @abstractmethod
    def score(self, w: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Return the scores of one tensor."""

    def scores(self, weights: Tensors, statistics: Iterable[Tensors], *, seed: int) -> dict[str, torch.Tensor]:
        """Return a score for each entry that was measured."""
        del seed
        (mean,) = statistics
        return {name: self.score(weights[name], tensor) for name, tensor in mean.items()}


@dataclass(frozen=True)
class SNIP(Measured):
    """Connection sensitivity: |w g|, how much the loss changes to first order when a weight goes.

    Attributes:
        measure: on which rows of which clients.
        each: the absolute value stands before the mean over clients, mean_k |w g_k|; else after it, |w mean_k g_k|.

    Reference: Lee et al., arXiv 1810.02340; averaged over clients it is SalientGrads, arXiv 2304.07488.
    """

    each: bool = False

    @property
    def form(self) -> Form:
        """Return gradients, or sensitivities where each client takes the absolute value."""
        return "saliency" if self.each else "gradient"

    def score(self, w: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Return |w g|."""
        return mean if self.each else (w * mean).abs()


@dataclass(frozen=True)
class Taylor(Measured):
    """First-order Taylor importance: (w g)^2, g the mean over clients. Of a unit the mean over its weights.

    Reference: Molchanov et al., arXiv 1906.10771.
    """

    @property
    def form(self) -> Form:
        """Return gradients."""
        return "gradient"

    def score(self, w: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Return (w g)^2."""
        return (w * mean).square()


@dataclass(frozen=True)
class Fisher(Measured):
    """The loss to second order by the diagonal of the empirical Fisher matrix: w^2 F / 2, F the mean of g^2.

    g is the mean gradient of a batch; squares are taken batch by batch, before the mean over clients.

    Reference: Theis et al., arXiv 1801.05787; after Optimal Brain Damage, LeCun et al., NeurIPS 1989.
    """

    @property
    def form(self) -> Form:
        """Return squared gradients."""
        return "square"

    def score(self, w: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Return w^2 F / 2."""
        return w.square() * mean / 2


@dataclass(frozen=True)
class Grasp(Measured):
    """GraSP, gradient signal preservation: w (H g), low where a weight's removal hardly hurts the gradient's norm.

    H_k g_k is taken client by client and averaged; the loss has no temperature. Scores may be negative.

    Reference: Wang et al., arXiv 2002.07376, whose score -w (H g) is highest for what goes first.
    """

    @property
    def form(self) -> Form:
        """Return the Hessian's product with the gradient."""
        return "curvature"

    def score(self, w: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Return w (H g)."""
        return w * mean


@dataclass(frozen=True)
class Synflow(Measured):
    """SynFlow, synaptic flow: |w| dR/d|w|, R the sum of outputs for an input of ones through |w|; needs no data.

    The server measures it, once for each pruning event; where clients vote, each measures its own model's. Scores are
    over the largest, so that only their order is told. It is one shot per event; a schedule of many events is the
    iterative form.

    Reference: Tanaka et al., arXiv 2006.05467; *read*: ganguli-lab/Synaptic-Flow (Pruners/pruners.py, prune.py), where
    float64 is commented out: deep networks overflow there.
    """

    @property
    def form(self) -> Form:
        """Return the flow through each weight."""
        return "flow"

    def score(self, w: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Return the flow."""
        del w
        return mean


def min_max(tensors: Tensors, scope: Literal["tensor", "global"]) -> dict[str, torch.Tensor]:
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
