"""Granularities: patterns, kernels, channels, heads and blocks, by hand and as properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.errors import ConfigError, ModelError
from secateur.pruning.allocation import Global, Uniform
from secateur.pruning.discovery import layout
from secateur.pruning.granularity import NM, Block, Channel, Head, Hybrid, Kernel, unit_scores
from secateur.pruning.structure import dead_units, plan
from zoo import network


def scores_of(model, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=draw) for n, p in model.named_parameters()}


@given(st.integers(1, 6), st.integers(2, 8), st.integers(1, 40), st.floats(0, 0.99), st.integers(0, 99))
def test_of_every_m_consecutive_inputs_n_stay_and_they_are_the_best(rows, m, width, sparsity, seed):
    model = nn.Sequential(nn.Linear(width, rows))
    scores = scores_of(model, seed)
    keep = NM(m).mask(scores, layout(model), allocation=Global(), sparsity=sparsity)["0.weight"]
    gone = min(m, int(sparsity * m + 1e-6))
    whole = width // m * m
    assert keep[:, whole:].all()
    for run, kept in zip(scores["0.weight"][:, :whole].reshape(-1, m), keep[:, :whole].reshape(-1, m), strict=True):
        assert int(kept.sum()) == m - gone
        assert gone in {0, m} or run[kept].min() >= run[~kept].max()


def test_two_of_four_by_hand():
    scores = {"0.weight": torch.tensor([[4.0, 1, 3, 2, 1, 1, 1, 1, 0]])}
    model = nn.Sequential(nn.Linear(9, 1, bias=False))
    keep = NM(4).mask(scores, layout(model), allocation=Uniform(), sparsity=0.5)["0.weight"]
    assert keep.int().tolist() == [[1, 0, 1, 0, 0, 0, 1, 1, 1]]  # ties: the first goes; the ninth is left over


def test_kernels_stand_or_fall_whole():
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 1))
    scores = scores_of(model)
    scores["0.weight"] = torch.zeros(2, 2, 3, 3)
    scores["0.weight"][0, 0, 1, 1], scores["0.weight"][1, 1] = 9.0, 0.5  # means 1, 0, 0, 0.5
    keep = Kernel().mask(scores, layout(model), allocation=Uniform(), sparsity=0.5)
    assert keep["0.weight"][0, 0].all()
    assert keep["0.weight"][1, 1].all()
    assert not keep["0.weight"][0, 1].any()
    assert not keep["0.weight"][1, 0].any()
    assert int(keep["2.weight"].sum()) == 1


def test_unit_scores_leave_out_what_is_already_pruned():
    group = layout(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), example=torch.zeros(1, 2)).groups[0]
    scores = {"0.weight": torch.tensor([[1.0, 3.0], [-torch.inf, 2.0], [-torch.inf, -torch.inf]])}
    assert unit_scores(scores, group).tolist() == [2.0, 2.0, -torch.inf]


def test_channels_by_hand_and_what_reads_them_goes_too():
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    scores = scores_of(model)
    scores["0.weight"] = torch.tensor([[1.0, 1], [4, 4], [2, 2], [3, 3]])
    keep = Channel().mask(scores, layout(model, example=torch.zeros(1, 2)), allocation=Global(), sparsity=0.5)
    assert keep["0.weight"].any(1).tolist() == keep["0.bias"].tolist() == [False, True, False, True]
    assert keep["2.weight"].int().tolist() == [[0, 1, 0, 1]] * 2
    assert "2.bias" not in keep
    one = Channel().mask(scores, layout(model, example=torch.zeros(1, 2)), allocation=Uniform(), sparsity=0.99)
    assert one["0.bias"].tolist() == [False, True, False, False]


@pytest.mark.parametrize("name", ["twocnn", "resnet20", "charlstm", "smallcnn"])
@settings(deadline=None, max_examples=6)
@given(sparsity=st.sampled_from([0.3, 0.5, 0.9]), multiple=st.sampled_from([1, 4]), seed=st.integers(0, 99))
def test_uniform_channel_sparsity_leaves_that_share_of_each_layers_units(name, sparsity, multiple, seed):
    model, found = network(name)
    mask = Channel(multiple=multiple).mask(scores_of(model, seed), found, allocation=Uniform(), sparsity=sparsity)
    for group in found.of("channel"):
        left = group.units - int(dead_units(mask, group).sum())
        exact = (1 - sparsity) * group.units
        slack = 1 + (len(group.weights) > 1) * group.units  # shared units: each tensor has a budget of its own
        assert left >= 1
        assert left % multiple == 0 or left == group.units
        assert exact - slack <= left <= exact + slack + multiple
    assert plan(mask, found.groups) or multiple > 1


def test_rounding_and_floor_also_hold_for_the_hybrid():
    model, found = network("twocnn")
    scores = scores_of(model)
    for granularity in (Hybrid(rho=0.9, floor=0.0, multiple=4), Hybrid(rho=0.9, floor=0.6)):
        mask = granularity.mask(scores, found, allocation=Global(), sparsity=0.7)
        left = {g.name: g.units - int(dead_units(mask, g).sum()) for g in found.groups}
        sizes = {g.name: g.units for g in found.groups}
        if granularity.multiple == 4:
            assert all(n % 4 == 0 or n == sizes[name] for name, n in left.items())
        else:
            assert all(n >= 0.6 * sizes[name] for name, n in left.items())


def test_heads_and_blocks_go_whole():
    model, found = network("chartransformer")
    scores = scores_of(model)
    for part in ("query", "key", "value"):
        scores[f"blocks.0.attention.{part}.weight"][4:8] = -1.0  # the second of three heads
    mask = Head().mask(scores, found, allocation=Global(), sparsity=0.2)
    dead = {g.name: dead_units(mask, g).tolist() for g in found.of("head")}
    assert dead["blocks.0.attention.query"] == [False, True, False]
    removal = plan(mask, found.groups)
    assert {c.tensor for c in removal.cuts} >= {"blocks.0.attention.query.weight", "blocks.0.attention.out.weight"}
    low = {n: s - 2 * n.startswith("blocks.1.") for n, s in scores.items()}
    mask = Block().mask(low, found, allocation=Global(), sparsity=0.5)
    assert plan(mask, found.groups).dropped == ("blocks.1",)
    assert not any(mask[n].any() for n in mask if n.startswith("blocks.1."))


def test_a_model_without_such_units_is_refused_with_the_reasons():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    with pytest.raises(
        ModelError, match=r"no removable channel \(0: '1' \(LayerNorm\) mixes.*2: it is the model's output"
    ):
        Channel().prunable(layout(model, example=torch.zeros(1, 3)))
    with pytest.raises(ModelError, match="granularity head: the model has no removable head"):
        Head().prunable(network("mlp")[1])


@pytest.mark.parametrize("make", [lambda: NM(1), lambda: Channel(floor=1.5), lambda: Channel(multiple=0)])
def test_bad_options(make):
    with pytest.raises(ConfigError, match="granularity"):
        make()
