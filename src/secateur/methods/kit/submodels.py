"""Sub-models: each client holds a slice of the model, and each weight is averaged over its holders."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from secateur.aggregation import Aggregator, Holding
from secateur.aggregation.steps import Mean as PlainMean
from secateur.contract.ask import REPORT, TRAIN, Ask
from secateur.contract.checks import KeptByTensor
from secateur.contract.client import Client
from secateur.contract.method import Method
from secateur.contract.reducer import Reduced
from secateur.contract.reduction import Mean, masks_of
from secateur.contract.state import Setting, State
from secateur.errors import ConfigError, ModelError
from secateur.methods.kit.rounds import MEAN, merged, train_reply, variances
from secateur.pruning.mask import Mask
from secateur.pruning.structure import slice_of
from secateur.wire.message import Expected, Message


def slice_ask(state: State, round_: int, slices: Mapping[int, Mask]) -> Ask:
    """Return the ask of a training round in which each client holds its own slice of the model.

    Each weight becomes the mean by rows over the clients that hold it; a weight that no client holds does not change.
    """
    expects = Expected(state.setting.specs, mask="same", scalars=REPORT, checks=variances(state.setting))
    message, reduce = Message(dict(state.weights), None), {MEAN: Mean(holders=masks_of, fallback="state")}
    return Ask(TRAIN, round_, state.setting.cohort(round_), message, expects, reduce, slices)


def own_masks(ask: Ask, names: frozenset[str], *, within: bool = False, same: bool = False) -> Expected:
    """Return what replies to an ask look like if clients send masks of their own.

    Args:
        ask: the ask.
        names: of the tensors with a mask.
        within: whether a mask keeps nothing that the one which was sent prunes.
        same: whether it keeps as many entries of each tensor as the one that was sent.
    """
    checks = (*ask.expects.checks, *([KeptByTensor()] if same else []))
    return replace(ask.expects, mask="required", maskable=names, within=within, checks=checks)


def check_merge(aggregator: Aggregator, setting: Setting, holding: Holding, method: str) -> None:
    """Refuse a rule that cannot merge what clients hold in this way.

    Raises:
        ConfigError: the text names the rule and the method, and says what would go.
    """
    aggregator.check(setting, holding, method)
    if aggregator.refines:
        name = type(aggregator).__name__
        raise ConfigError(f"aggregator {name} trains at the server before each round, and {method} does not: take clip")


class Narrowed(Method):
    """Base of methods that train models with fewer units."""

    def check(self, setting: Setting) -> None:
        """Refuse a model without removable units.

        Raises:
            ModelError: no layer can be narrower; the text says why.
        """
        if not setting.layout.layers:
            why = "; ".join(f"{name}: {reason}" for name, reason in setting.layout.whole.items())
            raise ModelError(f"no layer of this model can be narrower ({why or 'model.structure = none'})")

    def remarks(self, setting: Setting) -> list[str]:
        """Return a line that says which layers stay whole in every slice, if some do."""
        return setting.layout.stays()

    @staticmethod
    def leading(setting: Setting, width: float) -> dict[str, torch.Tensor]:
        """Return flags of the leading ceil(width u) of each layer's u units, whatever the last bits of the product."""
        return {g.name: torch.arange(g.units) < math.ceil(width * g.units - 1e-9) for g in setting.layout.layers}

    def mask(self, setting: Setting, keep: Mapping[str, torch.Tensor]) -> Mask:
        """Return the mask of the flagged units; ``keep`` has flags by the name of a group, other groups stay whole."""
        return slice_of(setting.layout.groups, {name: spec.shape for name, spec in setting.specs.items()}, keep)


class Parts(Narrowed):
    """Base of methods whose clients train narrower models, which are averaged; a method says who holds which units."""

    @abstractmethod
    def units_by_client(self, setting: Setting, round_: int) -> Mapping[int, Mapping[str, torch.Tensor]]:
        """Return for each client of a round's cohort the flags of the units it holds, by group, shape (units,)."""

    def slices(self, setting: Setting, round_: int) -> Mapping[int, Mask]:
        """Return the mask of each client of a round's cohort."""
        return {k: self.mask(setting, keep) for k, keep in self.units_by_client(setting, round_).items()}

    def plan(self, state: State) -> Ask | None:
        """Return the ask that sends each client of the next cohort its slice."""
        round_, setting = state.round + 1, state.setting
        return None if round_ > setting.rounds else slice_ask(state, round_, self.slices(setting, round_))

    def respond(self, ask: Ask, client: Client) -> Message:
        """Train the slice that was sent."""
        return train_reply(ask, client)

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Return the state with each weight averaged over its holders."""
        return merged(state, reduced)


@dataclass(frozen=True)
class Sliced(Parts):
    """Base of methods whose clients' narrower models become one; a method only says who holds which units.

    Attributes:
        aggregator: what becomes of the replies, each weight over those who hold it; by default their mean by rows.
    """

    later: ClassVar[frozenset[str]] = frozenset({"aggregator"})

    aggregator: Aggregator = field(default_factory=PlainMean)

    def check(self, setting: Setting) -> None:
        """Refuse a model without removable units, and a rule that cannot merge slices.

        Raises:
            ModelError: no layer can be narrower; the text says why.
            ConfigError: the rule cannot; the text says why.
        """
        super().check(setting)
        check_merge(self.aggregator, setting, "slices", type(self).__name__)

    def plan(self, state: State) -> Ask | None:
        """Return the ask that sends each client of the next cohort its slice; the aggregator says what follows."""
        ask = super().plan(state)
        return ask and replace(ask, reduce={MEAN: self.aggregator.over_holders()})

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Return the state with each weight merged over its holders."""
        return merged(state, reduced, self.aggregator)
