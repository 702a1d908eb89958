"""Models with clustered weights: their tensors on the wire, and the parameters that are trained."""

from __future__ import annotations

import torch

from secateur.contract.reply import Reply, Sent
from secateur.contract.state import Setting
from secateur.pruning.clustering import CODEBOOK, dequantised, lloyd, planes, quantile_centroids, width
from secateur.pruning.mask import Tensors
from secateur.wire.message import Spec


def specs(setting: Setting, count: int, room: int) -> dict[str, Spec]:
    """Return the tensors of a message with a model of ``count`` values a tensor, in codebooks of ``room`` entries."""
    names = setting.layout.names("weight")
    tensors = {name: setting.specs[name].shape for name in names}
    return {
        **{name: spec for name, spec in setting.specs.items() if name not in names},
        **{name: Spec(shape, torch.uint8) for name, shape in planes(tensors, width(count)).items()},
        **{CODEBOOK + name: Spec((room,), torch.float32) for name in names},
    }


def start(weights: Tensors, count: int, setting: Setting) -> dict[str, torch.Tensor]:
    """Return the tensors to train: a model's parameters, and ``count`` centroids of each weight tensor."""
    parameters = {name: weights[name] for name in setting.layout.trainable}
    names = setting.layout.names("weight")
    return parameters | {
        CODEBOOK + name: lloyd(weights[name], quantile_centroids(weights[name], count)) for name in names
    }


def dequantised_model(reply: Reply, sent: Sent) -> Tensors:
    """Return the weights of a reply that holds clustered tensors."""
    return dequantised(reply.tensors, shapes(sent.setting))


def shapes(setting: Setting) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of the model."""
    return {name: spec.shape for name, spec in setting.specs.items()}
