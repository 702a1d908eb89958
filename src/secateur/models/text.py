"""Networks for text."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from secateur.errors import ModelError


class CharLSTM(nn.Module):
    """Next-character model: embedding of 8, two LSTM layers of 256, the last step's state to one linear layer.

    819,920 parameters for a vocabulary of 80. The vocabulary has 80 symbols, or as many as there are outputs if that is
    more.

    Reference: LEAF, arXiv 1812.01097; as used by AutoFLIP, arXiv 2405.10271.
    """

    def __init__(
        self, input_shape: tuple[int, ...], outputs: int, *,
        vocabulary: int | None = None, embedding: int = 8, hidden: int = 256,
    ) -> None:  # fmt: skip
        """Make the network for inputs of shape (characters,), integers below ``vocabulary``."""
        if len(input_shape) != 1:
            raise ModelError(f"charlstm needs inputs (characters,), the data has {input_shape}")
        super().__init__()
        self.embedding = nn.Embedding(vocabulary or max(80, outputs), embedding)
        self.lstm = nn.LSTM(embedding, hidden, num_layers=2, batch_first=True)
        self.fc = nn.Linear(hidden, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, characters) to logits (batch, outputs)."""
        states, _ = self.lstm(self.embedding(x))
        logits: torch.Tensor = self.fc(states[:, -1])
        return logits


class _Attention(nn.Module):
    """Causal self-attention; the number of heads follows from the layers' width, so that heads can be cut out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head = width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: torch.Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class _EncoderBlock(nn.Module):
    """Attention and a feed-forward layer, each with a layer norm before it and a residual connection around it."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.fc1, self.relu, self.fc2 = nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        result: torch.Tensor = x + self.fc2(self.relu(self.fc1(self.norm2(x))))
        return result


class CharTransformer(nn.Module):
    """Next-character model: embedding, learned positions, pre-norm encoder blocks, the last step to one linear layer.

    Heads, feed-forward neurons and whole blocks can be removed; the width of the residual stream stays.

    Reference: Vaswani et al., arXiv 1706.03762; norms before the layers: Xiong et al., arXiv 2002.04745.
    """

    def __init__(
        self, input_shape: tuple[int, ...], outputs: int, *,
        vocabulary: int | None = None, width: int = 64, heads: int = 4, hidden: int = 256, depth: int = 2,
    ) -> None:  # fmt: skip
        """Make the network for inputs of shape (characters,), integers below ``vocabulary``."""
        if len(input_shape) != 1:
            raise ModelError(f"chartransformer needs inputs (characters,), the data has {input_shape}")
        if width % heads:
            raise ModelError(f"chartransformer: width {width} is not a multiple of {heads} heads")
        super().__init__()
        self.embedding = nn.Embedding(vocabulary or max(80, outputs), width)
        self.positions = nn.Parameter(torch.zeros(input_shape[0], width))
        self.blocks = nn.Sequential(*(_EncoderBlock(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, characters) to logits (batch, outputs)."""
        states = self.blocks(self.embedding(x) + self.positions)
        logits: torch.Tensor = self.fc(self.norm(states[:, -1]))
        return logits
