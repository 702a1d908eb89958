"""Server steps: how the mean of a round's replies changes the server's weights."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch

from secateur.aggregation import Aggregator, Pruned
from secateur.contract.state import Memory
from secateur.errors import check
from secateur.pruning.mask import Mask, Tensors, apply


@dataclass(frozen=True)
class Mean(Aggregator):
    """FedAvg: W <- sum_k (n_k / sum n) w_k.

    Attributes:
        coverage: divide each coordinate by the weight of the clients that kept it.
        pruned: ``zero`` sets a pruned weight to 0; ``shadow`` keeps the server's last value of it.

    Reference: FedAvg, arXiv 1602.05629; FedSparsify, arXiv 2204.12430.
    """

    coverage: bool = False
    pruned: Literal["zero", "shadow"] = "zero"

    def step(
        self, weights: Tensors, mean: Tensors, *, mask: Mask | None, memory: Memory
    ) -> tuple[dict[str, torch.Tensor], Memory]:
        """Return the mean; with ``shadow``, the old value of each pruned weight."""
        if self.pruned == "zero" or mask is None:
            return dict(mean), memory
        return {n: torch.where(mask[n], m, weights[n]) if n in mask else m for n, m in mean.items()}, memory


@dataclass(frozen=True)
class ServerMomentum(Aggregator):
    """FedAvg with server momentum: v <- beta v + (1 - beta) Delta, W <- W - v, Delta = W - mean_k w_k.

    The factor (1 - beta) is explicit and there is no server learning rate in the step, as in AutoFLIP's
    published code: with beta = 0.9 round 1 moves a tenth of Delta.

    Attributes:
        beta: momentum.
        pruned: ``shadow`` keeps W dense on the server, Delta = 0 where the mask prunes; ``zero`` sets W to 0
            there; ``decay`` counts the client's zero as its value, so that Delta = W and the weight decays.
        coverage: divide each coordinate by the weight of the clients that kept it.

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
        """Return W - v, and the memory with v under the key ``velocity``."""
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
class _Adaptive(Aggregator):
    """Base of adaptive server steps: W <- W + eta m / (sqrt(v) + tau), with Delta = mean_k w_k - W, entry by entry.

    m <- beta1 m + (1 - beta1) Delta starts at 0; v starts at tau^2 and follows each class's own rule. There is no bias
    correction. The memory keeps m under the key ``first`` and v under ``second``.

    Attributes:
        lr: eta, about how far a round moves a weight whose Delta keeps its sign; the paper tunes it for each task, and
            this default is ours.
        beta1: the decay rate of m.
        tau: keeps the divisor from 0; the larger it is, the less adaptive the step.
        pruned, coverage: see ``ServerMomentum``.
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
        """Return the next v from the last v and Delta."""

    def step(
        self, weights: Tensors, mean: Tensors, *, mask: Mask | None, memory: Memory
    ) -> tuple[dict[str, torch.Tensor], Memory]:
        """Return the next weights, and the memory with m and v."""
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
class _Decaying(_Adaptive):
    """An adaptive step whose v forgets: beta2 is its decay rate."""

    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.beta2 < 1, name="aggregator.beta2", value=self.beta2, must="be in [0, 1)")


@dataclass(frozen=True)
class FedAdam(_Decaying):
    """Adam on the server: v <- beta2 v + (1 - beta2) Delta^2.

    Attributes:
        lr, beta1, tau, pruned, coverage: see ``_Adaptive``.
        beta2: the decay rate of v.

    Reference: Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295, algorithm 2.
    """

    def second(self, before: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Return beta2 v + (1 - beta2) Delta^2."""
        return self.beta2 * before + (1 - self.beta2) * delta.square()


@dataclass(frozen=True)
class FedYogi(_Decaying):
    """Yogi on the server: v <- v - (1 - beta2) Delta^2 sign(v - Delta^2), which falls more slowly than Adam's.

    Attributes:
        lr, beta1, tau, pruned, coverage: see ``_Adaptive``.
        beta2: the decay rate of v.

    Reference: Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295, algorithm 2.
    """

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
