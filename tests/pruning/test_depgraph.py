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

    assert facts(theirs) == facts(g for g in found.groups if g.kind == "channel")
    assert whole == found.whole


def test_what_the_library_gets_wrong_is_left_whole_and_named():
    lstm, _ = network("charlstm")
    groups, whole = depgraph.units(lstm, inputs("charlstm")[:1])
    assert groups == ()  # it does not follow two recurrent layers; our own walk does
    assert set(whole) == {"fc"}
    text, _ = network("chartransformer")
    groups, whole = depgraph.units(text, inputs("chartransformer")[:1])
    assert {g.name for g in groups} == {"blocks.0.fc1", "blocks.1.fc1"}
    assert "fails without one of its units" in whole["blocks.0.attention.value"]


class Branching(nn.Module):
    """A model whose forward pass looks at its input, which torch.fx cannot follow."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(torch.relu(self.a(x if x.dim() == 2 and float(x.sum()) < 1e9 else -x)))


def test_a_model_that_cannot_be_traced_has_units_by_the_graph():
    assert layout(Branching()).groups == ()
    found = layout(Branching(), "torch_pruning", torch.zeros(1, 4))
    assert [(g.name, g.units) for g in found.groups] == [("a", 6)]
    assert layout(Branching(), "none").groups == ()


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
