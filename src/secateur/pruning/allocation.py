"""Allocation: scores and a target sparsity -> which entries to keep.

All rules are exact in their counts, ties included: among equal scores the entry that comes first (tensor
order, then row-major index) is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from secateur.pruning.mask import Tensors


class Allocation(Protocol):
    """What an allocation offers."""

    def keep(self, scores: Tensors, sparsity: float) -> dict[str, torch.Tensor]:
        """Return a boolean mask for each tensor of scores."""


def pruned_count(sparsity: float, total: int) -> int:
    """Return floor(sparsity * total), blind to the last bits of the product (0.29 * 100 prunes 29).

    >>> pruned_count(0.29, 100)
    29
    """
    return min(total, math.floor(sparsity * total + 1e-6))


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return a boolean vector that marks the ``count`` lowest of a score vector.

    Ties at the boundary: the later index counts as lower.
    """
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count).values
    below = scores < threshold
    tied = (scores == threshold).nonzero().squeeze(1)
    missing = count - int(below.sum())
    below[tied[len(tied) - missing :]] = True
    return below


def _flat(scores: Tensors) -> torch.Tensor:
    return torch.cat([s.reshape(-1).double() for s in scores.values()]) if scores else torch.zeros(0).double()


def _split(flags: torch.Tensor, like: Tensors) -> dict[str, torch.Tensor]:
    parts = torch.split(flags, [s.numel() for s in like.values()])
    return {name: part.reshape(like[name].shape) for name, part in zip(like, parts, strict=True)}


@dataclass(frozen=True)
class Global:
    """The lowest floor(s N) scores of all tensors together; the count is exact.

    Attributes:
        guard: keep the best weight of every output unit (first dimension of a tensor with two or more), so
            that no unit dies by accident at very high sparsity. A unit that is already dead stays dead. The
            guard gives way where the budget is smaller than the number of units.

    Reference: FedSparsify, arXiv 2204.12430 (global threshold; the guard is ours, off in the paper's code).
    """

    guard: bool = True

    def keep(self, scores: Tensors, sparsity: float) -> dict[str, torch.Tensor]:
        """Return the mask that keeps exactly N - floor(s N) entries."""
        if self.guard:
            scores = {name: _protect_best(s) for name, s in scores.items()}
        total = sum(s.numel() for s in scores.values())
        return highest(scores, total - pruned_count(sparsity, total))


def highest(scores: Tensors, count: int) -> dict[str, torch.Tensor]:
    """Return the mask that keeps the ``count`` highest scores of all tensors together."""
    flat = _flat(scores)
    return _split(~lowest(flat, flat.numel() - count), scores)


def _protect_best(scores: torch.Tensor) -> torch.Tensor:
    if scores.dim() < 2 or scores.numel() == 0:
        return scores
    rows = scores.double().flatten(1)
    best, where = rows.max(1)
    lifted = torch.where(best.isinf(), best, torch.full_like(best, torch.inf))
    return rows.scatter(1, where[:, None], lifted[:, None]).reshape(scores.shape)


@dataclass(frozen=True)
class Uniform:
    """The same sparsity in every tensor: the lowest floor(s n) scores of each."""

    def keep(self, scores: Tensors, sparsity: float) -> dict[str, torch.Tensor]:
        """Return the mask, exact in each tensor."""
        return {
            name: ~lowest(s.reshape(-1), pruned_count(sparsity, s.numel())).reshape(s.shape)
            for name, s in scores.items()
        }


@dataclass(frozen=True)
class ERK:
    """The lowest scores of each tensor, which is the denser the fewer its weights are for the units it joins.

    A tensor's density is proportional to the sum of its sizes over their product (Erdos-Renyi kernel); those that
    would be above 1 stay dense and the others share the rest. The total is exact.

    Reference: SET, Mocanu et al., Nature Communications 2018; kernels: RigL, Evci et al., arXiv 1911.11134.
    """

    def keep(self, scores: Tensors, sparsity: float) -> dict[str, torch.Tensor]:
        """Return the mask that keeps exactly N - floor(s N) entries."""
        counts = erk({name: tuple(s.shape) for name, s in scores.items()}, sparsity)
        return {name: ~lowest(s.reshape(-1), s.numel() - counts[name]).reshape(s.shape) for name, s in scores.items()}


