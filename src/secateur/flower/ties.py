"""Tied tensors of an app's model: Flower's arrays hold them under each of their names, a sparse message under one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from secateur.pruning.mask import Tensors
from secateur.pruning.roles import stored
from secateur.wire.message import Spec, specs_of


@dataclass(frozen=True)
class Held:
    """The tensors of a model's state dict, and which of their names are of one tensor.

    Attributes:
        specs: the shape and dtype of each tensor, under its first name.
        others: the first name, by each further one.
        infinite: buffers that hold infinities, such as the mask of an attention.
    """

    specs: Mapping[str, Spec]
    others: Mapping[str, str]
    infinite: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> Held:
        """Return what a model holds."""
        tensors = stored(model)
        first = {id(tensor): name for name, tensor in tensors.items()}
        named = model.state_dict(keep_vars=True).items()
        others = {n: first[id(t)] for n, t in named if n not in tensors and id(t) in first}
        infinite = {n for n, t in tensors.items() if not isinstance(t, nn.Parameter) and bool(torch.isinf(t).any())}
        return cls(specs_of(tensors), others, frozenset(infinite))

    def once(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Return tensors without those under a further name."""
        return {name: tensor for name, tensor in tensors.items() if name not in self.others}

    def by_all_names(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Return tensors with each under all of its names."""
        return {**tensors, **{name: tensors[first] for name, first in self.others.items()}}
