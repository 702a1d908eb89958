"""Granularity: which weights are removed together, and which tensors take part."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from secateur.errors import ModelError, check
from secateur.pruning.allocation import Allocation, lowest, pruned_count
from secateur.pruning.mask import Tensors
from secateur.pruning.structure import Group, Kind, Layout, Role, expand, per_unit

_HALF = 0.5


class Granularity(ABC):
    """Base of granularities, which say what is removed together, and from which tensors; frozen dataclasses.

    Your own granularity derives from this class and writes ``prunable`` and ``mask``.
    """

    @abstractmethod
    def prunable(self, layout: Layout) -> list[str]:
        """Return the names of the tensors that a mask covers."""

    @property
    def single(self) -> bool:
        """Return whether single weights are removed, exactly as the allocation chooses them."""
        return False

    @property
    def cuts(self) -> bool:
        """Return whether whole units are removed, which are then cut out of the model."""
        return False

    @abstractmethod
    def mask(
        self, scores: Tensors, layout: Layout, *, allocation: Allocation, sparsity: float
    ) -> dict[str, torch.Tensor]:
        """Return the mask over exactly the prunable tensors, by name.

        Args:
            scores: a score of each entry, by name; the lowest are pruned first.
            layout: the roles and units of the model's tensors.
            allocation: chooses the entries to keep.
            sparsity: the share to prune.
        """


@dataclass(frozen=True)
class Weight(Granularity):
    """Removes single weights.

    Attributes:
        biases: whether biases take part (FedSparsify's code prunes them; protected by default here).
        norms: whether scale and shift of normalisation layers take part (likewise).
    """

    biases: bool = False
    norms: bool = False

    def prunable(self, layout: Layout) -> list[str]:
        """Return the weights, and biases and norms if they take part."""
        return _prunable(layout, biases=self.biases, norms=self.norms)

    @property
    def single(self) -> bool:
        """Return True: single weights are removed."""
        return True

    def mask(
        self, scores: Tensors, layout: Layout, *, allocation: Allocation, sparsity: float
    ) -> dict[str, torch.Tensor]:
        """Return the mask that the allocation chooses."""
        return allocation.keep({name: scores[name] for name in self.prunable(layout)}, sparsity)


@dataclass(frozen=True)
class Hybrid(Granularity):
    """Removes single weights, then whole units: M = Mu AND Ms.

    Mu is the allocation's mask over single weights. A unit (filter, neuron or attention head, with its bias) is removed
    if the kept fraction of its incoming weights in Mu is below rho; Ms is 0 on its incoming weights, its
    bias and the next layer's matching inputs. Output layers and layers outside ``layout.groups`` lose no
    units.

    Attributes:
        rho: the threshold on a unit's kept fraction; 0 switches the removal of units off.
        floor: the share of a layer's units that always stays (at least one), best mean score first; 0: only one unit.
        rule: remove a unit if its ``kept`` fraction is below rho, or if its ``mean`` score is among the lowest T_p of
            its layer.
        biases: whether biases take part in Mu.
        multiple: the number of kept units of a layer is rounded up to a multiple of it.

    Reference: AutoFLIP, arXiv 2405.10271 (hybrid pruning). No published rule for units was found; this one
    follows from the same guidance without a new threshold on it.
    """

    rho: float = 0.5
    floor: float = 0.1
    rule: Literal["kept", "mean"] = "kept"
    biases: bool = True
    multiple: int = 1

    def __post_init__(self) -> None:
        check(0 <= self.rho <= 1, name="granularity.rho", value=self.rho, must="be in [0, 1]")
        _check_units(self.floor, self.multiple)

    def prunable(self, layout: Layout) -> list[str]:
        """Return the weights, biases if they take part, and the other tensors of removable units (batch norm)."""
        names = set(_prunable(layout, biases=self.biases, norms=False))
        if self.cuts:
            names.update(slot.tensor for group in layout.layers for slot in group.incoming)
        return [name for name in layout.roles if name in names]

    def mask(
        self, scores: Tensors, layout: Layout, *, allocation: Allocation, sparsity: float
    ) -> dict[str, torch.Tensor]:
        """Return the mask Mu AND Ms."""
        single = allocation.keep(
            {name: scores[name] for name in _prunable(layout, biases=self.biases, norms=False)}, sparsity
        )
        mask = {
            name: single.get(name, torch.ones_like(scores[name], dtype=torch.bool)) for name in self.prunable(layout)
        }
        if sparsity <= 0 or not self.cuts:
            return mask
        for group in layout.layers:
            keep = self._kept(group, single, scores, sparsity)
            for slot in (*group.incoming, *group.outgoing):
                mask[slot.tensor] = mask[slot.tensor] & expand(keep, slot, mask[slot.tensor].shape)
        return mask

    @property
    def cuts(self) -> bool:
        """Return whether the threshold on units is on."""
        return self.rho > 0 or self.rule == "mean"

    def _kept(self, group: Group, single: Tensors, scores: Tensors, sparsity: float) -> torch.Tensor:
        score = unit_scores(scores, group)
        if self.rule == "mean":
            removed = lowest(score, pruned_count(sparsity, group.units))
        else:
            removed = unit_scores(single, group) < self.rho
        return _with_best(~removed, score, floor=self.floor, multiple=self.multiple)


@dataclass(frozen=True)
class NM(Granularity):
    """Keeps N of every M consecutive inputs of a filter or neuron, a pattern that some accelerators are built for.

    floor(sparsity M) of each M are pruned, by score; the allocation is not used. The rest of a row that M does not
    divide is kept.

    Attributes:
        m: M, the length of a pattern; sparsity 0.5 with m = 4 is 2:4.

    Reference: Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378.
    """

    m: int = 4

    def __post_init__(self) -> None:
        check(self.m >= 2, name="granularity.m", value=self.m, must="be at least 2")

    def prunable(self, layout: Layout) -> list[str]:
        """Return the weights."""
        return layout.names("weight")

    def mask(
        self, scores: Tensors, layout: Layout, *, allocation: Allocation, sparsity: float
    ) -> dict[str, torch.Tensor]:
        """Return the mask of the pattern."""
        del allocation
        gone = pruned_count(sparsity, self.m)
        return {name: self._pattern(scores[name], gone) for name in self.prunable(layout)}

    def _pattern(self, scores: torch.Tensor, gone: int) -> torch.Tensor:
        rows = scores.reshape(len(scores), -1)
        whole = rows.shape[1] // self.m * self.m
        keep = torch.ones_like(rows, dtype=torch.bool)
        if gone and whole:
            runs = rows[:, :whole].reshape(-1, self.m)
            order = runs.argsort(dim=1, stable=True)[:, :gone]
            keep[:, :whole] = torch.ones_like(runs, dtype=torch.bool).scatter(1, order, value=False).view(len(rows), -1)
        return keep.view_as(scores)


@dataclass(frozen=True)
class Kernel(Granularity):
    """Removes whole kernels: all positions that join one input channel to one filter; single weights in linear layers.

    A kernel's score is the mean of its weights' scores, and its weights are kept or pruned together; a kernel that the
    allocation splits, at its boundary or by its guard, is kept.
    """

    def prunable(self, layout: Layout) -> list[str]:
        """Return the weights."""
        return layout.names("weight")

    def mask(
        self, scores: Tensors, layout: Layout, *, allocation: Allocation, sparsity: float
    ) -> dict[str, torch.Tensor]:
        """Return the mask of the kernels that the allocation keeps."""
        kernels = {name: scores[name] for name in self.prunable(layout)}
        means = {n: s.flatten(2).mean(2) if s.dim() > 2 else s for n, s in kernels.items()}
        shaped = {n: m.reshape(*m.shape, *[1] * (kernels[n].dim() - m.dim())) for n, m in means.items()}
        keep = allocation.keep({n: m.expand_as(kernels[n]) for n, m in shaped.items()}, sparsity)
        kept = {n: k.flatten(2).any(2) if k.dim() > 2 else k for n, k in keep.items()}
        return {n: k.reshape(shaped[n].shape).expand_as(kernels[n]) for n, k in kept.items()}


@dataclass(frozen=True)
class Channel(Granularity):
    """Removes whole channels, neurons and hidden units, which are then cut out of the model.

    A unit's score is the mean of its own weights' scores, and its weights are kept or pruned together; layers whose
    outputs are added share their units. The sparsity is that of the units' own weights, as the allocation distributes
    it (to the nearest unit); the weights of the next layers that read removed units are removed besides. Layers without
    removable units (``Layout.whole``) stay dense.

    Attributes:
        floor: the share of a layer's units that always stays (at least one), best score first.
        multiple: the number of kept units of a layer is rounded up to a multiple of it (4 or 8 suit vector units).
    """

    floor: float = 0.0
    multiple: int = 1

    _kind: ClassVar[Kind] = "channel"

    def __post_init__(self) -> None:
        _check_units(self.floor, self.multiple)

    @property
    def cuts(self) -> bool:
        """Return True: whole units are removed."""
        return True

    def prunable(self, layout: Layout) -> list[str]:
        """Return the tensors of the units, and the tensors that read their outputs.

        Raises:
            ModelError: the model has no such units; the text says why.
        """
        groups = layout.of(self._kind)
        if not groups:
            why = "; ".join(f"{name or 'model'}: {reason}" for name, reason in layout.whole.items())
            raise ModelError(
                f"granularity {self._kind}: the model has no removable {self._kind} ({why or 'it has no such layer'}); "
                "use granularity weight, or another model"
            )
        names = {slot.tensor for group in groups for slot in (*group.incoming, *group.outgoing)}
        return [name for name in layout.roles if name in names]

    def mask(
        self, scores: Tensors, layout: Layout, *, allocation: Allocation, sparsity: float
    ) -> dict[str, torch.Tensor]:
        """Return the mask that keeps the chosen units whole."""
        mask = {name: torch.ones_like(scores[name], dtype=torch.bool) for name in self.prunable(layout)}
        groups = layout.of(self._kind)
        own = {group.name: unit_scores(scores, group).float() for group in groups}
        spread = {s.tensor: expand(own[g.name], s, scores[s.tensor].shape) for g in groups for s in g.weights}
        # seen from the inputs' side: what an allocation guards for each output would else keep every unit
        turned = allocation.keep({n: s.transpose(0, 1) if s.dim() > 1 else s for n, s in spread.items()}, sparsity)
        chosen = {n: k.transpose(0, 1) if k.dim() > 1 else k for n, k in turned.items()}
        for group in groups:
            keep = unit_scores(chosen, group) > _HALF
            if self._kind != "block":
                keep = _with_best(keep, own[group.name], floor=self.floor, multiple=self.multiple)
            for slot in (*group.incoming, *group.outgoing):
                mask[slot.tensor] = mask[slot.tensor] & expand(keep, slot, mask[slot.tensor].shape)
        return mask


@dataclass(frozen=True)
class Head(Channel):
    """Removes whole attention heads; see ``Channel``."""

    _kind: ClassVar[Kind] = "head"


@dataclass(frozen=True)
class Block(Channel):
    """Removes whole residual blocks, whose input is then passed on unchanged; see ``Channel``.

    ``floor`` and ``multiple`` do not apply: each block is one unit.
    """

    _kind: ClassVar[Kind] = "block"


def unit_scores(scores: Tensors, group: Group) -> torch.Tensor:
    """Return the mean score of each unit's own weights in float64, shape (units,); entries at -inf are left out.

    They are pruned already. A unit with no other entry scores -inf.
    """
    each = torch.cat([per_unit(scores[slot.tensor], slot, group.units) for slot in group.weights], dim=1).double()
    counts = torch.isfinite(each)
    total = torch.where(counts, each, 0.0).sum(1)
    return torch.where(counts.any(1), total / counts.sum(1).clamp(min=1), -torch.inf)


def _with_best(keep: torch.Tensor, scores: torch.Tensor, *, floor: float, multiple: int) -> torch.Tensor:
    """Return flags of the kept units, with the best ones up to the floor, and others up to a multiple."""
    units = len(keep)
    keep = keep | ~lowest(scores, units - max(1, math.ceil(floor * units - 1e-9)))
    wanted = min(units, math.ceil(int(keep.sum()) / multiple) * multiple)
    return ~lowest(torch.where(keep, torch.inf, scores.double()), units - wanted)


def _check_units(floor: float, multiple: int) -> None:
    check(0 <= floor <= 1, name="granularity.floor", value=floor, must="be in [0, 1]")
    check(multiple >= 1, name="granularity.multiple", value=multiple, must="be at least 1")


def _prunable(layout: Layout, *, biases: bool, norms: bool) -> list[str]:
    roles: list[Role] = ["weight"]
    roles += ["bias"] if biases else []
    roles += ["norm"] if norms else []
    return layout.names(*roles)
