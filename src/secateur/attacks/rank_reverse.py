"""Rank reverse: an attacker turns the order of every layer's edges, or of a statistic's values, upside down.

    r -> n - 1 - r, for the n edges of a layer;  the largest value of a statistic goes where the smallest was

Reference: Mozaffari et al., "Every Vote Counts", arXiv 2110.04350 (attackers send the reverse of the order that the
honest clients agree on).
Departures: each attacker reverses its own ranking; statistics are reversed likewise, so that all their values are those
of an honest reply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.contract.attack import Attack, Kind, Scene, floats, with_tensors
from secateur.pruning.ranking import packed, ranked, unpacked
from secateur.wire.message import Message


@dataclass(frozen=True)
class RankReverse(Attack):
    """Reverses rankings and statistics, tensor by tensor."""

    fits: ClassVar[frozenset[Kind]] = frozenset({"ranks", "statistics"})

    def alter(self, message: Message, scene: Scene, memory: dict[str, torch.Tensor]) -> Message:
        """Return the reversed message."""
        del memory
        if "ranks" not in scene.kinds:
            return with_tensors(message, {name: reversed_values(x) for name, x in floats(message).items()})
        specs = scene.setting.specs
        ranks = unpacked(message.tensors, {n: specs[n].shape for n in scene.setting.layout.names("weight")})
        return with_tensors(message, packed({name: rank.numel() - 1 - rank for name, rank in ranks.items()}))


def reversed_values(values: torch.Tensor) -> torch.Tensor:
    """Return the same values with their order reversed: the largest where the smallest was.

    >>> reversed_values(torch.tensor([1.0, 5.0, 3.0])).tolist()
    [5.0, 1.0, 3.0]
    """
    ascending = values.reshape(-1).sort(stable=True).values
    return ascending[values.numel() - 1 - ranked(values).reshape(-1).long()].reshape(values.shape)
