"""Linear layers, convolutions, transposed convolutions, embeddings: layers that make units of those that they read."""

from __future__ import annotations

import torch

from secateur.errors import ModelError
from secateur.pruning.following.walk import Call, Walk, follows
from secateur.pruning.units import Flow


def made(labels: torch.Tensor, value: torch.Tensor, dim: int) -> Flow:
    """Return the flow of a value with these labels along a dimension."""
    view = [1] * value.dim()
    view[dim] = -1
    return Flow(labels.view(view).expand(value.shape))


@follows("linear")
def linear(walk: Walk, call: Call) -> Flow:
    """Follow ``linear``: weight (outputs, inputs)."""
    x, weight, bias = call.get(0, "input"), call.get(1, "weight"), call.get(2, "bias")
    walk.named(weight)
    walk.read(weight, 1, x, -1)
    labels = walk.make(weight)
    walk.bind(bias, 0, labels)
    return made(labels, call.value, -1)


@follows("conv1d", "conv2d", "conv3d")
def convolution(walk: Walk, call: Call) -> Flow:
    """Follow a convolution: weight (outputs, inputs of a group, ...); of several groups each is one unit."""
    x, weight, bias = call.get(0, "input"), call.get(1, "weight"), call.get(2, "bias")
    groups = int(call.get(6, "groups", 1))
    walk.named(weight)
    _needs_batch(x, weight)
    if groups == 1:
        walk.read(weight, 1, x, 1)
        labels = walk.make(weight)
    else:
        labels = _grouped(walk, x, weight, groups)
    walk.bind(bias, 0, labels)
    return made(labels, call.value, 1)


def _grouped(walk: Walk, x: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
    flow, each = walk.flow(x), len(weight) // groups
    if flow is None:
        raise ModelError("the groups of a convolution that reads the model's input stay")
    inputs = flow.along(1, walk.units).view(groups, -1)
    if inputs.shape[1] > 1:
        walk.units.join(inputs, inputs[:, :1])
    if inputs.shape[1] > 1 or not flow.zero:
        walk.units.audible += [] if flow.zero else [inputs.reshape(-1)]
        labels = walk.make(weight).view(groups, each)
        walk.units.join(labels, inputs[:, :1])
        return labels.reshape(-1)
    labels = inputs.repeat_interleave(each, 1).reshape(-1)
    walk.bind(weight, 0, labels)
    walk.units.alone[walk.named(weight).rpartition(".")[0]] = labels
    return labels


@follows("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed(walk: Walk, call: Call) -> Flow:
    """Follow a transposed convolution: weight (inputs, outputs of a group, ...)."""
    x, weight, bias = call.get(0, "input"), call.get(1, "weight"), call.get(2, "bias")
    groups = int(call.get(6, "groups", 1))
    walk.named(weight)
    _needs_batch(x, weight)
    if groups == 1:
        walk.read(weight, 0, x, 1)
        labels = walk.make(weight, 1)
    else:
        flow = walk.flow(x)
        if flow is None or len(weight) != groups or weight.shape[1] != 1 or not flow.zero:
            raise ModelError("the groups of a transposed convolution stay")
        labels = flow.along(1, walk.units)
        walk.bind(weight, 0, labels)
    walk.bind(bias, 0, labels)
    return made(labels, call.value, 1)


def _needs_batch(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() != weight.dim():
        raise ModelError("it is read without a batch dimension")


@follows("embedding")
def embedding(walk: Walk, call: Call) -> Flow:
    """Follow ``embedding``: weight (entries, width); its units are the width."""
    weight = call.get(1, "weight")
    labels = walk.make(weight, 1)
    return made(labels, call.value, -1)
