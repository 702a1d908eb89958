"""FjORD: ordered dropout. At each step a device trains a random one of the nested widths that it can carry.

    widths   p in {1/L, 2/L, ..., 1}; client k carries up to p_max = ((k mod L) + 1)/L
    step     draw p <= p_max, uniformly; the gradient is that of the leading ceil(p u) of each hidden layer's u units,
             and moves only those
    merge    each weight is the mean over those clients that held it, by rows; one that nobody held stays

Paper symbol -> option: number of p values (and of device tiers): levels.

Reference: Horváth et al., "FjORD", arXiv 2102.13451. *Read*: Flower's reproduction of it
(adap/flower, baselines/fjord/fjord/strategy.py and od/).
Departures: no self-distillation from the widest to the narrower; what a device can carry follows from its number;
layers without removable units stay whole. Training is counted at p_max, which is more than what the steps compute.
Not reproduced: 83.9 to 86.2 % for p = 0.2 to 1 (CIFAR-10, ResNet-18, IID) stands in Flower's reproduction; we did not
run that setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from secateur.contract.ask import Ask
from secateur.contract.client import Client, report
from secateur.contract.state import Setting, State
from secateur.errors import check
from secateur.methods.kit.hooks import Narrow
from secateur.methods.kit.submodels import Sliced
from secateur.pruning.mask import Mask
from secateur.wire.message import Message


@dataclass(frozen=True)
class FjORD(Sliced):
    """Trains nested widths, of which each step draws one.

    Attributes:
        levels: L, the number of widths and of kinds of devices; 1 is FedAvg.
    """

    levels: int = 5

    def __post_init__(self) -> None:
        check(1 <= self.levels <= 100, name="levels", value=self.levels, must="be 1 to 100")

    def units_by_client(self, setting: Setting, round_: int) -> Mapping[int, Mapping[str, torch.Tensor]]:
        """Return the units that each client's device can carry."""
        return {k: self.leading(setting, self._most(k) / self.levels) for k in setting.cohort(round_)}

    def respond(self, ask: Ask, client: Client) -> Message:
        """Train the slice that was sent; each step draws a width within it."""
        mask, setting = ask.message.mask, client.setting
        widths = [
            self.mask(setting, self.leading(setting, level / self.levels))
            for level in range(1, self._most(client.id) + 1)
        ]
        hooks = [Narrow(tuple(widths))] if self.levels > 1 else []
        weights, done = client.train(ask.message.tensors, mask, round_=ask.round, hooks=hooks)
        return Message(weights, mask, report(done))

    def widths(self, state: State) -> Mapping[str, Mask]:
        """Return the mask of each width except the full one."""
        setting, levels = state.setting, range(self.levels - 1, 0, -1)
        return {
            f"{level}/{self.levels}": self.mask(setting, self.leading(setting, level / self.levels)) for level in levels
        }

    def _most(self, client: int) -> int:
        return client % self.levels + 1
