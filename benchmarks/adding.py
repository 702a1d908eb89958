"""What it costs to add models up in blocks, so that no order of arrival changes a bit.

    python benchmarks/adding.py

Forty models of 1.7 M weights, weighted by rows, are added up in float64: one after the other within a block, then the
blocks in order. Beside it stand integers on a grid of powers of two, which any order adds up to the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

WEIGHTS, MODELS, GRID = 1_700_000, 40, 2.0**40


def in_blocks(models: list[torch.Tensor], block: int) -> torch.Tensor:
    """Return the sum of models, weighted by 60, 61, ... rows, in blocks."""
    total: torch.Tensor | None = None
    for start in range(0, MODELS, block):
        part: torch.Tensor | None = None
        for k in range(start, min(MODELS, start + block)):
            term = models[k % len(models)].to(torch.float64).mul_(60 + k)
            part = term if part is None else part.add_(term)
        total = part if total is None or part is None else total.add_(part)
    return torch.zeros(0) if total is None else total


def on_a_grid(models: list[torch.Tensor]) -> torch.Tensor:
    """Return the same sum in integers, each of them a multiple of 2^-40."""
    total = torch.zeros(WEIGHTS, dtype=torch.int64)
    for k in range(MODELS):
        total += (models[k % len(models)].to(torch.float64) * ((60 + k) * GRID)).round_().to(torch.int64)
    return total


def times(add: Callable[[], torch.Tensor]) -> str:
    """Return the seconds of three repetitions."""
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        add()
        seconds.append(time.perf_counter() - begun)
    return " ".join(f"{one:.3f}" for one in seconds)


def main() -> None:
    """Print a line for each size of block, and one for the grid."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    models = [torch.randn(WEIGHTS, generator=draw) * 0.05 for _ in range(8)]
    for block in (1, 2, 4, 8, 16, 40):
        print(f"blocks of {block}: {times(lambda block=block: in_blocks(models, block))} s")  # type: ignore[misc]
    print(f"integers on a grid: {times(lambda: on_a_grid(models))} s")


if __name__ == "__main__":
    main()
