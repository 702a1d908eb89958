"""Independent Subnetwork Training: the units of each hidden layer are divided among clients, so that none share one.

    deal    in each round the units of each hidden layer are shuffled and dealt to P hands; client i of the cohort takes
            hand i mod P
    merge   each weight is the mean over those clients that held it; one that nobody held stays

Paper symbol -> option: number of subnetworks: parts.

Reference: Yuan et al., "Distributed Learning of Deep Neural Networks using Independent Subnet Training",
arXiv 1910.02120. *Read*: the published code, BinhangYuan/IST_Release (distributed_3layer_subnet_centralized_ps_gloo.py
and its siblings, ist_utilis.py); of the paper only the abstract.
Departures: in the code all hands have as many units, and every worker draws from all rows; here hands may differ by a
unit, and if a layer has fewer units than hands, hands share units. Layers without removable units, such as the output
layer's bias, are held by everyone and averaged by rows.
Not reproduced: the paper's figures are times on its own cluster. It depends on batch norm: the published networks have
no biases and a norm behind every linear layer, the last one too, which takes the batch's statistics in tests as well,
and hands are dealt every 20 steps. With such a network of 784-128-128-10 (Fashion-MNIST, rows spread evenly over 50
clients, five hands, 30 rounds of an epoch, SGD 0.1, seed 0) it has 81.6 % and FedAvg 85.0 %; our MLP, without a norm,
has 63.3 % there, which says nothing about the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from secateur.contract.state import Setting
from secateur.errors import ConfigError, check
from secateur.methods.kit.submodels import Sliced
from secateur.streams import stream


@dataclass(frozen=True)
class IndependentSubnetworks(Sliced):
    """Trains disjoint slices of the model.

    Attributes:
        parts: P, the number of hands to which units are dealt; 0: one for each client of a cohort; 1 is FedAvg.
    """

    parts: int = 0

    def __post_init__(self) -> None:
        check(self.parts >= 0, name="parts", value=self.parts, must="be 0 or more")

    def check(self, setting: Setting) -> None:
        """Refuse a robust rule where too few clients hold a unit for it to move.

        Raises:
            ConfigError: the text says how many do.
        """
        super().check(setting)
        cohort, least = len(setting.cohort(1)), self.aggregator.fewest
        hands = min(self.parts or cohort, cohort)
        if cohort // hands < least:
            raise ConfigError(
                f"aggregator {type(self.aggregator).__name__} moves what {least} clients hold, and of {cohort} clients "
                f"{cohort // hands} hold a unit dealt to {hands} hands: set parts = {max(1, cohort // least)} or fewer"
            )

    def units_by_client(self, setting: Setting, round_: int) -> Mapping[int, Mapping[str, torch.Tensor]]:
        """Return the units of each layer that each client of the cohort is dealt."""
        cohort, draw = setting.cohort(round_), stream(setting.seed, "deal", round_)
        hands = self.parts or len(cohort)
        held: dict[int, dict[str, torch.Tensor]] = {client: {} for client in cohort}
        for group in setting.layout.layers:
            order = torch.randperm(group.units, generator=draw)
            for place, client in enumerate(cohort):
                flags = torch.zeros(group.units, dtype=torch.bool)
                flags[order[place % min(hands, group.units) :: hands]] = True
                held[client][group.name] = flags
        return held
