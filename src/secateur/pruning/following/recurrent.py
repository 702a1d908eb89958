"""Recurrent layers: their units are hidden units."""

from __future__ import annotations

from typing import Any

from secateur.errors import ModelError
from secateur.pruning.following.convolutions import made
from secateur.pruning.following.walk import Call, Walk, follows

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@follows(*_GATES)
def recurrent(walk: Walk, call: Call) -> Any:
    """Follow a recurrent layer of one direction without projection, whose rows come first.

    Its arguments: input, initial states, weights of all layers (input, hidden, and their biases), whether there are
    biases, number of layers, dropout, training, two directions, rows first.
    """
    x, weights, biased, layers = call.args[0], call.args[2], call.args[3], int(call.args[4])
    tiles, each = _GATES[call.name], 4 if biased else 2
    hidden = weights[1].shape[1]
    if call.args[7] or not call.args[8] or len(weights) != each * layers or len(weights[0]) != tiles * hidden:
        raise ModelError("")
    if any(walk.flow(state) is not None for state in call.tensors[1:] if walk.name(state) is None):
        raise ModelError("its initial states have units of their own")
    labels, family = walk.units.fresh(0), walk.named(weights[0]).rpartition(".")[0]
    for layer in range(layers):
        ih, hh, *rest = weights[each * layer : each * (layer + 1)]
        if layer:
            walk.bind(ih, 1, labels, "outgoing")
        else:
            walk.read(ih, 1, x, -1)
        known = walk.units.axes.get((walk.named(ih), 0))
        labels = walk.units.fresh(hidden) if known is None else known.labels[:hidden]
        walk.bind(ih, 0, labels.repeat(tiles), "weights")
        walk.bind(hh, 0, labels.repeat(tiles), "weights")
        for bias in rest:
            walk.bind(bias, 0, labels.repeat(tiles))
        walk.bind(hh, 1, labels, "outgoing")
        if layers > 1:
            walk.units.families.update(dict.fromkeys(labels.tolist(), family))
            walk.units.names.update(dict.fromkeys(labels.tolist(), f"{family}.{layer}"))
    output, *states = call.value
    return [made(labels, output, -1), *([None] * len(states))]
