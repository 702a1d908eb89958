"""Sizes that a model's own code names: changed in its code only, and only where the model needs it."""

import copy

import pytest
import torch
from torch import nn

from architectures import made, rows
from architectures.measure import apart, cut
from secateur.errors import ModelError
from secateur.pruning.discovery import layout
from secateur.pruning.forwards import Site, resize
from secateur.pruning.structure import Cut, Plan, plan, slice_of
from secateur.pruning.surgery import plain, shrink
from zoo import drawn, masked, shapes


class Pairs(nn.Module):
    """Its code names the number of its pairs."""

    def __init__(self, pairs=4):
        super().__init__()
        self.first, self.pairs, self.last = nn.Linear(3, 2 * pairs), pairs, nn.Linear(pairs, 2)
        self.drop = 0.5

    def forward(self, x, shift=None, double=False):
        x = self.first(x).view(x.size(0), 2, self.pairs)
        x = x[:, 0] * x[:, 1]
        if shift is not None:
            x = x + shift
        x = nn.functional.dropout(x, self.drop, training=self.training)
        return self.last(x) * (2 if double else 1)


def pairs_left(kept):
    """Return a cut model by hand: pairs ``kept`` of four."""
    model = Pairs()
    wide = (*kept, *(k + 4 for k in kept))
    cuts = (Cut("first.weight", 0, 8, wide), Cut("first.bias", 0, 8, wide), Cut("last.weight", 1, 4, kept))
    return model, shrink(model, Plan(cuts, (), (), (Cut(":view:0:3", 2, 4, kept),)))


def test_a_forward_pass_gets_other_sizes_in_both_modes_and_for_all_arguments():
    model, small = pairs_left((0, 2))
    assert isinstance(small, Pairs)
    assert (list(small.state_dict()), small.pairs) == (list(model.state_dict()), 4)
    x = torch.randn(5, 3)
    with torch.no_grad():
        model.last.weight[:, [1, 3]] = 0
        for more in ({}, {"double": True}, {"shift": torch.ones(1)}):
            assert torch.allclose(model.eval()(x, **more), small.eval()(x, **more), atol=1e-6)
    assert torch.equal(small.eval()(x), copy.deepcopy(small)(x))
    torch.manual_seed(0)
    outputs = torch.stack([small.train()(x) for _ in range(20)])
    assert float(outputs.detach().std(0).max()) > 0.01  # it drops out again


def test_a_cut_of_a_cut_names_what_is_left_of_both():
    model, small = pairs_left((0, 2, 3))
    again = (1, 4)
    cuts = (Cut("first.weight", 0, 6, again), Cut("first.bias", 0, 6, again), Cut("last.weight", 1, 3, (1,)))
    smaller = shrink(small, Plan(cuts, (), (), (Cut(":view:0:3", 2, 3, (1,)),)))
    first = Plan(calls=(Cut(":view:0:3", 2, 4, (0, 2, 3)),))
    assert first.then(Plan(calls=(Cut(":view:0:3", 2, 3, (1,)),))).calls == (Cut(":view:0:3", 2, 4, (2,)),)
    x = torch.randn(5, 3)
    with torch.no_grad():
        model.last.weight[:, [0, 1, 3]] = 0
    assert torch.allclose(model.eval()(x), smaller.eval()(x), atol=1e-6)


def test_a_plan_with_calls_survives_json_and_is_refused_where_it_does_not_fit():
    removal = Plan((), (), (), (Cut("a.b:reshape:1:4", 2, 6, (0, 5)),))
    assert Plan.from_json(removal.to_json()) == removal
    assert '"secateur_plan": 3' in removal.to_json()
    with pytest.raises(ModelError, match="must rise"):
        Plan.from_json(removal.to_json().replace("[0, 5]", "[0, 6]"))
    for name in ("a.b:erase:0:2", "a.b:view:x:2", "a.b"):
        with pytest.raises(ModelError, match="no call in a module's forward pass"):
            Site.parse(name)
    small = shrink(Pairs(), Plan(calls=(Cut(":view:1:3", 2, 4, (0,)),)))
    with pytest.raises(ModelError, match="that torch.fx does not see"):
        small(torch.randn(2, 3))


def test_code_that_cannot_be_traced_keeps_its_units_and_says_so():
    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.first(x).view(len(x), 2, 4).prod(1) if len(x) else x)

    found = layout(Long(), example=torch.zeros(1, 3))
    assert found.groups == ()
    assert "mixes" in found.whole["first"]
    with pytest.raises(ModelError, match="torch.fx fails on it"):
        model = Long()
        resize(model, [Cut(":view:0:3", 2, 4, (0, 1))])
        model(torch.zeros(2, 3))


def test_constants_that_code_makes_stay_with_copies():
    class Weighed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.first(x).view(x.size(0), 2, 4) * torch.tensor([[1.0], [-2.0]], dtype=x.dtype)
            return self.last(torch.relu(x).reshape(x.size(0), 8))

    model = Weighed()
    found = layout(model, example=torch.zeros(1, 3))
    assert [(group.name, group.units) for group in found.groups] == [("first", 4)]
    pruned, small = cut(model, found, drawn(found, 0, 0.5))
    before = copy.deepcopy(small)
    x = torch.randn(3, 3)
    assert torch.allclose(small(x), pruned(x), atol=1e-6)
    assert torch.equal(before(x), small(x))


@pytest.mark.parametrize("name", ["TimmViT", "GPT", "T5", "ShuffleNetV2", "LastStep"])
def test_cut_code_trains_replays_and_becomes_a_plain_graph(name):
    model, x = made(name), rows(name)
    found = layout(model, example=x[:1])
    removal = plan(slice_of(found.groups, shapes(model), drawn(found, 4, 0.5)), found.groups)
    assert removal.calls
    small = shrink(model, removal)
    again = shrink(copy.deepcopy(model), Plan.from_json(removal.to_json()))
    assert torch.equal(small.eval()(x), again.eval()(x))
    assert apart(small, plain(small), rows(name, 5), train=False) < 1e-12
    small.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    pruned = masked(model, slice_of(found.groups, shapes(model), drawn(found, 4, 0.5)))
    assert apart(pruned, copy.deepcopy(small), rows(name, 5), train=True) < 1e-9


def test_code_that_needs_no_change_gets_none():
    model, x = made("SENet"), rows("SENet")  # its views read their sizes off what enters
    found = layout(model, example=x[:1])
    assert not any(group.calls for group in found.groups)
    assert type(shrink(model, plan(slice_of(found.groups, shapes(model), drawn(found, 1, 0.5)), found.groups))) is type(
        model
    )
