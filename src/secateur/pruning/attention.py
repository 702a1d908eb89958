"""Attention with fewer heads than its width implies: what is left of torch's multi-head layer without some heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from secateur.pruning.structure import Cut

PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")
"""The parameters of torch's layer that make queries, keys and values."""


class SlimMultiheadAttention(nn.Module):
    """Multi-head attention of the kept heads of a ``nn.MultiheadAttention``; names of its tensors stay.

    torch's own layer divides its width by the number of heads, so it cannot hold fewer heads of the same width. Weights
    of attention are returned as the dense layer with masked heads returns them.

    Shapes: as torch's layer with a batch, (batch, steps, width) or steps first.
    """

    _qkv_same_embed_dim = False
    """Read by torch's encoder layers, whose fast kernel takes heads of the dense width only."""

    embed_dim: int
    dropout: float
    batch_first: bool
    head_dim: int
    num_heads: int
    dense_heads: int
    kept: tuple[int, ...]
    out_proj: nn.Linear
    in_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None

    def __init__(
        self,
        dense: nn.MultiheadAttention | SlimMultiheadAttention,
        cut: Cut | None,
        tensors: Mapping[str, torch.Tensor],
    ) -> None:
        """Make the layer.

        Args:
            dense: the layer whose heads are removed; its output layer is taken as it is.
            cut: the cut of ``in_proj_weight`` or ``q_proj_weight``, which says which heads stay; None for all.
            tensors: what is left of its projections, by their names in it.
        """
        super().__init__()
        self.embed_dim, self.dropout, self.batch_first = dense.embed_dim, dense.dropout, dense.batch_first
        self.head_dim, self.out_proj = dense.head_dim, dense.out_proj
        left = range(dense.num_heads * dense.head_dim) if cut is None else cut.kept
        heads = tuple(sorted({k // dense.head_dim for k in left if k < dense.num_heads * dense.head_dim}))
        self.num_heads, self.kept, self.dense_heads = len(heads), heads, dense.num_heads
        if isinstance(dense, SlimMultiheadAttention):
            self.kept, self.dense_heads = tuple(dense.kept[k] for k in heads), dense.dense_heads
        for name in PROJECTIONS:
            part = tensors.get(name)
            trained = part is not None and getattr(dense, name).requires_grad
            self.register_parameter(name, None if part is None else nn.Parameter(part, requires_grad=trained))

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True, attn_mask: torch.Tensor | None = None,  # noqa: FBT001, FBT002 -- as torch has it
        average_attn_weights: bool = True, is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Return the attended values, and the weights of attention if they are needed; arguments as torch's layer."""
        del is_causal  # a hint beside the mask that it needs
        parts = [part if self.batch_first else part.transpose(0, 1) for part in (query, key, value)]
        q, k, v = (
            part.reshape(part.shape[0], part.shape[1], -1, self.head_dim).transpose(1, 2)
            for part in self._projected(*parts)
        )
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        heads = functional.scaled_dot_product_attention(q, k, v, self._of_kept(mask), dropout_p=dropout)
        found: torch.Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        found = found if self.batch_first else found.transpose(0, 1)
        if not need_weights:
            return found, None
        weights = functional.dropout(self._weights(q, k, mask), self.dropout, self.training)
        return found, weights.mean(1) if average_attn_weights else weights

    def _weights(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return the weights of all dense heads; those of a masked head follow from the mask alone."""
        scores = q.new_zeros(q.shape[0], self.dense_heads, q.shape[2], k.shape[2])
        scores[:, list(self.kept)] = q @ k.transpose(-2, -1) / self.head_dim**0.5
        return torch.softmax(scores if mask is None else scores + mask, -1)

    def _of_kept(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        return mask if mask is None or mask.dim() < 4 or mask.shape[1] == 1 else mask[:, list(self.kept)]

    def _projected(self, *parts: torch.Tensor) -> list[torch.Tensor]:
        width = self.num_heads * self.head_dim
        thirds = [slice(n * width, (n + 1) * width) for n in range(3)]
        if self.in_proj_weight is None:
            weights: list[Any] = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        else:
            weights = [self.in_proj_weight[third] for third in thirds]
        biases = [None if self.in_proj_bias is None else self.in_proj_bias[third] for third in thirds]
        return [functional.linear(*part) for part in zip(parts, weights, biases, strict=True)]

    def _mask(
        self, attention: torch.Tensor | None, padding: torch.Tensor | None, q: torch.Tensor
    ) -> torch.Tensor | None:
        """Return the sum of both masks, which broadcasts to (batch, dense heads, steps, keys); -inf hides a key."""
        if attention is not None and attention.dim() == 3:
            attention = attention.reshape(-1, self.dense_heads, *attention.shape[1:])
        if padding is not None:
            padding = padding.view(-1, 1, 1, padding.shape[-1])
        parts = [
            torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else mask
            for mask in (attention, padding)
            if mask is not None
        ]
        return sum(parts[1:], start=parts[0]) if parts else None
