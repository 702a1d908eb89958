"""Robust rules: what they share. Each has a file of its own, and says what a cohort's updates become.

A rule sees the updates of single clients (``updates.Updates``), over those who hold a coordinate alone, and counts each
client once: how many rows a client has is its own claim. What it makes of them moves the server as the mean would, by
the server's step in its slot ``then``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch

from secateur.aggregation import Aggregator, Holding, Pruned
from secateur.aggregation.steps import Mean
from secateur.aggregation.updates import FEWEST, Single, Updates
from secateur.contract.reduction import Reduction
from secateur.contract.state import Memory, Setting, State
from secateur.contract.suspects import Sifted
from secateur.contract.weighted import Accumulator
from secateur.errors import ConfigError, check
from secateur.pruning.mask import Mask, Tensors, apply
from secateur.wire.message import Expected

Weights = Literal["equal", "rows"]
Combined = tuple[Mapping[str, torch.Tensor], torch.Tensor | None, Mapping[int, str]]
"""What a rule makes of a cohort: the update by name, who was kept (None: all), and why each suspect was not."""

SERVE: Mapping[Holding, str] = {
    "own": "median, trimmed, multikrum, clip, centered_clip or mask_filter",
    "slices": "median, trimmed, multikrum, clip or centered_clip",
    "shared": "median, trimmed, multikrum, clip or centered_clip",
}
"""Rules that serve clients that hold the model in each way."""

_HOLD: Mapping[Holding, str] = {
    "shared": "all clients hold one mask",
    "own": "clients answer under masks of their own",
    "slices": "clients are sent different parts of the model",
}
_CAP = 0.9


@dataclass(frozen=True)
class Robust(Aggregator):
    """Base of robust rules, which write ``combine``; frozen dataclasses.

    Attributes:
        serves: how clients may hold the model for the rule to make sense.
        compares: whether it compares updates entry by entry, so that all of an update must come.
        then: the server's step from the combined update, as it is from the mean: ``mean`` adds it to the weights. A
            study that chooses a rule keeps the step that its method has, unless it says otherwise.
    """

    serves: ClassVar[frozenset[Holding]] = frozenset({"shared", "own", "slices"})
    compares: ClassVar[bool] = True

    then: Aggregator = field(default_factory=Mean)

    def __post_init__(self) -> None:
        if isinstance(self.then, Robust):
            raise ConfigError(
                f"aggregator.then = {self.then.name}: a rule is followed by a server's step: mean, "
                "server_momentum, fed_adam, fed_yogi or fed_adagrad"
            )

    def in_place_of(self, before: Aggregator) -> Aggregator:
        """Return the rule followed by the server's step that the method has: a rule replaces its mean alone."""
        return replace(self, then=before.then if isinstance(before, Robust) else before)

    @abstractmethod
    def combine(self, updates: Updates, state: State) -> Combined:
        """Return what the updates of at least ``needs`` clients become; ``state`` is the server's."""

    def needs(self, clients: int) -> int:
        """Return how many of so many clients' replies the rule needs at least."""
        del clients
        return FEWEST

    @property
    def name(self) -> str:
        """Return the rule's name: that of the file in which it stands."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def pruned(self) -> Pruned:
        """Return what the server's step does with its value of a pruned weight."""
        return self.then.pruned

    def reduction(self, *, masked: bool) -> Reduction:
        """Return the reduction to what the rule makes of single replies."""
        del masked
        return Judged(rule=self)

    @property
    def fewest(self) -> int:
        """Return how many clients must hold a coordinate for it to move."""
        return FEWEST

    def over_holders(self) -> Reduction:
        """Return the same reduction, which is over holders in any case."""
        return self.reduction(masked=True)

    def check(self, setting: Setting, holding: Holding, method: str) -> None:
        """Refuse a federation that the rule cannot serve.

        Raises:
            ConfigError: clients hold the model in a way that makes the rule meaningless, or a round's cohort is too
                small for it.
        """
        if holding not in self.serves:
            raise ConfigError(
                f"aggregator {self.name} does not go with {method}, where {_HOLD[holding]}: {self.why(holding)}; "
                f"{SERVE[holding]} would go"
            )
        count = len(setting.cohort(1))
        if count < self.needs(count):
            raise ConfigError(self.lacking(count))

    def lacking(self, clients: int) -> str:
        """Return what is said where a round asks fewer clients than the rule needs."""
        fewer = ", or assume fewer of them to be hostile (aggregator.hostile)" if hasattr(self, "hostile") else ""
        return (
            f"aggregator {self.name} needs {self.needs(clients)} replies, and a round asks {clients} clients: raise "
            f"participation or data.clients{fewer}"
        )

    def why(self, holding: Holding) -> str:
        """Return why the rule does not serve clients that hold the model in this way."""
        del holding
        return "it compares whole updates"

    def step(
        self, weights: Tensors, mean: Tensors, *, mask: Mask | None, memory: Memory
    ) -> tuple[dict[str, torch.Tensor], Memory]:
        """Return the next weights and memory, from the combined update instead of a mean."""
        sent = apply(weights, mask)
        return self.then.step(weights, {n: sent[n] + move for n, move in mean.items()}, mask=mask, memory=memory)