def erk(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, int]:
    """Return how many weights of each tensor ERK keeps; they add up to N - floor(s N).

    >>> erk({"a": (2, 2), "b": (8, 8)}, 0.5)
    {'a': 4, 'b': 30}
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    left = sum(sizes.values()) - pruned_count(sparsity, sum(sizes.values()))
    kept: dict[str, int] = {}
    while len(kept) < len(shapes):
        open_ = [name for name in shapes if name not in kept]
        share = left / max(1, sum(sum(shapes[name]) for name in open_))
        full = [name for name in open_ if share * sum(shapes[name]) >= sizes[name]]
        if not full:
            exact = {name: share * sum(shapes[name]) for name in open_}
            kept |= {name: math.floor(value + 1e-9) for name, value in exact.items()}
            rest = left - sum(kept[name] for name in open_)
            for name in sorted(open_, key=lambda n: kept[n] - exact[n])[:rest]:
                kept[name] += 1
            break
        kept |= {name: sizes[name] for name in full}
        left -= sum(sizes[name] for name in full)
    return {name: kept[name] for name in shapes}


@dataclass(frozen=True)
class LAMP:
    """The lowest of all tensors together, after each score was set against those that are no smaller in its tensor.

    LAMP(u) = s_u^2 / sum of s_v^2 over v of the same tensor with s_v >= s_u: the largest weight of every tensor scores
    1, so that no layer is emptied. Among equal scores the first entry counts as the larger.

    Reference: Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", arXiv 2010.07611.
    """

    def keep(self, scores: Tensors, sparsity: float) -> dict[str, torch.Tensor]:
        """Return the mask that keeps exactly N - floor(s N) entries."""
        total = sum(s.numel() for s in scores.values())
        return highest({n: lamp(s) for n, s in scores.items()}, total - pruned_count(sparsity, total))


def lamp(scores: torch.Tensor) -> torch.Tensor:
    """Return a tensor's LAMP scores in float64; entries at -inf (already pruned) stay there.

    >>> lamp(torch.tensor([1.0, 2.0, 2.0])).tolist()
    [0.1111111111111111, 1.0, 0.5]
    """
    flat = scores.reshape(-1).double()
    order = flat.flip(0).argsort(stable=True)  # ascending; of equal scores the later entry first
    order = flat.numel() - 1 - order
    squares = torch.where(flat.isinf(), 0.0, flat.square())[order]
    above = squares.flip(0).cumsum(0).flip(0)
    ratio = torch.zeros_like(flat).index_put((order,), squares / above.clamp(min=1e-300))
    return torch.where(flat.isinf(), flat, ratio).reshape(scores.shape)


@dataclass(frozen=True)
class Quantile:
    """Keep what lies strictly above the quantile of all scores at level T_p = sparsity.

    q is the (floor(T_p (N - 1)) + 1)-th lowest score; everything <= q goes, so ties at q may prune more than
    T_p and the caller reports the sparsity reached. T_p = 0 prunes nothing.

    Reference: AutoFLIP, arXiv 2405.10271 (threshold T_p as a global quantile level).
    """

    def keep(self, scores: Tensors, sparsity: float) -> dict[str, torch.Tensor]:
        """Return scores > q."""
        flat = _flat(scores)
        if sparsity <= 0 or flat.numel() == 0:
            return {name: torch.ones_like(s, dtype=torch.bool) for name, s in scores.items()}
        rank = math.floor(sparsity * (flat.numel() - 1) + 1e-6) + 1
        threshold = flat.kthvalue(rank).values
        return {name: s.double() > threshold for name, s in scores.items()}


@dataclass(frozen=True)
class Threshold:
    """Keep what scores strictly above the number given as sparsity; the other reading of AutoFLIP's T_p.

    With heavy-tailed guidance this prunes nearly everything at 0.3; it exists for that ablation. 0 prunes
    nothing.
    """

    def keep(self, scores: Tensors, sparsity: float) -> dict[str, torch.Tensor]:
        """Return scores > sparsity."""
        return {
            name: s > sparsity if sparsity > 0 else torch.ones_like(s, dtype=torch.bool) for name, s in scores.items()
        }
