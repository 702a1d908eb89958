"""Discovery: which units of which models can be removed, and why others cannot."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional

from secateur import models
from secateur.pruning import mask as masks
from secateur.pruning.discovery import layout
from secateur.pruning.structure import Slot, plan, slice_of
from secateur.pruning.surgery import shrink


class Forward(nn.Module):
    """Layers by name, and a forward pass."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def found_in(model, *shape):
    return layout(model, example=torch.zeros(1, *shape))


def groups(found):
    return [(g.name, g.units, g.kind) for g in found.groups]


def cut_equals_masked(model, x):
    """Remove every second unit of every group, and compare."""
    found = layout(model, example=x[:1])
    keep = {g.name: torch.arange(g.units) % 2 == 0 for g in found.groups if g.kind != "block"}
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    mask = slice_of(found.groups, shapes, keep)
    pruned = copy.deepcopy(model)
    pruned.load_state_dict(masks.apply(model.state_dict(), mask), strict=False)
    small = shrink(pruned, plan(mask, found.groups))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    return torch.allclose(pruned.eval()(x), small.eval()(x), atol=1e-5)


def residual(m, x):
    x = torch.relu(m.stem(x))
    return m.out(x + m.b(torch.relu(m.a(x))))


def test_layers_that_are_added_share_their_units():
    model = Forward(residual, stem=nn.Linear(3, 6), a=nn.Linear(6, 4), b=nn.Linear(4, 6), out=nn.Linear(6, 2))
    assert groups(found_in(model, 3)) == [("stem", 6, "channel"), ("a", 4, "channel")]
    stem = found_in(model, 3).groups[0]
    assert stem.weights == (Slot("stem.weight", 0), Slot("b.weight", 0))
    assert {s.tensor for s in stem.outgoing} == {"a.weight", "out.weight"}
    assert cut_equals_masked(model, torch.randn(5, 3))


def test_what_is_added_to_the_input_keeps_its_units():
    model = Forward(
        lambda m, x: m.c(x + m.b(torch.relu(m.a(x)))), a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2)
    )
    found = found_in(model, 4)
    assert groups(found) == [("a", 4, "channel")]
    assert found.whole == {"b": "it is added to what has no such units", "c": "it is the model's output"}


TRACED = {
    "depthwise convolution": (
        nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.ReLU(),
                      nn.Conv2d(6, 2, 1)),
        [("0", 6, "channel")], (2, 1, 8, 8),
    ),
    "flattened by view": (
        Forward(lambda m, x: m.fc(m.conv(x).relu().view(x.size(0), -1)), conv=nn.Conv2d(1, 4, 3), fc=nn.Linear(36, 2)),
        [("conv", 4, "channel")], (2, 1, 5, 5),
    ),
    "pooled by a mean": (
        Forward(lambda m, x: m.fc(m.conv(x).relu().mean((2, 3))), conv=nn.Conv2d(1, 4, 3), fc=nn.Linear(4, 2)),
        [("conv", 4, "channel")], (2, 1, 5, 5),
    ),
    "gated units, last step": (
        Forward(lambda m, x: m.fc(m.gru(x)[0][:, -1]), gru=nn.GRU(3, 6, batch_first=True), fc=nn.Linear(6, 2)),
        [("gru", 6, "channel")], (2, 7, 3),
    ),
    "plain recurrent units, all steps flattened": (
        Forward(lambda m, x: m.fc(m.rnn(x)[0].flatten(1)), rnn=nn.RNN(3, 6, batch_first=True), fc=nn.Linear(42, 2)),
        [("rnn", 6, "channel")], (2, 7, 3),
    ),
    "group norm behind a linear layer": (
        nn.Sequential(nn.Linear(4, 8), nn.GroupNorm(2, 8), nn.ReLU(), nn.Linear(8, 2)), [("0", 8, "channel")], (3, 4),
    ),
    "torch's encoder": (
        nn.Sequential(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)),
        [
            ("0.layers.0.self_attn", 2, "head"), ("0.layers.0.linear1", 16, "channel"),
            ("0.layers.1.self_attn", 2, "head"), ("0.layers.1.linear1", 16, "channel"),
        ], (2, 5, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRACED)
def test_units_are_found_and_their_cut_changes_nothing(name):
    model, expected, shape = TRACED[name]
    assert groups(found_in(model, *shape[1:])) == expected
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    assert cut_equals_masked(model, torch.randn(shape))


