"""Networks for graphs; a row is a node with its neighbourhood."""

from __future__ import annotations

import torch
from torch import nn

from secateur.errors import ModelError


class GCN(nn.Module):
    """Two graph convolutions and a linear layer for the first node of each neighbourhood (``communities``).

    Reference: Kipf and Welling, arXiv 1609.02907; as used by FED-PUB, arXiv 2206.10206.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, *, hidden: int = 128) -> None:
        """Make convolutions of ``hidden`` features; a row is (nodes, features + nodes), see ``data.graphs``."""
        if len(input_shape) != 2 or input_shape[1] <= input_shape[0]:
            raise ModelError(f"a graph model needs rows of (nodes, features + nodes), the data has {input_shape}")
        super().__init__()
        self.features = input_shape[1] - input_shape[0]
        self.conv1 = nn.Linear(self.features, hidden)
        self.conv2 = nn.Linear(hidden, hidden)
        self.fc = nn.Linear(hidden, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits; each layer is D^-1/2 A D^-1/2 X W, A with self-loops."""
        edges = x[..., self.features :]
        scale = edges.sum(-1).clamp(min=1).rsqrt()
        around = scale[..., None] * edges * scale[..., None, :]
        hidden = torch.relu(around @ self.conv1(x[..., : self.features]))
        hidden = torch.relu(around @ self.conv2(hidden))
        logits: torch.Tensor = self.fc(hidden[:, 0])
        return logits
