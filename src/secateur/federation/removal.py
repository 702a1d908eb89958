"""What the removal of units leaves of a model: in units, parameters and MACs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from secateur import cost
from secateur.federation.records import Row
from secateur.pruning.mask import Mask
from secateur.pruning.roles import stored
from secateur.pruning.structure import Group, Plan, dead_units
from secateur.pruning.surgery import shrink

UNITS = "units"
"""The entry of a record with the units left and the units of each layer that lost some, by layer."""

_FEW = 0.05  # of a layer's units: fewer are worth a remark


def units_left(mask: Mask | None, groups: Iterable[Group]) -> Row:
    """Return the sparsity of units, and of each layer that lost some ``[left, of]``; nothing where none is removed.

    Args:
        mask: of a model.
        groups: its channels, neurons and heads; blocks are counted in no group.
    """
    left = {group.name: [group.units - int(dead_units(mask or {}, group).sum()), group.units] for group in groups}
    lost = {name: counts for name, counts in left.items() if counts[0] < counts[1]}
    if not lost:
        return {}
    kept, units = (sum(counts[k] for counts in left.values()) for k in (0, 1))
    return {"sparsity_units": 1 - kept / units, UNITS: lost}


def remarks_on_units(row: Row) -> list[str]:
    """Return a remark on each layer with few units left, and before them one on what the cut took along; or none."""
    few = [_few(name, *counts) for name, counts in row.get(UNITS, {}).items() if counts[0] <= max(1, _FEW * counts[1])]
    if not few:
        return []
    shares = (
        f"{100 * row['sparsity_units']:.1f} % of the units are removed, {100 * row['sparsity']:.1f} % of the weights"
    )
    return [f"{shares}: a unit takes its inputs and its outputs along", *few]


def _few(name: str, left: int, of: int) -> str:
    verb = "is" if left == 1 else "are"
    return f"{name}: {left} of {of} units {verb} left; a cut within each layer (allocation=uniform) would leave more"


def sizes_after(removal: Plan, model: nn.Module, example: torch.Tensor, macs: int) -> Row:
    """Return parameters and MACs of a model before and after its units are cut; ``macs`` are those before."""
    small = shrink(model, removal)
    return {
        "macs_dense": macs,
        "macs_physical": cost.macs(cost.uses(small, example), stored(small), None),
        "parameters_dense": sum(p.numel() for p in model.parameters()),
        "parameters_physical": sum(p.numel() for p in small.parameters()),
    }
