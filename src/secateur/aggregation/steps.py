"""Aggregation: a stream of client models -> the next server model, in a fixed order and O(model) memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from secateur.errors import check
from secateur.pruning.mask import Mask, Tensors, apply

Memory = Mapping[str, Tensors]
Pruned = Literal["zero", "shadow", "decay"]


class WeightedMean:
    """Running sum_k n_k w_k / sum_k n_k, summed in float64 in the order of ``add``.

    With ``coverage`` each coordinate is divided by the weight of those clients that kept it (FedSparsify's
    normalised masked average, FedAvgNNZ): 0 where nobody did.
    """

    def __init__(self, *, coverage: bool = False) -> None:
        self.coverage = coverage
        self.total = 0.0
        self._sums: dict[str, torch.Tensor] = {}
        self._covered: dict[str, torch.Tensor] = {}

    def add(self, tensors: Tensors, weight: float, mask: Mask | None = None) -> None:
        """Add one client's tensors with its weight n_k."""
        self.total += weight
        for name, tensor in tensors.items():
            part = tensor.to(torch.float64, copy=True).mul_(weight)
            self._sums[name] = self._sums[name].add_(part) if name in self._sums else part
            if self.coverage:
                held = mask[name] if mask is not None and name in mask else torch.ones_like(tensor, dtype=torch.bool)
                gain = held.double() * weight
                self._covered[name] = self._covered[name].add_(gain) if name in self._covered else gain

    def mean(self) -> dict[str, torch.Tensor]:
        """Return the mean in float32; empty when nothing of any weight was added."""
        if not self.total:
            return {}
        if self.coverage:
            return {
                name: torch.where(c > 0, self._sums[name] / c.clamp(min=1e-300), 0.0).float()
                for name, c in self._covered.items()
            }
        return {name: (s / self.total).float() for name, s in self._sums.items()}


class Aggregator(Protocol):
    """What an aggregator offers; ``coverage`` selects the divisor of the mean (see ``WeightedMean``)."""

    @property
    def coverage(self) -> bool:
        """Whether each coordinate counts only the clients that kept it."""

    @property
    def pruned(self) -> Pruned:
        """What happens to the server's own value of a pruned weight."""

    def step(
        self, weights: Tensors, mean: Tensors, *, mask: Mask | None, memory: Memory
    ) -> tuple[dict[str, torch.Tensor], Memory]:
        """Return the next weights and the next memory from this round's mean."""


@dataclass(frozen=True)
class Mean:
    """FedAvg: W <- sum_k (n_k / sum n) w_k.

    Attributes:
        coverage: divide each coordinate by the clients that kept it.
        pruned: ``zero`` gives up a pruned weight; ``shadow`` keeps the server's last value of it.

    Reference: FedAvg, arXiv 1602.05629; FedSparsify, arXiv 2204.12430.
    """

    coverage: bool = False
    pruned: Literal["zero", "shadow"] = "zero"

    def step(
        self, weights: Tensors, mean: Tensors, *, mask: Mask | None, memory: Memory
    ) -> tuple[dict[str, torch.Tensor], Memory]:
        """Return the mean; with ``shadow`` the old value where the mask prunes."""
        if self.pruned == "zero" or mask is None:
            return dict(mean), memory
        return {n: torch.where(mask[n], m, weights[n]) if n in mask else m for n, m in mean.items()}, memory


@dataclass(frozen=True)
class ServerMomentum:
    """FedAvg with server momentum: v <- beta v + (1 - beta) Delta, W <- W - v, Delta = W - mean_k w_k.

    The factor (1 - beta) is explicit and there is no server learning rate in the step, as in AutoFLIP's
    published code: with beta = 0.9 round 1 moves a tenth of Delta.

    Attributes:
        beta: momentum.
        pruned: ``shadow`` keeps W dense on the server, Delta = 0 where the mask prunes; ``zero`` sets W to 0
            there; ``decay`` takes the client's zero for an upload, Delta = W, a soft decay.
        coverage: divide each coordinate by the clients that kept it.

    Reference: AutoFLIP, arXiv 2405.10271, its published code; the treatment of pruned weights is an open
    point of the paper.
    """

    beta: float = 0.9
    pruned: Pruned = "shadow"
    coverage: bool = False

    def __post_init__(self) -> None:
        check(0 <= self.beta < 1, name="aggregator.beta", value=self.beta, must="be in [0, 1)")

    def step(
        self, weights: Tensors, mean: Tensors, *, mask: Mask | None, memory: Memory
    ) -> tuple[dict[str, torch.Tensor], Memory]:
        """Return W - v and v under the key ``velocity``."""
        delta = {name: weights[name] - m for name, m in mean.items()}
        if self.pruned == "shadow":
            delta = apply(delta, mask)
        old = memory.get("velocity", {})
        velocity = {
            name: self.beta * old[name] + (1 - self.beta) * d if name in old else (1 - self.beta) * d
            for name, d in delta.items()
        }
        stepped: Tensors = {name: weights[name] - v for name, v in velocity.items()}
        if self.pruned == "zero":
            stepped = apply(stepped, mask)
        return dict(stepped), {**memory, "velocity": velocity}


