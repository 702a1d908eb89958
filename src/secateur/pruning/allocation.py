"""Allocation: which entries are kept, from their scores and a target sparsity.

Counts are exact, ties included: among equal scores the first entry (tensor order, then row-major index) is kept.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch

from secateur.errors import check
from secateur.pruning.knapsack import knapsack
from secateur.pruning.mask import Mask, Tensors
from secateur.pruning.ranking import lamp
from secateur.pruning.structure import Layout


class Trial(Protocol):
    """The merged model at the server, whose outputs can be computed with some tensors changed."""

    def outputs(self, changed: Tensors, inputs: int) -> torch.Tensor:
        """Return the outputs for ``inputs`` random inputs, the same at each call; shape (inputs, outputs)."""


class Allocation(ABC):
    """Base of allocations, which choose the entries to keep by scores and sparsity; frozen dataclasses.

    Your own allocation derives from this class and writes ``keep``.
    """

    exact: ClassVar[bool] = False  # whether exactly N - floor(s N) of N entries stay, whatever the scores

    @abstractmethod
    def keep(self, scores: Tensors, sparsity: float) -> dict[str, torch.Tensor]:
        """Return a boolean mask of the shape of each tensor of scores; True: kept."""

    def on(self, layout: Layout) -> Allocation:
        """Return the allocation for a model with this layout; by default itself."""
        del layout
        return self

    @property
    def unguarded(self) -> Allocation | None:
        """Return the allocation without its guard, to count what the guard keeps; None: it has no guard."""
        return None

    @property
    def measures(self) -> bool:
        """Return whether the server must call ``measured`` before it prunes."""
        return False

    def measured(self, scores: Tensors, weights: Tensors, trial: Trial) -> Allocation:
        """Return the allocation that follows from outputs of the model with changed ``weights``."""
        del scores, weights, trial
        return self


class _Exact(Allocation):
    exact = True


def pruned_count(sparsity: float, total: int) -> int:
    """Return floor(sparsity * total), whatever the last bits of the product (0.29 * 100 prunes 29).

    >>> pruned_count(0.29, 100)
    29
    """
    return min(total, math.floor(sparsity * total + 1e-6))


def kth(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the ``count``-th lowest of a score vector."""
    # numpy's partition takes a tenth of the time of torch's kthvalue on a CPU
    return scores.new_tensor(np.partition(scores.detach().cpu().numpy(), count - 1)[count - 1])


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return a boolean vector that marks the ``count`` lowest entries of a score vector.

    Among ties at the boundary the later index counts as lower.
    """
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = kth(scores, count)
    below = scores < threshold
    tied = (scores == threshold).nonzero().squeeze(1)
    below[tied[len(tied) - count + int(below.sum()) :]] = True
    return below


def _flat(scores: Tensors) -> torch.Tensor:
    return torch.cat([s.reshape(-1) for s in scores.values()]) if scores else torch.zeros(0)


def _split(flags: torch.Tensor, like: Tensors) -> dict[str, torch.Tensor]:
    parts = torch.split(flags, [s.numel() for s in like.values()])
    return {name: part.reshape(like[name].shape) for name, part in zip(like, parts, strict=True)}


_ROOM = 20
"""The number of kept weights for each guarded row, on average, from which the guard is used."""


@dataclass(frozen=True)
class Global(_Exact):
    """Prunes the lowest floor(s N) scores of all tensors together; the count is exact.

    Attributes:
        guard: keep the best weight of every output unit (a row of a tensor with two or more dimensions), so that no
            unit dies by accident. A unit that is already dead stays dead. The guard is not used if fewer than twenty
            weights may stay for each unit: it never takes more than a twentieth of the weights that stay, and beyond
            that scores alone decide.

    Rows of embeddings are not guarded: they are entries of a vocabulary, not units.

    Reference: FedSparsify, arXiv 2204.12430 (global threshold; the guard is ours, its published code has none).
    """

    guard: bool = True

    def keep(self, scores: Tensors, sparsity: float) -> dict[str, torch.Tensor]:
        """Return the mask that keeps exactly N - floor(s N) entries."""
        return _global(scores, sparsity, guarded=scores if self.guard else ())

    def on(self, layout: Layout) -> Allocation:
        """Return the allocation that guards output units, but not entries of a vocabulary."""
        return _OnModel(layout.tokens) if self.guard else self

    @property
    def unguarded(self) -> Allocation | None:
        """Return the allocation by scores alone; None if there is no guard."""
        return Global(guard=False) if self.guard else None


@dataclass(frozen=True)
class _OnModel(_Exact):
    tokens: frozenset[str]

    def keep(self, scores: Tensors, sparsity: float) -> dict[str, torch.Tensor]:
        """Return the mask that keeps exactly N - floor(s N) entries."""
        return _global(scores, sparsity, guarded=scores.keys() - self.tokens)


def kept_by_guard(mask: Mask, unguarded: Mask) -> int:
    """Return how many entries a guard alone keeps: those in ``mask`` but not in the mask made without a guard."""
    return sum(int((kept & ~unguarded[name]).sum()) for name, kept in mask.items())


def _global(scores: Tensors, sparsity: float, *, guarded: Collection[str]) -> dict[str, torch.Tensor]:
    total = sum(s.numel() for s in scores.values())
    budget = total - pruned_count(sparsity, total)
    rows = {n: _rows(s) for n, s in scores.items() if n in guarded and s.dim() > 1 and s.numel()}
    alive = sum(int((r.amax(1) > -torch.inf).sum()) for r in rows.values())
    if budget < _ROOM * alive:
        return highest(scores, budget)
    return highest({**scores, **{n: _protect_best(r).reshape(scores[n].shape) for n, r in rows.items()}}, budget)


def highest(scores: Tensors, count: int) -> dict[str, torch.Tensor]:
    """Return the mask that keeps the ``count`` highest scores of all tensors together, by name."""
    flat = _flat(scores)
    return _split(~lowest(flat, flat.numel() - count), scores)


def _rows(scores: torch.Tensor) -> torch.Tensor:
    return (scores if scores.is_floating_point() else scores.double()).flatten(1)


def _protect_best(rows: torch.Tensor) -> torch.Tensor:
    best, where = rows.max(1)
    lifted = torch.where(best.isinf(), best, torch.full_like(best, torch.inf))
    return rows.scatter(1, where[:, None], lifted[:, None])


@dataclass(frozen=True)
class Uniform(Allocation):
    """Prunes the lowest floor(s n) scores of each tensor, which gives every tensor the same sparsity."""

    def keep(self, scores: Tensors, sparsity: float) -> dict[str, torch.Tensor]:
        """Return the mask that keeps exactly n - floor(s n) entries of each tensor."""
        return {
            name: ~lowest(s.reshape(-1), pruned_count(sparsity, s.numel())).reshape(s.shape)
            for name, s in scores.items()
        }


@dataclass(frozen=True)
class ERK(_Exact):
    """Prunes the lowest scores of each tensor, with densities by ERK: small tensors stay denser than large ones.

    A tensor's density is proportional to the sum of its dimensions over their product (Erdos-Renyi kernel); tensors
    whose density would be above 1 stay dense and the others share the rest. The total is exact.

    Reference: SET, Mocanu et al., Nature Communications 2018; kernels: RigL, Evci et al., arXiv 1911.11134.
    """

    def keep(self, scores: Tensors, sparsity: float) -> dict[str, torch.Tensor]:
        """Return the mask that keeps exactly N - floor(s N) entries."""
        return by_count(scores, erk({name: tuple(s.shape) for name, s in scores.items()}, sparsity))


def erk(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, int]:
    """Return the number of weights of each tensor that ERK keeps; the sum is N - floor(s N).

    >>> erk({"a": (2, 2), "b": (8, 8)}, 0.5)
    {'a': 4, 'b': 30}
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    left = sum(sizes.values()) - pruned_count(sparsity, sum(sizes.values()))
    return shared(left, {name: sum(shape) for name, shape in shapes.items()}, sizes)