@dataclass(frozen=True)
class Judged(Single):
    """What a robust rule makes of single replies: updates by name (of running statistics: values); see ``Robust``.

    Attributes:
        rule: the rule.
    """

    rule: Robust = field(kw_only=True)

    @property
    def whole(self) -> bool:
        """Return whether all of an update must come for the rule."""
        return self.rule.compares

    def needs(self, replies: int) -> int:
        """Return how many of so many replies the rule needs at least."""
        return self.rule.needs(replies)

    def check(self, expects: Expected, clients: Sequence[int]) -> None:
        """Refuse an ask to fewer clients than the rule needs."""
        super().check(expects, clients)
        if len(clients) < self.rule.needs(len(clients)):
            raise ConfigError(self.rule.lacking(len(clients)))

    def finish(self, accumulator: Accumulator, state: State) -> Sifted:  # type: ignore[override]
        """Return what the rule makes of the updates; nothing of too few."""
        updates = self.updates(accumulator, state)
        if len(updates.clients) < self.rule.needs(len(updates.clients)):
            return Sifted({})
        move, keep, why = self.rule.combine(updates, state)
        found = {**move, **updates.settled(keep)}
        suspects = {client: f"{self.rule.name}: {reason}" for client, reason in why.items()}
        return Sifted({name: found[name] for name in state.weights if name in found}, suspects)


def hostile_of(share: float, clients: int) -> int:
    """Return f, how many of some clients a share of them is, rounded up.

    >>> hostile_of(0.2, 20), hostile_of(0.3, 10), hostile_of(0.2, 7)
    (4, 3, 2)
    """
    return math.ceil(share * clients - 1e-9)


def check_hostile(share: float) -> None:
    """Refuse a share of hostile clients against which nothing can be robust.

    Raises:
        ConfigError: it is below 0, or a half or more.
    """
    check(0 <= share < 0.5, name="aggregator.hostile", value=share, must="be in [0, 0.5)")


def client_weights(updates: Updates, weights: Weights) -> torch.Tensor:
    """Return the weight of each client: 1, or its rows, of which the cohort's 90th percentile counts at most."""
    if weights == "equal":
        return torch.ones_like(updates.rows)
    return updates.rows.clamp(max=float(updates.rows.quantile(_CAP)))


def stand_out(updates: Updates, keep: torch.Tensor, why: str, values: torch.Tensor) -> dict[int, str]:
    """Return the reason for each client that is not kept: its value beside the cohort's median.

    Args:
        updates: the cohort's.
        keep: who is kept, shape (clients,).
        why: what the values are.
        values: one for each client.
    """
    usual = float(values.quantile(0.5))
    return {
        client: f"its {why} is {float(value):.4g}, the cohort's median {usual:.4g}"
        for client, value, kept in zip(updates.clients, values, keep.tolist(), strict=True)
        if not kept
    }


def without_highest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return flags of all but the ``count`` highest values; of equal ones the last are higher."""
    keep = torch.ones(len(values), dtype=torch.bool)
    keep[values.argsort(stable=True)[len(values) - count :]] = False
    return keep


def chosen(updates: Updates, keep: torch.Tensor, weights: Weights) -> dict[str, torch.Tensor]:
    """Return the mean update of the clients that are kept."""
    shares = client_weights(updates, weights) * keep
    return updates.weighed(shares, shares)
