"""Networks for rows of features, and for flattened images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import nn


class MLP(nn.Sequential):
    """Linear layers with ReLU; 784-128-128-10 is FedSparsify's Fashion-MNIST network (118,282 parameters).

    Reference: FedSparsify, arXiv 2204.12430.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, *, hidden: Sequence[int] = (128, 128)) -> None:
        """Make one hidden layer for each width in ``hidden``."""
        super().__init__()
        self.flatten = nn.Flatten()
        sizes = [math.prod(input_shape), *hidden]
        for n, (entering, leaving) in enumerate(itertools.pairwise(sizes), start=1):
            self.add_module(f"fc{n}", nn.Linear(entering, leaving))
            self.add_module(f"relu{n}", nn.ReLU())
        self.add_module(f"fc{len(sizes)}", nn.Linear(sizes[-1], outputs))
