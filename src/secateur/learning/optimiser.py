"""Optimisers: the settings of a local training, learning-rate schedules, and the steps of SGD, Adam and AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from secateur.errors import ConfigError, check

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""The constants of Adam and AdamW, as in torch."""


@dataclass(frozen=True)
class Rule:
    """The kind of an optimiser.

    Attributes:
        adaptive: whether steps are divided by a running root mean square of gradients (Adam, arXiv 1412.6980).
        decoupled: whether weight decay shrinks weights directly, not by the gradient (AdamW, arXiv 1711.05101).
    """

    adaptive: bool
    decoupled: bool


RULES: Mapping[str, Rule] = {
    "sgd": Rule(adaptive=False, decoupled=False),
    "adam": Rule(adaptive=True, decoupled=False),
    "adamw": Rule(adaptive=True, decoupled=True),
}


@dataclass(frozen=True)
class Training:
    """The settings of a client's local training.

    The learning rate of round t is eta_t, by ``schedule``:

        constant     lr
        exponential  lr decay^(t - 1)
        step         lr decay^floor((t - 1) / period)
        cosine       floor + (lr - floor) (1 + cos(pi min(t - 1, period) / period)) / 2

    Attributes:
        epochs: E, local epochs in a round.
        batch_size: B.
        optimiser: ``sgd``, ``adam`` or ``adamw``; its state starts anew in each round.
        lr: eta, the learning rate of round 1.
        decay: the factor on the learning rate for each further round (``exponential``) or period (``step``).
        momentum: the momentum of SGD.
        weight_decay: the L2 coefficient; with ``adamw`` weights shrink by it times the learning rate.
        prox: mu of FedProx, the weight of (mu/2) |w - w_server|^2 (arXiv 1812.06127); 0 is plain FedAvg.
        clip: the largest L2 norm of a step's gradient; 0: no clipping.
        schedule: how the learning rate changes over rounds; ``exponential`` with a decay of 1 is constant.
        period: rounds between drops (``step``), or until the rate is ``floor`` (``cosine``; 0: all of the study's).
        floor: the last learning rate of ``cosine``.

    Raises:
        ConfigError: a value is out of range, or the schedule does not use it.

    Reference: cosine: Loshchilov and Hutter (SGDR), arXiv 1608.03983, equation 5 without restarts.
    """

    epochs: int = 5
    batch_size: int = 16
    optimiser: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.1
    decay: float = 1.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    prox: float = 0.0
    clip: float = 0.0
    schedule: Literal["constant", "exponential", "cosine", "step"] = "exponential"
    period: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        check(self.epochs >= 1, name="training.epochs", value=self.epochs, must="be at least 1")
        check(self.batch_size >= 1, name="training.batch_size", value=self.batch_size, must="be at least 1")
        check(self.lr > 0, name="training.lr", value=self.lr, must="be above 0")
        check(0 < self.decay <= 1, name="training.decay", value=self.decay, must="be in (0, 1]")
        for name in ("momentum", "weight_decay", "prox", "clip", "period"):
            value = getattr(self, name)
            check(value >= 0, name=f"training.{name}", value=value, must="be 0 or more")
        check(0 <= self.floor <= self.lr, name="training.floor", value=self.floor, must="be from 0 to training.lr")
        rule = SCHEDULES[self.schedule]
        check(
            bool(self.period) or not rule.needs_period, name="training.period", value=self.period,
            must=f"be at least 1 with training.schedule = {self.schedule}",
        )  # fmt: skip
        usual = {"decay": 1.0, "period": 0, "floor": 0.0}
        unused = [n for n, plain in usual.items() if n not in rule.reads and getattr(self, n) != plain]
        if unused:
            raise ConfigError(
                f"training.{unused[0]} = {getattr(self, unused[0])}: training.schedule = {self.schedule} does not read "
                f"it; leave it out, or choose another schedule"
            )

    def over(self, rounds: int) -> Training:
        """Return these settings for a study of ``rounds`` rounds: the period of ``cosine`` if none was given."""
        spans = SCHEDULES[self.schedule].spans and not self.period
        return replace(self, period=rounds) if spans else self

    def rate(self, round_: int) -> float:
        """Return the learning rate eta_t of round t = ``round_`` >= 1."""
        return SCHEDULES[self.schedule].rate(self, round_ - 1)

    @property
    def rule(self) -> Rule:
        """Return the kind of the optimiser."""
        return RULES[self.optimiser]


