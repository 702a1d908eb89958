"""Calls that move entries and compute nothing: the labels are moved in the same way."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree

from secateur.errors import ModelError
from secateur.pruning.following.walk import Call, Walk, follows, places
from secateur.pruning.units import Flow, compact, varying

_MOVES = (
    *("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "permute", "transpose", "swapaxes"),
    *("swapdims", "movedim", "moveaxis", "t", "T", "mT", "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to"),
    *("repeat", "tile", "repeat_interleave", "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "getitem"),
    *("select", "narrow", "index_select", "flip", "roll", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
)


def _moved(call: Call, labels: torch.Tensor) -> Any:
    """Return what a call makes of labels instead of its first tensor."""
    if call.name in {"T", "mT"}:
        return getattr(labels, call.name)
    # a view of labels that are stored once for many entries needs a copy of them, as reshape makes it
    function = (
        torch.Tensor.reshape if call.name == "view" else torch.Tensor.reshape_as if call.name == "view_as" else None
    )
    return (function or call.function)(labels, *call.args[1:], **{k: v for k, v in call.kwargs.items() if k != "input"})


@follows(*_MOVES)
def moved(walk: Walk, call: Call) -> Any:
    """Follow a call that moves entries of one value."""
    x = call.get(0, "input")
    flow = walk.flow(x) or _of_parameter(walk, x)
    if flow is None or (call.name == "view" and isinstance(call.args[1], torch.dtype)):
        raise ModelError("")
    labels = _moved(call, walk.units.roots(flow.labels))
    return _pytree.tree_map(lambda part: Flow(compact(part), flow.zero), labels)


def _of_parameter(walk: Walk, x: torch.Tensor) -> Flow | None:
    """Return the flow of a bare parameter, such as a layer's scale: its units lie along its last dimension."""
    name, wide = walk.name(x), [d for d in range(x.dim()) if x.shape[d] > 1]
    if name is None or not isinstance(x, torch.nn.Parameter) or not wide:
        return None
    view = [1] * x.dim()
    view[wide[-1]] = -1
    return Flow(walk.make(x, wide[-1], "incoming").view(view).expand(x.shape))


@follows("pad")
def padded(walk: Walk, call: Call) -> Flow | None:
    """Follow padding; what is padded has no units, and is zero unless another value is given."""
    flow = walk.flow(call.args[0])
    if flow is None:
        return None
    mode, value = call.get(2, "mode", "constant"), call.get(3, "value")
    lying, pads = places(walk, flow), call.get(1, "pad")
    touched = {flow.labels.dim() - 1 - k // 2 for k, width in enumerate(pads) if width}
    if touched.isdisjoint(lying):
        labels = walk.units.roots(flow.labels)
        for dim in touched:
            labels = labels.narrow(dim, 0, 1).expand(
                *[-1] * dim, call.value.shape[dim], *[-1] * (labels.dim() - dim - 1)
            )
        return Flow(labels, flow.zero and not value)
    if mode != "constant":
        raise ModelError("")
    return Flow(compact(torch.nn.functional.pad(walk.units.roots(flow.labels), pads)), flow.zero and not value)


@follows("cat", "concat", "concatenate", "stack", "hstack")
def concatenated(walk: Walk, call: Call) -> Flow | None:
    """Follow a concatenation; along its other dimensions the values must keep the same units."""
    values = call.get(0, "tensors")
    flows = [walk.flow(value) or walk.filled(value) or _of_parameter(walk, value) for value in values]
    labels = [
        torch.zeros(value.shape, dtype=torch.int64) if flow is None else walk.units.roots(flow.labels)
        for value, flow in zip(values, flows, strict=True)
    ]
    rest = {name: value for name, value in call.kwargs.items() if name not in {"tensors", "out"}}
    joined = call.function(labels, *call.args[1:], **rest)
    dim = 0 if call.name == "hstack" and values[0].dim() == 1 else 1 if call.name == "hstack" else call.get(1, "dim", 0)
    along = dim % joined.dim()
    first = compact(joined.narrow(along, 0, 1))
    for other in varying(first):
        if other != along:
            line = joined.movedim(other, -1)
            walk.units.join(line, line[(slice(0, 1),) * (line.dim() - 1)])
    if not varying(first) and set(varying(compact(joined))) - {along}:
        walk.units.fix(joined, "it is joined to what has no such units")
    return Flow(compact(joined), all(flow is None or flow.zero for flow in flows))
