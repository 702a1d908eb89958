"""Networks for text."""

from __future__ import annotations

import torch
from torch import nn

from secateur.errors import ModelError


class CharLSTM(nn.Module):
    """Next-character model: embedding of 8, two LSTM layers of 256, the last step's state to one linear layer.

    819,920 parameters for a vocabulary of 80. The vocabulary is 80, or as large as the outputs where they are
    more: the outputs of next-character data are its symbols.

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
