"""Holding out a test part of data that have none."""

from __future__ import annotations

import numpy as np
import torch

from secateur.streams import stream


def hold_out(y: np.ndarray, seed: int, fraction: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Return (train rows, test rows): a seeded ``fraction`` of each class for the test.

    At least one row of a class is held out, unless it is the only one.
    """
    generator = stream(seed, "hold out")
    test = []
    for label in np.unique(y):
        rows = np.flatnonzero(y == label)
        order = torch.randperm(len(rows), generator=generator).numpy()
        test.append(rows[order[: min(len(rows) - 1, max(1, round(fraction * len(rows))))]])
    chosen = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(y)), chosen), chosen
