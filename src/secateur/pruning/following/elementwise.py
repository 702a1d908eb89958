"""Calls that change each entry alone, and those that combine the entries of two values."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from secateur.errors import ModelError
from secateur.pruning.following.walk import Call, Walk, follows, places
from secateur.pruning.units import Flow

_MAPS = (
    *(
        "relu",
        "relu6",
        "leaky_relu",
        "rrelu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "hardswish",
        "hardsigmoid",
    ),
    *("sigmoid", "logsigmoid", "log_sigmoid", "softplus", "softsign", "tanh", "hardtanh", "tanhshrink", "hardshrink"),
    *("softshrink", "threshold", "clamp", "clamp_min", "clamp_max", "clip", "abs", "neg", "negative", "square", "sqrt"),
    *(
        "pow",
        "exp",
        "expm1",
        "log",
        "log1p",
        "reciprocal",
        "rsqrt",
        "sin",
        "cos",
        "atan",
        "erf",
        "sign",
        "round",
        "floor",
    ),
    *("nan_to_num", "gt", "ge", "lt", "le", "eq", "ne", "logical_not", "heaviside", "bitwise_not", "invert"),
)
_SAME = (
    *("dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"),
    *("contiguous", "clone", "detach", "to", "float", "double", "half", "bfloat16", "type", "type_as", "requires_grad"),
    *("data", "real", "cpu", "alias", "positive"),
)


@follows(*_SAME)
def same(walk: Walk, call: Call) -> Flow | None:
    """Follow a call that changes no zero."""
    return walk.flow(call.args[0] if call.args else call.get(0, "input"))


@follows(*_MAPS)
def mapped(walk: Walk, call: Call) -> Flow | None:
    """Follow a function of each entry; what it makes of zero is found by asking it."""
    x = call.get(0, "input")
    flow = walk.flow(x)
    if flow is None or len(call.tensors) > 1:
        raise ModelError("" if flow is not None else "it is not read by a layer alone")
    rest = {name: value for name, value in call.kwargs.items() if name != "input"}
    zero = call.function(torch.zeros(1, dtype=x.dtype), *call.args[1:], **rest)
    if not bool(zero.isfinite().all()):
        raise ModelError(f"{call.name} makes of zero what is not finite")
    return Flow(flow.labels, zero=flow.zero and not bool(zero.any()))


@follows("prelu")
def prelu(walk: Walk, call: Call) -> Flow | None:
    """Follow PReLU, whose slopes are one for all, or one for each channel, and go with it."""
    x, weight = call.get(0, "input"), call.get(1, "weight")
    flow = walk.flow(x)
    if flow is not None and weight.numel() > 1:
        walk.bind(weight, 0, flow.along(1, walk.units), "statistics")
    return flow


@follows("softmax", "softmin", "log_softmax", "cumsum", "normalize")
def along_other_dimensions(walk: Walk, call: Call) -> Flow | None:
    """Follow a call that mixes the entries along one dimension, if no units lie along it; zeros add to no length."""
    flow = walk.flow(call.get(0, "input"))
    if flow is not None and flow.zero and call.name == "normalize":
        return flow
    dim = call.kwargs.get(
        "dim", call.args[-1] if call.name == "cumsum" else call.args[1] if len(call.args) > 1 else None
    )
    if flow is None or not isinstance(dim, int) or dim % flow.labels.dim() in places(walk, flow):
        raise ModelError("")
    return Flow(flow.labels, zero=flow.zero and call.name == "cumsum")


@follows("glu")
def glu(walk: Walk, call: Call) -> Flow | None:
    """Follow a gate by the second half of the channels: each goes with the channel that it gates."""
    flow = walk.flow(call.get(0, "input"))
    if flow is None:
        return None
    value, gate = flow.labels.chunk(2, int(call.get(1, "dim", -1)))
    walk.units.join(value, gate)
    return Flow(value, zero=flow.zero)


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add, "iadd": operator.add, "radd": operator.add, "sub": operator.sub, "isub": operator.sub,
    "subtract": operator.sub, "rsub": lambda a, b: b - a, "maximum": torch.maximum, "minimum": torch.minimum,
    "fmax": torch.fmax, "fmin": torch.fmin,
}  # fmt: skip


@follows(*_BINARY)
def summed(walk: Walk, call: Call) -> Flow | None:
    """Follow a sum and the like: the units of both sides are the same, and zero if both are."""
    flows = _combined(walk, call, masked=True)
    zeros = [flow.zero for flow in flows if flow is not None]
    numbers = [part for part in (call.args[0], call.get(1, "other")) if not isinstance(part, torch.Tensor)]
    constant = any(bool(part) for part in numbers) or _spills(walk, call)
    return None if not zeros else Flow(_labels(walk, call, flows), zero=all(zeros) and not constant)


@follows("mul", "multiply", "imul", "rmul")
def product(walk: Walk, call: Call) -> Flow | None:
    """Follow a product: the units of both sides are the same, and zero if one is; a gate, a layer's scale."""
    flows = _combined(walk, call, masked=False)
    zeros = [flow.zero for flow in flows if flow is not None]
    return None if not zeros else Flow(_labels(walk, call, flows), zero=any(zeros))


