"""Calls that combine positions: pools, interpolation, means and sums."""

from __future__ import annotations

import torch

from secateur.errors import ModelError
from secateur.pruning.following.walk import Call, Walk, follows, places
from secateur.pruning.units import Flow

_POOLS = (
    *(f"{kind}_pool{dims}d" for kind in ("max", "avg", "lp", "adaptive_avg", "adaptive_max") for dims in (1, 2, 3)),
    *("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices"),
    *(
        "adaptive_max_pool2d_with_indices",
        "interpolate",
        "upsample",
        "upsample_nearest",
        "upsample_bilinear",
        "grid_sample",
    ),
)


@follows(*_POOLS)
def pooled(walk: Walk, call: Call) -> Flow | list[Flow | None] | None:
    """Follow a call that combines positions of each channel: what is zero everywhere stays zero."""
    flow = walk.flow(call.get(0, "input"))
    several = isinstance(call.value, (tuple, list))
    value = call.value[0] if several else call.value
    if flow is None or value.dim() != flow.labels.dim() or not set(places(walk, flow)) <= {0, 1} or value.dim() < 3:
        raise ModelError("")
    line = flow.along(1, walk.units).view(1, -1, *[1] * (value.dim() - 2))
    if line.shape[1] != value.shape[1]:
        raise ModelError("")
    found = Flow(line.expand(value.shape), flow.zero)
    return [found, None] if several else found


@follows(
    "mean", "sum", "nansum", "amax", "amin", "max", "min", "var", "std", "norm", "vector_norm", "logsumexp", "median"
)
def reduced(walk: Walk, call: Call) -> Flow | list[Flow | None] | None:
    """Follow a call that combines all positions along some dimensions; units must lie along another."""
    x = call.get(0, "input")
    flow = walk.flow(x)
    position = 2 if call.name in {"norm", "vector_norm"} else 1
    dims = call.get(position, "dim", call.kwargs.get("axis"))
    if call.name in {"max", "min"} and isinstance(dims, torch.Tensor):
        raise ModelError("")
    if flow is None or dims is None:
        raise ModelError("")
    gone = sorted({d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}, reverse=True)
    lying = set(places(walk, flow))
    if lying and lying <= set(gone):
        if flow.zero and call.name in {"sum", "nansum", "norm", "vector_norm"}:  # zeros add nothing
            return None
        raise ModelError("")
    several = not isinstance(call.value, torch.Tensor)
    keeps = (call.value[0] if several else call.value).dim() == x.dim()
    labels = walk.units.roots(flow.labels)
    for dim in gone:
        if dim in lying:  # what is combined is one unit
            walk.units.join(labels, labels.narrow(dim, 0, 1))
        labels = labels.narrow(dim, 0, 1) if keeps else labels.select(dim, 0)
    found = Flow(labels, flow.zero and call.name != "logsumexp")
    return [found, None] if several else found
