"""Every network of the package, small, with its layout; random parts of them."""

import copy
import functools

import torch

from secateur import models
from secateur.pruning import mask as masks
from secateur.pruning.discovery import layout

SMALL = {
    "smallcnn": ((1, 8, 8), {"width": 4, "features": 6}),
    "twocnn": ((1, 12, 12), {"hidden": 4, "features": 10}),
    "femnistcnn": ((1, 12, 12), {"hidden": 3, "features": 10}),
    "mlp": ((1, 4, 4), {}),
    "resnet20": ((3, 8, 8), {"width": 6, "groups": 3}),
    "resnet18": ((3, 8, 8), {"width": 4}),
    "sparsifycnn": ((3, 8, 8), {"dropout": 0.0}),
    "vgg16": ((3, 32, 32), {}),
    "charlstm": ((6,), {"hidden": 7}),
    "chartransformer": ((6,), {"width": 12, "heads": 3, "hidden": 8}),
}
SLOW = {"vgg16", "sparsifycnn"}


@functools.cache
def network(name):
    """Return a network whose every tensor is away from its initial zero or one, and its layout."""
    shape, options = SMALL[name]
    model = models.build(name, input_shape=shape, outputs=3, tokens=name.startswith("char"), options=options)
    draw = torch.Generator().manual_seed(7)
    for tensor in model.state_dict().values():
        if tensor.dim() == 1 and tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
    return model, layout(model, example=inputs(name)[:1])


def inputs(name, rows=2):
    shape = SMALL[name][0]
    return torch.randint(0, 80, (rows, *shape)) if name.startswith("char") else torch.randn(rows, *shape)


def drawn(found, seed, drop):
    """Return flags that keep each unit with probability 1 - drop, and at least one of each layer."""
    draw = torch.Generator().manual_seed(seed)
    keep = {g.name: torch.rand(g.units, generator=draw) >= drop for g in found.groups}
    for group in found.groups:
        if group.kind != "block" and not keep[group.name].any():
            keep[group.name][0] = True
    return keep


def masked(model, mask):
    pruned = copy.deepcopy(model)
    pruned.load_state_dict(masks.apply(model.state_dict(), mask), strict=False)
    return pruned


def shapes(model):
    return {n: tuple(t.shape) for n, t in model.state_dict().items()}
