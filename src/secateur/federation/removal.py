"""What the removal of units leaves of a model: in units, parameters and MACs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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


def remarks_on_units(row: Mapping[str, object]) -> list[str]:
    """Return a remark on each layer with few units left, and before them one on what the cut took along; or none."""
    units = row.get(UNITS)
    if not isinstance(units, Mapping):
        return []
    few = [_few(name, *counts) for name, counts in units.items() if counts[0] <= max(1, _FEW * counts[1])]
    gone, weights = _share(row["sparsity_units"]), _share(row["sparsity"])
    told = f"{gone} of the units are removed, {weights} of the weights: a unit takes its inputs and its outputs along"
    return [told, *few] if few else []


def _share(value: object) -> str:
    return f"{100 * float(str(value)):.1f} %"


def _few(name: str, left: int, of: int) -> str:
    unit = "unit is" if left == 1 else "units are"
    return f"{name}: {left} of {of} {unit} left; a cut within each layer (allocation=uniform) would leave more"


def sizes_after(removal: Plan, model: nn.Module, example: torch.Tensor, macs: int) -> Row:
    """Return parameters and MACs of a model before and after its units are cut; ``macs`` are those before."""
    small = shrink(model, removal)
    return {
        "macs_dense": macs,
        "macs_physical": cost.macs(cost.uses(small, example), stored(small), None),
        "parameters_dense": sum(p.numel() for p in model.parameters()),
        "parameters_physical": sum(p.numel() for p in small.parameters()),
    }
