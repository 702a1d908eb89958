"""What the removal of units leaves of a model, in parameters and MACs."""

from __future__ import annotations

import torch
from torch import nn

from secateur import cost
from secateur.federation.records import Row
from secateur.pruning.roles import stored
from secateur.pruning.structure import Plan
from secateur.pruning.surgery import shrink


def sizes_after(removal: Plan, model: nn.Module, example: torch.Tensor, macs: int) -> Row:
    """Return parameters and MACs of a model before and after its units are cut; ``macs`` are those before."""
    small = shrink(model, removal)
    return {
        "macs_dense": macs,
        "macs_physical": cost.macs(cost.uses(small, example), stored(small), None),
        "parameters_dense": sum(p.numel() for p in model.parameters()),
        "parameters_physical": sum(p.numel() for p in small.parameters()),
    }
