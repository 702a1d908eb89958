"""Granularity: what is removed together, and which tensors take part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from secateur.errors import check
from secateur.pruning.allocation import Allocation, lowest, pruned_count
from secateur.pruning.mask import Tensors
from secateur.pruning.structure import Group, Layout, Role, expand


class Granularity(Protocol):
    """What a granularity offers."""

    def prunable(self, layout: Layout) -> list[str]:
        """Return the names of the tensors that a mask covers."""

    def mask(
        self, scores: Tensors, layout: Layout, *, allocation: Allocation, sparsity: float
    ) -> dict[str, torch.Tensor]:
        """Return the mask over exactly the prunable tensors."""


@dataclass(frozen=True)
class Weight:
    """Single weights.

    Attributes:
        biases: biases take part (FedSparsify's code prunes them; protected by default here).
        norms: scale and shift of normalisation layers take part (likewise).
    """

    biases: bool = False
    norms: bool = False

    def prunable(self, layout: Layout) -> list[str]:
        """Return the weights, and what the options add."""
        return _prunable(layout, biases=self.biases, norms=self.norms)

    def mask(
        self, scores: Tensors, layout: Layout, *, allocation: Allocation, sparsity: float
    ) -> dict[str, torch.Tensor]:
        """Return the allocation's choice."""
        return allocation.keep({name: scores[name] for name in self.prunable(layout)}, sparsity)


@dataclass(frozen=True)
class Hybrid:
    """Single weights, then whole units: M = Mu AND Ms.

    Mu is the allocation's mask over single weights. A unit (output filter or neuron, with its bias) goes
    when the kept fraction of its incoming weights in Mu is below rho; Ms is 0 on its incoming weights, its
    bias and the next layer's matching inputs. Output layers and layers outside ``layout.groups`` lose no
    units.

    Attributes:
        rho: unit threshold on the kept fraction; 0 switches unit removal off.
        floor: share of a layer's units that always stays (at least one), best mean score first; 0 leaves
            only the one.
        rule: ``kept`` fraction below rho, or ``mean`` score of a unit among the lowest T_p of its layer.
        biases: biases take part in Mu.

    Reference: AutoFLIP, arXiv 2405.10271 (hybrid pruning). No published rule for units was found; this one
    follows from the same guidance without a new threshold on it.
    """

    rho: float = 0.5
    floor: float = 0.1
    rule: Literal["kept", "mean"] = "kept"
    biases: bool = True

    def __post_init__(self) -> None:
        check(0 <= self.rho <= 1, name="granularity.rho", value=self.rho, must="be in [0, 1]")
        check(0 <= self.floor <= 1, name="granularity.floor", value=self.floor, must="be in [0, 1]")

    def prunable(self, layout: Layout) -> list[str]:
        """Return weights and, if asked, biases; and what goes with a removable unit (its batch norm)."""
        names = set(_prunable(layout, biases=self.biases, norms=False))
        if self._removes_units:
            names.update(slot.tensor for group in layout.groups for slot in group.incoming)
        return [name for name in layout.roles if name in names]

    def mask(
        self, scores: Tensors, layout: Layout, *, allocation: Allocation, sparsity: float
    ) -> dict[str, torch.Tensor]:
        """Return Mu AND Ms."""
        single = allocation.keep(
            {name: scores[name] for name in _prunable(layout, biases=self.biases, norms=False)}, sparsity
        )
        mask = {
            name: single.get(name, torch.ones_like(scores[name], dtype=torch.bool)) for name in self.prunable(layout)
        }
        if sparsity <= 0 or not self._removes_units:
            return mask
        for group in layout.groups:
            keep = ~self._removed(group, single, scores, sparsity)
            for slot in (*group.incoming, *group.outgoing):
                mask[slot.tensor] = mask[slot.tensor] & expand(keep, slot, mask[slot.tensor].shape)
        return mask

    @property
    def _removes_units(self) -> bool:
        return self.rho > 0 or self.rule == "mean"

    def _removed(self, group: Group, single: Tensors, scores: Tensors, sparsity: float) -> torch.Tensor:
        mean = scores[group.weight].double().flatten(1).mean(1)
        if self.rule == "mean":
            removed = lowest(mean, pruned_count(sparsity, group.units))
        else:
            removed = single[group.weight].double().flatten(1).mean(1) < self.rho
        stay = max(1, math.ceil(self.floor * group.units - 1e-9))
        return removed & lowest(mean, group.units - stay)


def _prunable(layout: Layout, *, biases: bool, norms: bool) -> list[str]:
    roles: list[Role] = ["weight"]
    roles += ["bias"] if biases else []
    roles += ["norm"] if norms else []
    return layout.names(*roles)
