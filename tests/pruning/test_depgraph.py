"""torch-pruning's groups: an independent check of our own, and a fallback whose faults cost a clear line."""

import sys
import time

import pytest
import torch
from torch import nn

from secateur.errors import MissingExtraError, ModelError
from secateur.pruning import depgraph
from secateur.pruning.discovery import layout
from zoo import SMALL, inputs, network

pytest.importorskip("torch_pruning", reason="the extra structure is not installed")


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"charlstm", "chartransformer"}))
def test_our_own_walk_finds_the_same_units(name):
    model, found = network(name)
    theirs, whole = depgraph.units(model, inputs(name)[:1])

    def facts(groups):
        return {(g.units, frozenset(g.incoming), frozenset(g.statistics), frozenset(g.outgoing)) for g in groups}

    mine = [g for g in found.groups if g.kind == "channel"]
    assert facts(g for g in theirs if g.outgoing) == facts(mine)
    assert {g.name for g in theirs if not g.outgoing} == set(found.whole)  # the model's output, which a trial refuses
    assert whole == {}


def test_what_the_library_gets_wrong_is_left_whole_and_named():
    for name, units in (("charlstm", set()), ("chartransformer", {"blocks.0.fc1", "blocks.1.fc1"})):
        model, _ = network(name)
        found = layout(model, "torch_pruning", inputs(name)[:1])
        assert {g.name for g in found.groups if g.kind == "channel"} == units  # our own walk finds more
    assert "fails without some of them" in found.whole["blocks.0.attention.query"]


class Branching(nn.Module):
    """A model whose forward pass looks at its input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(torch.relu(self.a(x if x.dim() == 2 and float(x.sum()) < 1e9 else -x)))


def test_a_model_whose_code_looks_at_its_input_has_units_by_either_way():
    for how in ("trace", "torch_pruning", "both"):
        found = layout(Branching(), how, torch.zeros(1, 4))
        assert [(g.name, g.units) for g in found.groups] == [("a", 6)]
    assert layout(Branching(), "none").groups == ()


@pytest.mark.parametrize("how", ["torch_pruning", "both"])
def test_depthwise_convolutions_and_sigmoids_are_served(how):
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Sigmoid(), nn.Conv2d(6, 4, 1), nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    found = layout(model, how, torch.zeros(1, 1, 8, 8))
    assert [(g.name, g.units, g.silent) for g in found.groups] == [("0", 6, False), ("4", 4, True)]


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.c(torch.cat([self.a(x).relu(), self.b(x).relu()], 1))


def test_concatenated_layers_are_refused_by_name():
    groups, whole = depgraph.units(Joined(), torch.zeros(1, 1, 4, 4))
    assert all(g.name not in {"a", "b"} for g in groups) or all("c.weight" not in str(g.outgoing) for g in groups)
    assert "concatenation" in " ".join(whole.values())
    found = layout(Joined(), "both", torch.zeros(1, 1, 4, 4))
    assert [g.name for g in found.groups] == ["a", "b"]  # our own walk follows it


def test_a_graph_that_takes_too_long_is_given_up(monkeypatch):
    import torch_pruning

    monkeypatch.setattr(torch_pruning.DependencyGraph, "build_dependency", lambda self, *a, **k: time.sleep(1))
    with pytest.raises(ModelError, match=r"did not finish in 0 s on this model; set model\.structure=trace"):
        depgraph.units(nn.Linear(2, 2), torch.zeros(1, 2), seconds=0.05)


def test_a_fault_of_the_library_is_one_line(monkeypatch):
    import torch_pruning

    def fails(self, *args, **kwargs):
        raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr(torch_pruning.DependencyGraph, "build_dependency", fails)
    with pytest.raises(ModelError, match=r"cannot handle this model \(ZeroDivisionError: float division"):
        depgraph.units(nn.Linear(2, 2), torch.zeros(1, 2))


def test_without_the_extra_its_name_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[structure\]' in a clone"):
        depgraph.units(nn.Linear(2, 2), torch.zeros(1, 2))
