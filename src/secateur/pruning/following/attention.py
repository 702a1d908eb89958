"""Attention: its units are heads; a head that several queries share is one unit with them."""

from __future__ import annotations

from secateur.errors import ModelError
from secateur.pruning.following.convolutions import made
from secateur.pruning.following.products import contracted
from secateur.pruning.following.walk import Call, Walk, follows
from secateur.pruning.units import Flow


@follows("scaled_dot_product_attention")
def attended(walk: Walk, call: Call) -> Flow | None:
    """Follow attention of queries, keys and values of shape (..., heads, steps, width of a head)."""
    query, key, value = (call.get(index, name) for index, name in enumerate(("query", "key", "value")))
    flows = [walk.flow(part) for part in (query, key, value)]
    if call.kwargs.get("enable_gqa"):
        flows[1:] = [_shared(walk, flow, query.shape[-3]) for flow in flows[1:]]
    lead = "defghij"[: query.dim() - 2]
    scores = contracted(
        walk, (flows[0], flows[1]), (f"{lead}qw", f"{lead}kw"), f"{lead}qk", query.shape[:-1] + key.shape[-2:-1]
    )
    mask = walk.flow(call.get(3, "attn_mask"))
    if mask is not None and scores is not None:
        walk.units.join(scores.labels, mask.labels)
    weights = None if scores is None else Flow(scores.labels, zero=False)
    return contracted(walk, (weights, flows[2]), (f"{lead}qk", f"{lead}kv"), f"{lead}qv", call.value.shape)


def _shared(walk: Walk, flow: Flow | None, heads: int) -> Flow | None:
    """Return the flow of keys or values with one head for each of the queries."""
    if flow is None:
        return None
    labels = walk.units.roots(flow.labels)
    return Flow(labels.repeat_interleave(heads // labels.shape[-3], -3), flow.zero)


@follows("multi_head_attention_forward")
def multihead(walk: Walk, call: Call) -> list[Flow | None]:
    """Follow ``nn.MultiheadAttention``, which has all heads of queries, keys and values along one weight or three."""
    query, key, value, _, heads = call.args[:5]
    weight, bias, output, output_bias = call.args[5], call.args[6], call.args[11], call.args[12]
    if any(call.args[7:10]) if call.args[7] is None else True:
        raise ModelError("heads whose keys get a row that is learnt, or zero, stay")
    parts = [weight] * 3 if weight is not None else [call.kwargs[f"{part}_proj_weight"] for part in "qkv"]
    for part, entering in zip(parts, (query, key, value), strict=True):
        walk.read(part, 1, entering, -1)
    own = parts[0]
    known = walk.units.axes.get((walk.named(own), 0))
    width = output.shape[1]
    labels = known.labels[:width] if known is not None else walk.units.fresh(heads).repeat_interleave(width // heads)
    walk.units.heads.append(labels)
    for part in dict.fromkeys(parts):
        walk.bind(part, 0, labels.repeat(len(part) // width), "weights")
    if bias is not None:
        walk.bind(bias, 0, labels.repeat(3))
    walk.bind(output, 1, labels, "outgoing")
    leaving = walk.make(output)
    walk.bind(output_bias, 0, leaving)
    return [made(leaving, call.value[0], -1), None]