def shared(left: int, parts: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the number of entries each tensor keeps, ``left`` in all: in proportion to ``parts``, at most its size.

    >>> shared(34, {"a": 4, "b": 16}, {"a": 4, "b": 64})
    {'a': 4, 'b': 30}
    """
    kept: dict[str, int] = {}
    while len(kept) < len(sizes):
        open_ = [name for name in sizes if name not in kept]
        share = left / (sum(parts[name] for name in open_) or 1)
        full = [name for name in open_ if share * parts[name] >= sizes[name]]
        if not full:
            exact = {name: share * parts[name] for name in open_}
            kept |= {name: math.floor(value + 1e-9) for name, value in exact.items()}
            rest = left - sum(kept[name] for name in open_)
            for name in sorted(open_, key=lambda n: kept[n] - exact[n])[:rest]:
                kept[name] += 1
            break
        kept |= {name: sizes[name] for name in full}
        left -= sum(sizes[name] for name in full)
    return {name: kept[name] for name in sizes}


@dataclass(frozen=True)
class LAMP(_Exact):
    """Prunes the lowest LAMP scores of all tensors together: a score relative to the larger ones of its own tensor.

    LAMP(u) = s_u^2 / sum of s_v^2 over v of the same tensor with s_v >= s_u. The largest weight of every tensor scores
    1, so that no layer is emptied. Among equal scores the first entry counts as the larger.

    Reference: Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", arXiv 2010.07611.
    """

    def keep(self, scores: Tensors, sparsity: float) -> dict[str, torch.Tensor]:
        """Return the mask that keeps exactly N - floor(s N) entries."""
        total = sum(s.numel() for s in scores.values())
        return highest({n: lamp(s) for n, s in scores.items()}, total - pruned_count(sparsity, total))


@dataclass(frozen=True)
class Quantile(Allocation):
    """Keeps the scores strictly above their quantile at level T_p = sparsity, over all tensors together.

    q is the (floor(T_p (N - 1)) + 1)-th lowest score; every score <= q is pruned, so ties at q may prune more than
    T_p, and records say the sparsity reached. T_p = 0 prunes nothing.

    Reference: AutoFLIP, arXiv 2405.10271 (threshold T_p as a global quantile level).
    """

    def keep(self, scores: Tensors, sparsity: float) -> dict[str, torch.Tensor]:
        """Return the mask of scores above q."""
        flat = _flat(scores)
        if sparsity <= 0 or flat.numel() == 0:
            return {name: torch.ones_like(s, dtype=torch.bool) for name, s in scores.items()}
        rank = math.floor(sparsity * (flat.numel() - 1) + 1e-6) + 1
        threshold = kth(flat, rank)
        return {name: s.double() > threshold for name, s in scores.items()}


@dataclass(frozen=True)
class Threshold(Allocation):
    """Keeps the scores strictly above the number given as sparsity; this is the other reading of AutoFLIP's T_p.

    With heavy-tailed guidance it prunes nearly everything at 0.3; it exists for that ablation. 0 prunes
    nothing.
    """

    def keep(self, scores: Tensors, sparsity: float) -> dict[str, torch.Tensor]:
        """Return the mask of scores above the sparsity."""
        return {
            name: s > sparsity if sparsity > 0 else torch.ones_like(s, dtype=torch.bool) for name, s in scores.items()
        }


@dataclass(frozen=True)
class Given(Allocation):
    """Keeps given counts of each tensor, such as those of another mask; with random scores that mask is shuffled.

    Attributes:
        kept: the number of entries of each tensor that stay, in the order of tensors, such as ``400,12800,250``.

    Reference: the layer-shuffled control of Su et al., arXiv 2009.11094, and Frankle et al., arXiv 2009.08576.
    """

    kept: str = ""

    def __post_init__(self) -> None:
        counts = all(part.strip().isdecimal() for part in self.kept.split(",") if self.kept)
        check(counts, name="allocation.kept", value=self.kept, must="be counts")

    def keep(self, scores: Tensors, sparsity: float) -> dict[str, torch.Tensor]:
        """Return the mask with the given counts, whatever the sparsity.

        Raises:
            ConfigError: there are more or fewer counts than tensors, or one is larger than its tensor.
        """
        del sparsity
        counts = [int(part) for part in self.kept.split(",")] if self.kept else []
        fits = len(counts) == len(scores) and all(c <= s.numel() for c, s in zip(counts, scores.values(), strict=True))
        sizes = ", ".join(f"{name} {s.numel()}" for name, s in scores.items())
        check(fits, name="allocation.kept", value=self.kept, must=f"hold a count for each tensor: {sizes}")
        return by_count(scores, dict(zip(scores, counts, strict=True)))


@dataclass(frozen=True)
class UniformPlus(Allocation):
    """Uniform sparsity, except that a first convolution stays dense and the last tensor keeps at least a fifth.

    If the budget is smaller than what these two would keep, all tensors between them are pruned first.

    Reference: Gale et al., "The State of Sparsity in Deep Neural Networks", arXiv 1902.09574.
    """

    def keep(self, scores: Tensors, sparsity: float) -> dict[str, torch.Tensor]:
        """Return the mask that keeps exactly N - floor(s N) entries."""
        return by_count(scores, uniform_plus({name: tuple(s.shape) for name, s in scores.items()}, sparsity))


def uniform_plus(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, int]:
    """Return the number of entries of each tensor that ``UniformPlus`` keeps; the sum is N - floor(s N).

    >>> uniform_plus({"conv": (2, 1, 2, 2), "a": (4, 10), "b": (4, 10), "end": (2, 5)}, 0.9)
    {'conv': 8, 'a': 0, 'b': 0, 'end': 2}
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    names, left = list(sizes), sum(sizes.values()) - pruned_count(sparsity, sum(sizes.values()))
    kept: dict[str, int] = {}
    if len(shapes[names[0]]) > 2:
        kept[names[0]] = min(left, sizes[names[0]])
    if len(names) > 1:
        share = max(0.2, 1 - sparsity)
        kept[names[-1]] = min(left - sum(kept.values()), math.ceil(share * sizes[names[-1]] - 1e-6))
    between = {name: sizes[name] for name in names if name not in kept}
    rest, room = left - sum(kept.values()), sum(between.values())
    exact = {name: rest * size / room for name, size in between.items()} if room else {}
    kept |= {name: math.floor(value + 1e-9) for name, value in exact.items()}
    for name in sorted(exact, key=lambda n: kept[n] - exact[n])[: left - sum(kept.values())]:
        kept[name] += 1
    return {name: kept[name] for name in names}


def by_count(scores: Tensors, kept: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Return the mask that keeps the ``kept[name]`` highest scores of each tensor."""
    return {n: ~lowest(s.reshape(-1), s.numel() - kept[n]).reshape(s.shape) for n, s in scores.items()}


@dataclass(frozen=True)
class RateDistortion(Allocation):
    """Chooses each tensor's sparsity so that the model's outputs change least in sum, which is a knapsack problem.

    The server prunes each tensor alone to some levels and measures how far the outputs move for random inputs; these
    distortions are assumed to add up over tensors. A level prunes the lowest scores of its tensor.

    Attributes:
        levels: the number of levels of each tensor at which the distortion is measured.
        proxies: the number of random inputs.
        bins: the number of bins into which the knapsack divides the budget.

    Reference: joint layer-adaptive pruning by rate and distortion, Xu et al., ICCV 2023; its data-free mode.
    """

    levels: int = 20
    proxies: int = 64
    bins: int = 2000

    def __post_init__(self) -> None:
        for name in ("levels", "proxies", "bins"):
            check(getattr(self, name) >= 1, name=f"allocation.{name}", value=getattr(self, name), must="be at least 1")

    def keep(self, scores: Tensors, sparsity: float) -> dict[str, torch.Tensor]:
        """Raise a TypeError: the choice needs distortions; ``measured`` returns the allocation that has them."""
        raise TypeError(f"distortions of {len(scores)} tensors at sparsity {sparsity} were not measured")

    @property
    def measures(self) -> bool:
        """Return True: distortions are measured."""
        return True

    def measured(self, scores: Tensors, weights: Tensors, trial: Trial) -> Allocation:
        """Return the allocation by distortions: the squared distance of outputs, mean over the inputs."""
        whole, curves = trial.outputs({}, self.proxies), dict[str, list[float]]()
        for name, score in scores.items():
            curves[name], flat = [0.0], score.reshape(-1)
            for level in range(1, self.levels + 1):
                gone = lowest(flat, pruned_count(level / self.levels, flat.numel())).view(score.shape)
                moved = trial.outputs({name: weights[name].masked_fill(gone, 0.0)}, self.proxies) - whole
                curves[name].append(float(moved.square().sum(-1).mean()))
        return _ByDistortion(curves, self.bins)


@dataclass(frozen=True)
class _ByDistortion(Allocation):
    curves: Mapping[str, Sequence[float]]
    bins: int

    def keep(self, scores: Tensors, sparsity: float) -> dict[str, torch.Tensor]:
        """Return the mask that keeps exactly N - floor(s N) entries."""
        sizes = {name: s.numel() for name, s in scores.items()}
        least = {name: int(s.isneginf().sum()) for name, s in scores.items()}
        target = pruned_count(sparsity, sum(sizes.values()))
        gone = knapsack(sizes, {name: self.curves[name] for name in sizes}, target, bins=self.bins, least=least)
        return by_count(scores, {name: sizes[name] - gone[name] for name in sizes})