@dataclass(frozen=True)
class RateSchedule:
    """A learning-rate schedule.

    Attributes:
        rate: the function from a training and the number of completed rounds to the learning rate.
        reads: the fields of ``Training`` that it reads besides ``lr``.
        needs_period: whether a period must be given.
        spans: whether the period is all rounds if none is given.
    """

    rate: Callable[[Training, int], float]
    reads: frozenset[str] = frozenset()
    needs_period: bool = False
    spans: bool = False


def _constant(training: Training, over: int) -> float:
    del over
    return training.lr


def _exponential(training: Training, over: int) -> float:
    return training.lr * training.decay**over


def _step(training: Training, over: int) -> float:
    return training.lr * training.decay ** (over // training.period)


def _cosine(training: Training, over: int) -> float:
    if not training.period:
        raise ConfigError("training.period = 0: a cosine outside of a study must be told over how many rounds it goes")
    part = min(over, training.period) / training.period
    return training.floor + (training.lr - training.floor) * (1 + math.cos(math.pi * part)) / 2


SCHEDULES: Mapping[str, RateSchedule] = {
    "constant": RateSchedule(_constant),
    "exponential": RateSchedule(_exponential, frozenset({"decay"})),
    "cosine": RateSchedule(_cosine, frozenset({"period", "floor"}), spans=True),
    "step": RateSchedule(_step, frozenset({"decay", "period"}), needs_period=True),
}


class Optimiser:
    """The steps of torch's SGD, Adam and AdamW, bit for bit, followed by the mask.

    Args:
        parameters: the tensors to train.
        training: the settings.
        round_: t, which sets the learning rate.
        kept: the mask, as a factor, of each parameter with pruned entries; these are 0 already and stay 0.

    Torch's Optimizer classes are not used: the first one made in a process imports the compiler, which takes as long as
    importing torch, and on a real federation a process may live for one message.
    """

    def __init__(
        self,
        parameters: Iterable[torch.Tensor],
        training: Training,
        round_: int,
        kept: Mapping[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self._training = training
        self._kept = kept or {}
        self._rate = training.rate(round_)
        self._parameters: list[torch.Tensor] = [p for p in parameters if p.requires_grad]
        self._momenta: dict[torch.Tensor, torch.Tensor | None] = {}
        self._moments: dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def clear(self) -> None:
        """Drop the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def step(self) -> None:
        """Take one step of each parameter that has a gradient."""
        moved = [p for p in self._parameters if p.grad is not None]
        gradients = [p.grad for p in moved if p.grad is not None]
        with torch.no_grad():
            if self._training.rule.adaptive:
                self._adam(moved, gradients)
            elif self._kept and not self._training.momentum and not self._training.weight_decay:
                self._within(moved, gradients)
                return
            else:
                self._sgd(moved, gradients)
            for parameter in moved:
                if parameter in self._kept:
                    parameter.mul_(self._kept[parameter])  # several times faster than a fill

    def _within(self, moved: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        """Take a step of plain SGD under the masks, in one pass over memory; a step and then a product take two."""
        for parameter, gradient in zip(moved, gradients, strict=True):
            if parameter in self._kept:
                parameter.addcmul_(gradient, self._kept[parameter], value=-self._rate)
            else:
                parameter.add_(gradient, alpha=-self._rate)

    def _sgd(self, moved: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        momenta = [self._momenta.get(p) for p in moved]
        sgd(
            moved, gradients, momenta,
            foreach=True, weight_decay=self._training.weight_decay, momentum=self._training.momentum,
            lr=self._rate, dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip
        self._momenta |= dict(zip(moved, momenta, strict=True))

    def _adam(self, moved: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        for p in moved:
            if p not in self._moments:
                self._moments[p] = torch.zeros_like(p), torch.zeros_like(p), torch.tensor(0.0)
        if not moved:  # nothing to take apart
            return
        first, second, steps = (list(part) for part in zip(*(self._moments[p] for p in moved), strict=True))
        adam(
            moved, gradients, first, second, [], steps,
            foreach=True, decoupled_weight_decay=self._training.rule.decoupled, amsgrad=False,
            beta1=BETAS[0], beta2=BETAS[1], lr=self._rate, weight_decay=self._training.weight_decay, eps=EPSILON,
            maximize=False,
        )  # fmt: skip
