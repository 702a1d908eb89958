"""Recurrent layers: their units are hidden units, each direction's own; all layers of one module keep equally many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from secateur.errors import ModelError
from secateur.pruning.following.convolutions import made
from secateur.pruning.following.walk import Call, Walk, follows
from secateur.pruning.units import Flow

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@follows(*_GATES)
def recurrent(walk: Walk, call: Call) -> Any:
    """Follow a recurrent layer without projection, of one or two directions.

    Its arguments: input, initial states, weights of all layers (input, hidden, and their biases), whether there are
    biases, number of layers, dropout, training, two directions, rows first. Of a packed sequence the sizes of its
    batches come second, and nothing is said of rows.
    """
    packed = isinstance(call.args[3], Sequence)
    x, states, weights, biased, layers, _, _, both = (call.args[0], *call.args[2 if packed else 1 :][:7])
    directions, each = 2 if both else 1, 4 if biased else 2
    tiles, hidden = _GATES[call.name], weights[1].shape[1]
    if len(weights) != each * layers * directions or len(weights[0]) != tiles * hidden:
        raise ModelError("the hidden units of a projected layer stay")
    family = walk.named(weights[0]).rpartition(".")[0] if layers * directions > 1 else ""
    made_units: list[torch.Tensor] = []
    below: torch.Tensor | None = None
    one = [weights[start : start + each] for start in range(0, len(weights), each)]
    for layer in range(0, layers * directions, directions):
        parts = one[layer : layer + directions]
        labels = [_direction(walk, part, tiles, x if below is None else below) for part in parts]
        made_units += labels
        below = torch.cat(labels)
    last = torch.stack(made_units).unsqueeze(1)
    if family:
        walk.units.families.update(dict.fromkeys(last.flatten().tolist(), family))
    _began(walk, states if isinstance(states, Sequence) else [states], last)
    output, *ends = (value for value in call.value if not packed or value.dim() != 1)
    above = last if below is None else below
    return [made(above, output, -1), *(Flow(last.expand(end.shape)) for end in ends)]


def _direction(walk: Walk, parts: Sequence[torch.Tensor], tiles: int, below: torch.Tensor) -> torch.Tensor:
    """Bind one direction of one layer; return the labels of its hidden units.

    Args:
        walk: the walk.
        parts: its weights of inputs and of hidden states, and their biases.
        tiles: number of gates.
        below: the input of the first layer, or the labels of the layer below.
    """
    ih, hh, *biases = parts
    if below.is_floating_point():
        walk.read(ih, 1, below, -1)
    else:
        walk.bind(ih, 1, below, "outgoing")
    hidden = hh.shape[1]
    known = walk.units.axes.get((walk.named(ih), 0))
    labels = walk.units.fresh(hidden) if known is None else known.labels[:hidden]
    for weight in (ih, hh):
        walk.bind(weight, 0, labels.repeat(tiles), "weights")
    for bias in biases:
        walk.bind(bias, 0, labels.repeat(tiles))
    walk.bind(hh, 1, labels, "outgoing")
    return labels


def _began(walk: Walk, states: Sequence[torch.Tensor], labels: torch.Tensor) -> None:
    """Join units with those of initial states, which must be zero where a unit is removed, or it would not be zero."""
    for state in states:
        flow = walk.flow(state) or walk.filled(state, labels.expand(state.shape))
        if flow is not None and flow.zero:
            walk.units.join(flow.labels, labels.expand(state.shape))
        elif bool(state.any()) or walk.name(state) is not None:
            walk.units.fix(labels, "its initial states are not zero")


@follows("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(walk: Walk, call: Call) -> Flow | list[Flow]:
    """Follow one step of a recurrent layer: input, states, and weights of inputs and of states, and their biases."""
    x, states, ih, hh, *biases = call.args
    hidden = hh.shape[1]
    labels = _direction(walk, (ih, hh, *(b for b in biases if b is not None)), len(ih) // hidden, x)
    _began(walk, states if isinstance(states, Sequence) else [states], labels)
    several = isinstance(call.value, Sequence)
    flows = [made(labels, value, -1) for value in (call.value if several else [call.value])]
    return flows if several else flows[0]


@follows("pack_padded_sequence")
def packed(walk: Walk, call: Call) -> list[Flow | None]:
    """Follow the packing of rows of different lengths: features stay where they are."""
    flow = walk.flow(call.args[0])
    return [None if flow is None else made(flow.along(-1, walk.units), call.value[0], -1), None]


@follows("pad_packed_sequence")
def padded(walk: Walk, call: Call) -> list[Flow | None]:
    """Follow the unpacking of rows of different lengths."""
    flow = walk.flow(call.args[0])
    return [None if flow is None else made(flow.along(-1, walk.units), call.value[0], -1), None]