@follows("div", "divide", "true_divide", "truediv", "itruediv")
def quotient(walk: Walk, call: Call) -> Flow | None:
    """Follow a quotient whose divisor has no units."""
    if walk.flow(call.args[1]) is not None:
        raise ModelError("")
    flows = _combined(walk, call, masked=False)
    return None if flows[0] is None else Flow(_labels(walk, call, flows), zero=flows[0].zero)


@follows("where", "masked_fill")
def chosen(walk: Walk, call: Call) -> Flow | None:
    """Follow a choice between two values, entry by entry: what is chosen is zero if both are."""
    parts = [*call.args, *(call.kwargs[name] for name in ("mask", "value", "input", "other") if name in call.kwargs)]
    if len(parts) != 3 or not isinstance(call.value, torch.Tensor):
        raise ModelError("")
    known = [flow for flow in map(walk.flow, parts) if flow is not None]
    for flow in known[1:]:
        _join(walk, known[0], flow)
    for lone in (part for part in parts if isinstance(part, torch.Tensor) and walk.flow(part) is None):
        _meet(walk, known[0], lone, masked=True)
    values = parts[1:] if call.name == "where" else parts[::2]
    flows = [walk.flow(value) for value in values]
    zeros = [
        value == 0 if isinstance(value, (int, float)) else f is not None and f.zero
        for value, f in zip(values, flows, strict=True)
    ]
    return Flow(walk.units.roots(known[0].labels.expand(call.value.shape)), zero=all(zeros))


def _combined(walk: Walk, call: Call, *, masked: bool) -> tuple[Flow | None, Flow | None]:
    """Join the units of two operands, and bind a parameter among them; return their flows.

    Args:
        walk, call: the call of two operands.
        masked: whether a parameter's entries must be pruned with a unit, to keep it zero.
    """
    one, other = call.args[0], call.get(1, "other")
    flows = walk.flow(one), walk.flow(other)
    known = [flow for flow in flows if flow is not None]
    if len(known) == 2:
        _join(walk, known[0], known[1])
    elif known:
        lone = other if flows[0] is not None else one
        if (
            isinstance(lone, torch.Tensor)
            and lone.shape == known[0].labels.shape
            and walk.filled(lone, known[0].labels)
        ):
            flows = (known[0], known[0])
        elif isinstance(lone, torch.Tensor):
            _meet(walk, known[0], lone, masked=masked)
    return flows


def _join(walk: Walk, one: Flow, other: Flow) -> None:
    """Join the units of two operands, which must lie along the same dimensions."""
    lying = [{p - len(f.labels.shape) for p in places(walk, f)} for f in (one, other)]
    if lying[0] != lying[1]:
        raise ModelError("it is combined with units along another dimension")
    walk.units.join(one.labels, other.labels, "it is added to what has no such units")


def _meet(walk: Walk, flow: Flow, lone: torch.Tensor, *, masked: bool) -> None:
    """Bind a parameter that units are combined with; refuse any other tensor that is as wide as they are."""
    lying = places(walk, flow)
    for place in lying:
        dim = place - flow.labels.dim() + lone.dim()
        if (
            dim < 0
            or lone.shape[dim] == 1
            or (len(lying) > 1 and not masked and not isinstance(lone, torch.nn.Parameter))
        ):
            continue  # a constant that scales the entries of units of many entries, such as positions of rotary heads
        if walk.name(lone) is None:
            raise ModelError("it is added to what has no such units")
        walk.bind(lone, dim, flow.along(place, walk.units), "incoming" if masked else "statistics")


def _labels(walk: Walk, call: Call, flows: tuple[Flow | None, Flow | None]) -> torch.Tensor:
    shapes = [flow.labels.expand(call.value.shape) for flow in flows if flow is not None]
    return walk.units.roots(shapes[0])


def _spills(walk: Walk, call: Call) -> bool:
    """Return whether an operand that is no unit's own adds something to all of them."""
    parts = [part for part in (call.args[0], call.get(1, "other")) if isinstance(part, torch.Tensor)]
    lying = [p - f.labels.dim() for f in map(walk.flow, parts) for p in places(walk, f) if f is not None]
    lone = [part for part in parts if walk.flow(part) is None]
    return any(-place > part.dim() or part.shape[place] == 1 for part in lone for place in lying)
