"""Sub-models: each client holds a slice of the model, and each weight is averaged over its holders."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping

import torch

from secateur.contract.ask import REPORT, TRAIN, Ask
from secateur.contract.client import Client
from secateur.contract.method import Method
from secateur.contract.reducer import Reduced
from secateur.contract.reduction import Mean, masks_of
from secateur.contract.state import Setting, State
from secateur.errors import ModelError
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


class Sliced(Narrowed):
    """Base of methods whose clients train narrower models; a method only says who holds which units."""

    @abstractmethod
    def units_by_client(self, setting: Setting, round_: int) -> Mapping[int, Mapping[str, torch.Tensor]]:
        """Return for each client of a round's cohort the flags of the units it holds, by group, shape (units,)."""

    def plan(self, state: State) -> Ask | None:
        """Return the ask that sends each client of the next cohort its slice."""
        round_, setting = state.round + 1, state.setting
        if round_ > setting.rounds:
            return None
        held = self.units_by_client(setting, round_)
        return slice_ask(state, round_, {k: self.mask(setting, keep) for k, keep in held.items()})

    def respond(self, ask: Ask, client: Client) -> Message:
        """Train the slice that was sent."""
        return train_reply(ask, client)

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Return the state with each weight averaged over its holders."""
        return merged(state, reduced)
