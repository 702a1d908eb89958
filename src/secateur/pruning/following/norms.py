"""Normalisation: its scale and shift go with the channel, as do running statistics."""

from __future__ import annotations

from secateur.errors import ModelError
from secateur.pruning.following.walk import Call, Walk, follows
from secateur.pruning.units import Flow


@follows("batch_norm", "instance_norm")
def by_channel(walk: Walk, call: Call) -> Flow | None:
    """Follow a norm of each channel alone; pruned scale and shift make a channel zero whatever enters it."""
    flow = walk.flow(call.get(0, "input"))
    if flow is None:
        return None
    labels, weight = flow.along(1, walk.units), call.get(3, "weight")
    walk.bind(weight, 0, labels)
    walk.bind(call.get(4, "bias"), 0, labels)
    for part in (call.get(1, "running_mean"), call.get(2, "running_var")):
        walk.bind(part, 0, labels, "statistics")
    if weight is None and call.get(1, "running_mean") is None:  # no tensor tells its size
        walk.count(call.owner, "num_features", labels)
    centred = call.name == "instance_norm" and call.get(1, "running_mean") is None and flow.zero
    return Flow(walk.units.roots(flow.labels), zero=weight is not None or centred)


@follows("group_norm")
def by_group(walk: Walk, call: Call) -> Flow | None:
    """Follow group norm, whose slim layer counts the channels that are gone as zeros."""
    flow, weight = walk.flow(call.get(0, "input")), call.get(2, "weight")
    if flow is None:
        return None
    if weight is None or not flow.zero:
        raise ModelError("")
    labels = flow.along(1, walk.units)
    walk.bind(weight, 0, labels)
    walk.bind(call.get(3, "bias"), 0, labels)
    return Flow(walk.units.roots(flow.labels))
