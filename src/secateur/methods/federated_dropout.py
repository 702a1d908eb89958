"""Federated Dropout: each client of a round trains a random narrower model, drawn anew in each round.

    slice   a client's model lacks floor(r u) random units of each hidden layer's u units
    merge   each weight is the mean over those clients that held it, by rows; one that nobody held stays

Paper symbol -> option: federated dropout rate: rate.

Reference: Caldas et al., "Expanding the Reach of Federated Learning by Reducing Client Resource Requirements",
arXiv 1812.07210. Known from its abstract and from what others write of it: a *reconstruction*; the authors' code was
*not read*.
Departures: activations are not scaled up for what is missing; layers without removable units stay whole; the paper's
lossy compression is a setting of the wire here (wire.values). A weight is averaged over its holders.
Not reproduced: 14 times less traffic down and 28 times up are claimed, with quantisation; we did not run that setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from secateur.contract.state import Setting
from secateur.errors import check
from secateur.methods.kit.submodels import Sliced
from secateur.pruning.allocation import pruned_count
from secateur.streams import stream


@dataclass(frozen=True)
class FederatedDropout(Sliced):
    """Trains a random slice of the model for each client and round.

    Attributes:
        rate: r, the share of each hidden layer's units that a client's slice lacks; 0 is FedAvg.
    """

    rate: float = 0.25

    def __post_init__(self) -> None:
        check(0 <= self.rate < 1, name="rate", value=self.rate, must="be in [0, 1)")

    def units_by_client(self, setting: Setting, round_: int) -> Mapping[int, Mapping[str, torch.Tensor]]:
        """Return the units that are drawn for each client."""
        return {client: self._draw(setting, round_, client) for client in setting.cohort(round_)}

    def _draw(self, setting: Setting, round_: int, client: int) -> dict[str, torch.Tensor]:
        draw, keep = stream(setting.seed, "slice", round_, client), {}
        for group in setting.layout.layers:
            keep[group.name] = torch.ones(group.units, dtype=torch.bool)
            gone = min(pruned_count(self.rate, group.units), group.units - 1)
            keep[group.name][torch.randperm(group.units, generator=draw)[:gone]] = False
        return keep
