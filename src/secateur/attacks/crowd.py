"""What attacks of several clients share: moments and distances of the messages that they see.

A coordinate is seen of those messages only that hold it: under own masks a pruned entry is no vote for 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from secateur.contract.attack import floats
from secateur.pruning.mask import Tensors
from secateur.wire.message import Message


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of each entry over the messages that hold it; float64, by name.

    Attributes:
        mean: where no message holds an entry, 0.
        std: from squares over one less than the holders, as published code takes it; 0 with fewer than two.
    """

    mean: Tensors
    std: Tensors


def moments(messages: Sequence[Message]) -> Moments:
    """Return the moments of the float tensors of some messages."""
    mean, std = {}, {}
    for name in floats(messages[0]):
        values = torch.stack([message.tensors[name].double() for message in messages])
        held = torch.stack([_held(message, name) for message in messages])
        holders = held.sum(dim=0)
        centre = torch.where(held, values, 0.0).sum(dim=0) / holders.clamp(min=1)
        squares = torch.where(held, values - centre, 0.0).square().sum(dim=0)
        mean[name], std[name] = centre, (squares / (holders - 1).clamp(min=1)).sqrt()
    return Moments(mean, std)


def vectors(messages: Sequence[Message]) -> torch.Tensor:
    """Return the float tensors of each message as one row of a matrix, float64; pruned entries are 0."""
    names = sorted(floats(messages[0]))
    rows = [torch.cat([message.tensors[name].double().reshape(-1) for name in names]) for message in messages]
    return torch.stack(rows)


def flat(tensors: Tensors) -> torch.Tensor:
    """Return tensors as one vector, in the order of ``vectors``."""
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


def single(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return tensors as float32, in which they travel."""
    return {name: tensor.float() for name, tensor in tensors.items()}


def alie_z(clients: int, attackers: int) -> float:
    """Return the z of ALIE: the honest clients that it takes for a majority stand further from the mean than it.

    s = floor(K/2 + 1) - f of the K - f honest clients must stand beyond: z = Phi^-1((K - f - s)/(K - f)); 0 where
    attackers are a majority by themselves, or nobody else is there.

    Args:
        clients: K, honest ones and attackers.
        attackers: f.
    """
    honest = clients - attackers
    needed = math.floor(clients / 2 + 1) - attackers
    if honest <= 0 or not 0 < needed < honest:
        return 0.0
    return float(torch.special.ndtri(torch.tensor((honest - needed) / honest, dtype=torch.float64)))


def _held(message: Message, name: str) -> torch.Tensor:
    mask: Mapping[str, torch.Tensor] = message.mask or {}
    return mask[name] if name in mask else torch.ones_like(message.tensors[name], dtype=torch.bool)
