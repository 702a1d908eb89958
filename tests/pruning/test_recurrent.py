"""Hidden units: of layers in one or two directions, of cells and own loops, and however their last state is read."""

import pytest
import torch
from torch import nn

from architectures.measure import apart, cut
from secateur.pruning.discovery import layout
from zoo import drawn

STEPS, INPUTS, HIDDEN = 5, 4, 6


class Net(nn.Module):
    """Layers by name, and a forward pass; ``hidden`` is a number that it may need."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.hidden, self._forward = HIDDEN, forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self._forward(self, x)


def read(how, outputs=HIDDEN, **options):
    """Return a recurrent layer and what reads it."""
    kind = options.pop("kind", nn.LSTM)
    layer = kind(INPUTS, HIDDEN, **{"batch_first": True, **options})
    return Net(lambda m, x: m.out(how(m, x)), rnn=layer, out=nn.Linear(outputs, 3))


def last_of_both(m, x):
    _, (hidden, _) = m.rnn(x)
    return torch.cat([hidden[-2], hidden[-1]], dim=1)


def seen_by_layer(m, x):
    _, hidden = m.rnn(x)
    return hidden.view(2, 2, x.size(0), m.hidden)[-1].permute(1, 0, 2).reshape(x.size(0), -1)


def begun(m, x):
    first = torch.zeros(1, x.size(0), m.hidden, dtype=x.dtype).to(x.device)
    return m.rnn(x, (first, first))[0][:, -1]


def begun_for_any_length(m, x):
    return m.rnn(x, x.new_zeros(1, len(x), m.hidden))[0][:, -1]


def packed(m, x):
    lengths = torch.arange(len(x)) % STEPS + 1
    rows = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    steps, _ = nn.utils.rnn.pad_packed_sequence(m.rnn(rows)[0], batch_first=True, total_length=STEPS)
    return steps.amax(1)


def with_cells(m, x):
    hidden = memory = x.new_zeros(x.size(0), m.hidden)
    for step in range(x.size(1)):
        hidden, memory = m.rnn(x[:, step], (hidden, memory))
    return hidden


def own_loop(m, x):
    state = torch.zeros(x.size(0), m.hidden, dtype=x.dtype)
    for step in range(x.size(1)):
        state = torch.tanh(m.enter(torch.cat([x[:, step], state], dim=1)))
    return m.out(state)


FOUND = {
    "the last hidden state": (read(lambda m, x: m.rnn(x)[1][0][-1]), ["rnn"]),
    "the last step": (read(lambda m, x: m.rnn(x)[0][:, -1]), ["rnn"]),
    "a GRU, steps first": (
        read(lambda m, x: m.rnn(x.transpose(0, 1))[1].squeeze(0), kind=nn.GRU, batch_first=False), ["rnn"],
    ),
    "both directions' last states": (
        read(last_of_both, 2 * HIDDEN, bidirectional=True), ["rnn.0", "rnn.0.reverse"],
    ),
    "two layers, both directions, the mean": (
        read(lambda m, x: m.rnn(x)[0].mean(1), 2 * HIDDEN, num_layers=2, bidirectional=True),
        ["rnn.0", "rnn.0.reverse", "rnn.1", "rnn.1.reverse"],
    ),
    "states seen by layer": (
        read(seen_by_layer, 2 * HIDDEN, kind=nn.GRU, num_layers=2, bidirectional=True),
        ["rnn.0", "rnn.0.reverse", "rnn.1", "rnn.1.reverse"],
    ),
    "zeros as first states": (read(begun), ["rnn"]),
    "zeros for any number of rows": (read(begun_for_any_length, kind=nn.GRU), ["rnn"]),
    "packed rows": (read(packed), ["rnn"]),
    "a cell": (
        Net(lambda m, x: m.out(with_cells(m, x)), rnn=nn.LSTMCell(INPUTS, HIDDEN), out=nn.Linear(HIDDEN, 3)), ["rnn"],
    ),
    "a loop of its own": (
        Net(own_loop, enter=nn.Linear(INPUTS + HIDDEN, HIDDEN), out=nn.Linear(HIDDEN, 3)), ["enter"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_hidden_units_are_found_however_they_are_read(name):
    model, layers = FOUND[name]
    found = layout(model, example=torch.zeros(1, STEPS, INPUTS))
    assert [(group.name, group.units) for group in found.groups] == [(layer, HIDDEN) for layer in layers]
    torch.manual_seed(0)
    x = torch.randn(7, STEPS, INPUTS)
    for seed in range(3):
        pruned, small = cut(model, found, drawn(found, seed, 0.5))
        assert apart(pruned, small, x, train=True) < 1e-12
        assert apart(pruned, small, x, train=False) < 1e-12


def test_layers_and_directions_of_one_module_keep_equally_many():
    model, _ = FOUND["two layers, both directions, the mean"]
    found = layout(model, example=torch.zeros(1, STEPS, INPUTS))
    keep = {group.name: torch.arange(HIDDEN) < n for n, group in enumerate(found.groups, 1)}
    _, small = cut(model, found, keep)
    assert small.rnn.hidden_size == 4
    assert {tuple(p.shape) for n, p in small.rnn.named_parameters() if "weight_hh" in n} == {(16, 4)}


WHOLE = {
    "first states that are not zero": (
        read(lambda m, x: m.rnn(x, x.new_ones(1, x.size(0), HIDDEN))[0][:, -1], kind=nn.GRU),
        "not zero",
    ),
    "a projection": (read(lambda m, x: m.rnn(x)[0][:, -1], 2, proj_size=2), "projected"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_hidden_units_that_must_stay_say_why(name):
    model, says = WHOLE[name]
    found = layout(model, example=torch.zeros(1, STEPS, INPUTS))
    assert found.groups == ()
    assert says in found.whole["rnn"]
