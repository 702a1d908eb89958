"""Attention: its units are heads."""

from __future__ import annotations

from secateur.errors import ModelError
from secateur.pruning.following.walk import Call, Walk, follows, places
from secateur.pruning.units import Flow


@follows("scaled_dot_product_attention")
def attended(walk: Walk, call: Call) -> Flow | None:
    """Follow attention of queries, keys and values of shape (batch, heads, steps, width of a head)."""
    flows = [walk.flow(call.get(index, name)) for index, name in enumerate(("query", "key", "value"))]
    known = [flow for flow in flows if flow is not None]
    if len(known) < 3 or any(places(walk, flow)[:1] != (1,) or flow.labels.dim() != 4 for flow in known):
        raise ModelError("its heads do not match")
    lines = [flow.along(1, walk.units) for flow in known]
    for line in lines[1:]:
        if line.shape != lines[0].shape:
            raise ModelError("its heads do not match")
        walk.units.join(lines[0], line)
    walk.units.heads.append(lines[0])
    return Flow(walk.units.roots(lines[0]).view(1, -1, 1, 1).expand(call.value.shape), known[2].zero)
