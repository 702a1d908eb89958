"""Weight clustering: each weight of a tensor is one of a few centroids, and is sent as the index of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from secateur.pruning.mask import Tensors


def quantile_centroids(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return ``count`` ascending centroids at even quantiles of the values, shape (count,); float32.

    >>> quantile_centroids(torch.tensor([3.0, 0.0, 1.0, 2.0]), 2)
    tensor([1., 3.])
    """
    ordered = values.detach().reshape(-1).float().sort().values
    places = ((torch.arange(count, dtype=torch.float64) + 0.5) / count * ordered.numel()).long()
    return ordered[places.clamp(max=ordered.numel() - 1)].clone()


def nearest(values: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return which of the ascending centroids is nearest to each value, shape of ``values``; int64."""
    centroids = centroids.detach()
    return torch.bucketize(values.detach().contiguous(), (centroids[1:] + centroids[:-1]) / 2)


def lloyd(values: torch.Tensor, centroids: torch.Tensor, steps: int = 8) -> torch.Tensor:
    """Return ascending centroids after some steps of Lloyd's algorithm; a centroid without values stays."""
    flat, centroids = values.detach().reshape(-1).double(), centroids.detach().double().sort().values
    for _ in range(steps):
        near = nearest(flat, centroids)
        counts = torch.bincount(near, minlength=len(centroids))
        sums = torch.bincount(near, weights=flat, minlength=len(centroids))
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids).sort().values
    return centroids.float()


def clustering_losses(weight: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses sum_i (w_i - mu_near(i))^2 with a gradient for weights alone, and one for centroids alone.

    The second is the mean over each centroid's weights, summed over centroids: a gradient step of 1/2 moves each
    centroid to the mean of its weights.
    """
    flat, order = weight.reshape(-1), centroids.sort().values
    near = nearest(flat, order)
    each = torch.bincount(near, minlength=len(order)).clamp(min=1)
    means = ((flat.detach() - order[near]).square() / each[near]).sum()
    return (flat - order.detach()[near]).square().sum(), means


CODEBOOK = "codebook."
_BIT = "bit"


def without_codebooks(scores: Tensors) -> dict[str, torch.Tensor]:
    """Return the tensors that are no codebooks."""
    return {name: tensor for name, tensor in scores.items() if not name.startswith(CODEBOOK)}


def clustering_penalty(scores: Tensors, beta: float) -> torch.Tensor:
    """Return the clustering loss of weights, times beta, plus that of centroids; see ``clustering_losses``."""
    total = torch.zeros(())
    for name, centroids in scores.items():
        if name.startswith(CODEBOOK):
            weights, means = clustering_losses(scores[name.removeprefix(CODEBOOK)], centroids)
            total = total + beta * weights + means
    return total


def codebooks(weights: Tensors, learnt: Tensors, room: int) -> dict[str, torch.Tensor]:
    """Return the codebook of each weight: learnt centroids, settled, the last one repeated up to ``room`` entries."""
    padded = {}
    for name, centroids in learnt.items():
        if name.startswith(CODEBOOK):
            middle = lloyd(weights[name.removeprefix(CODEBOOK)], centroids)
            padded[name.removeprefix(CODEBOOK)] = torch.cat([middle, middle[-1:].expand(room - len(middle))])
    return padded


def width(count: int) -> int:
    """Return the number of bits of an index below ``count``."""
    return max(1, (count - 1).bit_length())


def planes(shapes: Mapping[str, tuple[int, ...]], bits: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the bit planes of clustered tensors, eight weights to a byte."""
    sizes = {name: -(-torch.Size(shape).numel() // 8) for name, shape in shapes.items()}
    return {f"{_BIT}{bit}.{name}": (size,) for name, size in sizes.items() for bit in range(bits)}


def quantised(tensors: Tensors, codebooks: Tensors, bits: int) -> dict[str, torch.Tensor]:
    """Return tensors in which each one with a codebook is replaced by the codebook and by bit planes of indices.

    ``bits`` is the number of planes, enough for the indices of every codebook; see ``width``.
    """
    coded: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name not in codebooks:
            coded[name] = tensor
            continue
        near = nearest(tensor, codebooks[name]).reshape(-1)
        wide = torch.nn.functional.pad(near, (0, -near.numel() % 8)).view(-1, 8)
        for bit in range(bits):
            coded[f"{_BIT}{bit}.{name}"] = ((wide >> bit & 1) << torch.arange(8)).sum(1).to(torch.uint8)
        coded[CODEBOOK + name] = codebooks[name]
    return coded


def dequantised(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Return the tensors that ``quantised`` replaced, each weight at its centroid; an index too large is the last."""
    decoded = {name: tensor for name, tensor in tensors.items() if name in shapes}
    for name, codebook in tensors.items():
        if not name.startswith(CODEBOOK):
            continue
        weight = name.removeprefix(CODEBOOK)
        count = torch.Size(shapes[weight]).numel()
        near, bit = torch.zeros(count, dtype=torch.long), 0
        while (plane := tensors.get(f"{_BIT}{bit}.{weight}")) is not None:
            near += ((plane.long()[:, None] >> torch.arange(8) & 1).reshape(-1)[:count]) << bit
            bit += 1
        decoded[weight] = codebook[near.clamp(max=len(codebook) - 1)].view(shapes[weight])
    return {name: decoded[name] for name in shapes if name in decoded}