def twice():
    shared = nn.Linear(4, 4)
    return nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(4, 2))


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    return model


def between(call, width=4):
    """Return two linear layers with something between them."""
    return Forward(lambda m, x: m.b(call(m.a(x), x)), a=nn.Linear(4, 4), b=nn.Linear(width, 2))


def begun():
    def forward(m, x):
        return m.b(m.a(x, torch.zeros(1, len(x), 4).to(x))[0][:, -1])

    return Forward(forward, a=nn.GRU(4, 4, batch_first=True), b=nn.Linear(4, 2))


def convs(*middle):
    return nn.Sequential(nn.Conv2d(1, 4, 1), *middle, nn.Conv2d(4, 2, 1))


IMAGE, STEPS = (1, 4, 4), (3, 4)
WHOLE = {
    "layer norm": (nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)), "0", "LayerNorm", (4,)),
    "norm without scale": (convs(nn.GroupNorm(2, 4, affine=False)), "0", "GroupNorm", IMAGE),
    "linear along the rows of an image": (
        nn.Sequential(nn.Conv2d(1, 4, 1), nn.Linear(4, 2)), "0", "lie along another dimension", IMAGE,
    ),
    "joined to the input": (between(lambda a, x: torch.stack([a, x]).sum(0)), "a", "no such units", (4,)),
    "a call of unknown effect": (between(lambda a, _: functional.softmax(a, -1)), "a", "softmax mixes", (4,)),
    "not zero but infinite": (between(lambda a, _: a.abs().log()), "a", "log", (4,)),
    "an input as wide as the units": (between(lambda a, _: a * torch.arange(4)), "a", "no such units", (4,)),
    "an initial state of a size that cannot be changed": (begun(), "a", "torch.fx fails on it: 'len'", STEPS),
    "used twice": (twice(), "0", "used more than once", (4,)),
    "one weight in two layers": (tied(), "0", "used more than once", (4,)),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_cut_is_named_with_the_reason(name):
    model, layer, says, shape = WHOLE[name]
    found = found_in(model, *shape)
    assert found.groups == ()
    assert re.search(says, found.whole[layer]), found.whole


def test_blocks_of_the_zoo_are_those_whose_shortcut_is_the_identity():
    model = models.build("resnet20", input_shape=(3, 16, 16), outputs=3, options={"width": 4})
    blocks = [name for name, _, kind in groups(found_in(model, 3, 16, 16)) if kind == "block"]
    assert blocks == ["blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.5", "blocks.7", "blocks.8"]
    text = models.build("chartransformer", input_shape=(5,), outputs=3, tokens=True, options={"width": 8, "heads": 2})
    assert [g for g in groups(layout(text, example=torch.zeros(1, 5).long())) if g[2] != "channel"] == [
        ("blocks.0.attention.query", 2, "head"), ("blocks.1.attention.query", 2, "head"),
        ("blocks.0", 1, "block"), ("blocks.1", 1, "block"),
    ]  # fmt: skip


class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 3, padding=1), act

    def forward(self, x):
        return self.act(x + self.conv(x))


def test_a_block_that_rectifies_needs_an_input_that_is_never_negative():
    def chain(before, act):
        return nn.Sequential(nn.Conv2d(1, 3, 1), before, Block(act), nn.Flatten(), nn.Linear(48, 2))

    def blocks(model):
        return [g.name for g in found_in(model, 1, 4, 4).groups if g.kind == "block"]

    assert blocks(chain(nn.ReLU(), nn.ReLU())) == ["2"]
    assert blocks(chain(nn.Tanh(), nn.ReLU())) == []
    assert blocks(chain(nn.Tanh(), nn.Identity())) == ["2"]
    assert blocks(chain(nn.ReLU(), nn.Tanh())) == []


@pytest.mark.parametrize(
    ("model", "units"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 49, 2)), {"0": 4}),
        (nn.Sequential(nn.Conv1d(2, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2)), {"0": 4}),
        (nn.Sequential(nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 2)), {"0": 4}),
        (nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(4 * 16, 2)), {"0": 4}),
        (nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), {}),
    ],
)
def test_without_an_example_one_is_made_up_from_the_first_layer(model, units):
    found = layout(model)
    assert {g.name: g.units for g in found.groups} == units
    assert bool(found.groups) != ("" in found.whole)
    assert model.training