@dataclass(frozen=True)
class _Adaptive(ABC):
    """An adaptive server step: W <- W + eta m / (sqrt(v) + tau), with Delta = mean_k w_k - W, entry by entry.

    m <- beta1 m + (1 - beta1) Delta, from 0; v by each rule, from tau^2. Neither is corrected for its start. Both are
    kept in the memory, under the keys ``first`` and ``second``.

    Attributes:
        lr: eta, how far a round moves a weight whose Delta keeps its sign; the paper tunes it for each task, and this
            default is ours.
        beta1: of the mean of Delta.
        tau: keeps the divisor from 0; the larger, the less adaptive.
        pruned, coverage: as of ``ServerMomentum``.
    """

    lr: float = 0.1
    beta1: float = 0.9
    tau: float = 1e-3
    pruned: Pruned = "shadow"
    coverage: bool = False

    def __post_init__(self) -> None:
        check(self.lr > 0, name="aggregator.lr", value=self.lr, must="be above 0")
        check(self.tau > 0, name="aggregator.tau", value=self.tau, must="be above 0")
        check(0 <= self.beta1 < 1, name="aggregator.beta1", value=self.beta1, must="be in [0, 1)")

    @abstractmethod
    def second(self, before: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Return the next v from the last one and Delta."""

    def step(
        self, weights: Tensors, mean: Tensors, *, mask: Mask | None, memory: Memory
    ) -> tuple[dict[str, torch.Tensor], Memory]:
        """Return the next weights, and m and v."""
        delta: Tensors = {name: m - weights[name] for name, m in mean.items()}
        if self.pruned == "shadow":
            delta = apply(delta, mask)
        old, spread = memory.get("first", {}), memory.get("second", {})
        first, second = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        for name, d in delta.items():
            first[name] = self.beta1 * old.get(name, torch.zeros_like(d)) + (1 - self.beta1) * d
            second[name] = self.second(spread.get(name, torch.full_like(d, self.tau**2)), d)
        stepped: Tensors = {
            name: weights[name] + self.lr * m / (second[name].sqrt() + self.tau) for name, m in first.items()
        }
        if self.pruned == "zero":
            stepped = apply(stepped, mask)
        return dict(stepped), {**memory, "first": first, "second": second}


@dataclass(frozen=True)
class FedAdam(_Adaptive):
    """Adam on the server: v <- beta2 v + (1 - beta2) Delta^2.

    Attributes:
        lr, beta1, tau, pruned, coverage: see ``_Adaptive``.
        beta2: of v.

    Reference: Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295, algorithm 2.
    """

    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.beta2 < 1, name="aggregator.beta2", value=self.beta2, must="be in [0, 1)")

    def second(self, before: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Return beta2 v + (1 - beta2) Delta^2."""
        return self.beta2 * before + (1 - self.beta2) * delta.square()


@dataclass(frozen=True)
class FedYogi(_Adaptive):
    """Yogi on the server: v <- v - (1 - beta2) Delta^2 sign(v - Delta^2), which falls more slowly than Adam's.

    Attributes:
        lr, beta1, tau, pruned, coverage: see ``_Adaptive``.
        beta2: of v.

    Reference: Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295, algorithm 2.
    """

    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.beta2 < 1, name="aggregator.beta2", value=self.beta2, must="be in [0, 1)")

    def second(self, before: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Return v - (1 - beta2) Delta^2 sign(v - Delta^2)."""
        square = delta.square()
        return before - (1 - self.beta2) * square * torch.sign(before - square)


@dataclass(frozen=True)
class FedAdagrad(_Adaptive):
    """Adagrad on the server: v <- v + Delta^2; without momentum, as in the paper's experiments, beta1 is 0.

    Attributes:
        lr, beta1, tau, pruned, coverage: see ``_Adaptive``.

    Reference: Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295, algorithm 2.
    """

    beta1: float = 0.0

    def second(self, before: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Return v + Delta^2."""
        return before + delta.square()
