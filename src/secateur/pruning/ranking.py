"""Rankings: the rank of each entry of a tensor, and rankings as bytes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from secateur.pruning.mask import Tensors


def ranked(scores: torch.Tensor) -> torch.Tensor:
    """Return the rank of each entry, from 0 for the lowest; ties by index; int32 of the same shape.

    >>> ranked(torch.tensor([0.5, 0.1, 0.5])).tolist()
    [1, 0, 2]
    """
    order = scores.reshape(-1).argsort(stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).int().reshape(scores.shape)


def planes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the byte planes of rankings of tensors of these shapes, lowest byte first."""
    return {f"{name}@{byte}": shape for name, shape in shapes.items() for byte in range(_width(shape))}


def packed(ranks: Tensors) -> dict[str, torch.Tensor]:
    """Return rankings as byte planes (uint8), named as ``planes`` says."""
    return {
        f"{name}@{byte}": (rank.int() >> 8 * byte & 255).to(torch.uint8)
        for name, rank in ranks.items()
        for byte in range(_width(tuple(rank.shape)))
    }


def unpacked(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Return the rankings of ``packed`` planes; other planes give numbers within the tensor's size."""
    found = {}
    for name, shape in shapes.items():
        rank = torch.zeros(shape, dtype=torch.int32)
        for byte in range(_width(shape)):
            rank += tensors[f"{name}@{byte}"].int() << 8 * byte
        found[name] = rank.clamp(max=rank.numel() - 1)
    return found


def _width(shape: tuple[int, ...]) -> int:
    """Return the number of bytes of the largest rank."""
    return max(1, -(-(torch.Size(shape).numel() - 1).bit_length() // 8))


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
