"""HeteroFL: clients of different strength train nested widths of one model.

    widths   client k has width 2^-(k mod L) and holds the leading ceil(2^-(k mod L) u) of each hidden layer's u units
    merge    each weight is the mean over those clients that held it, by rows; one that nobody held stays

Paper symbol -> option: number of computation complexity levels L: levels.

Reference: Diao et al., "HeteroFL", arXiv 2010.01264.
*Read*: the published code (diaoenmao/HeteroFL-..., src/fed.py), and Flower's reproduction of it.
Departures: holders count by rows, there alike; no scaler (activations divided by the width), no static batch norm, no
masked loss for labels that a client lacks; strength follows from the client's number; layers without removable units
stay whole.
Not reproduced: 87.5 % with five widths (CIFAR-10, PreResNet-18) is claimed; we did not run that setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from secateur.contract.state import Setting, State
from secateur.errors import check
from secateur.methods.kit.submodels import Sliced
from secateur.pruning.mask import Mask


@dataclass(frozen=True)
class HeteroFL(Sliced):
    """Trains nested widths of one model.

    Attributes:
        levels: L, the number of widths 1, 1/2, 1/4, ...; 1 is FedAvg.
    """

    levels: int = 3

    def __post_init__(self) -> None:
        check(1 <= self.levels <= 16, name="levels", value=self.levels, must="be 1 to 16")

    def units_by_client(self, setting: Setting, round_: int) -> Mapping[int, Mapping[str, torch.Tensor]]:
        """Return the leading units of each layer, by each client's width."""
        return {k: self.leading(setting, 2.0 ** -(k % self.levels)) for k in setting.cohort(round_)}

    def widths(self, state: State) -> Mapping[str, Mask]:
        """Return the mask of each width except the full one."""
        setting, levels = state.setting, range(1, self.levels)
        return {f"1/{2**level}": self.mask(setting, self.leading(setting, 2.0**-level)) for level in levels}
