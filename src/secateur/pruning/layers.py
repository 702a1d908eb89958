"""Tables of what torch's layers and calls do to channels, for walks over a trace."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import fx, nn
from torch.nn import functional

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # noqa: SLF001 -- torch's own base class
WEIGHTED = (
    *(nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd),  # noqa: SLF001 -- torch's own base class
    *(nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Embedding, nn.EmbeddingBag),
)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d),
)
POINTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Identity),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
POINTWISE_CALLS = {
    *(torch.relu, functional.relu, functional.gelu, functional.silu, torch.tanh, functional.dropout),
    *("relu", "tanh", "contiguous"),
}
POOL_CALLS = {functional.max_pool2d, functional.avg_pool2d, functional.adaptive_avg_pool2d}
SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
GATES: Mapping[type, int] = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}
ATTENTION = functional.scaled_dot_product_attention
KEEPS_ZERO = {"flatten", "view", "reshape", "unflatten", "transpose", "mean", ATTENTION.__name__}


def called(node: fx.Node) -> str:
    """Return the name of what a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
