"""Structure: units found by tracing, plans that replay, slim models that equal masked ones."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.errors import ModelError
from secateur.pruning import mask as masks
from secateur.pruning.allocation import Quantile, Threshold
from secateur.pruning.discovery import layout
from secateur.pruning.granularity import Hybrid, Weight
from secateur.pruning.structure import Plan, Slot, dead_units, expand, plan, slim
from secateur.pruning.surgery import shrink


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6),
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 3),
    )  # fmt: skip


def test_units_of_a_chain_with_batch_norm_and_flatten():
    found = layout(cnn(), example=torch.zeros(1, 1, 8, 8))
    assert [(g.name, g.units) for g in found.groups] == [("0", 4), ("3", 6), ("8", 5)]
    conv1, conv2, fc1 = found.groups
    assert conv1.incoming == (Slot("0.weight", 0), Slot("0.bias", 0))
    assert conv1.outgoing == (Slot("3.weight", 1, 1),)
    assert conv2.incoming == (Slot("3.weight", 0), Slot("3.bias", 0), Slot("4.weight", 0), Slot("4.bias", 0))
    assert conv2.statistics == (Slot("4.running_mean", 0), Slot("4.running_var", 0))
    assert conv2.outgoing == (Slot("8.weight", 1, 4),)
    assert fc1.outgoing == (Slot("10.weight", 1, 1),)
    assert found.roles["4.weight"] == "norm"
    assert found.roles["4.running_var"] == "buffer"
    assert "4.num_batches_tracked" not in found.roles


def test_expand_repeats_units_along_the_dimension():
    flags = expand(torch.tensor([True, False]), Slot("w", 1, 2), torch.Size([1, 4]))
    assert flags.tolist() == [[True, True, False, False]]


def random_mask(model, seed, drop=0.5):
    """Kill whole units of each group at random, and single weights besides."""
    found = layout(model, example=torch.zeros(1, 1, 8, 8))
    g = torch.Generator().manual_seed(seed)
    mask = {
        n: torch.rand(t.shape, generator=g) > 0.2
        for n, t in model.state_dict().items()
        if found.roles.get(n) in {"weight", "bias", "norm"}
    }
    for group in found.groups:
        keep = torch.rand(group.units, generator=g) > drop
        for slot in group.incoming:
            mask[slot.tensor] &= expand(keep, slot, mask[slot.tensor].shape)
    return mask


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_slim_equals_masked(seed, drop):
    torch.manual_seed(seed)
    model = cnn()
    with torch.no_grad():  # running statistics as training leaves them: zero means on dead channels
        model[4].running_var.uniform_(0.5, 2)
    mask = random_mask(model, seed, drop)
    pruned = copy.deepcopy(model)
    pruned.load_state_dict(masks.apply(model.state_dict(), mask), strict=False)
    removal = plan(mask, layout(model, example=torch.zeros(1, 1, 8, 8)).groups)
    small = shrink(pruned, removal)
    x = torch.randn(3, 1, 8, 8)
    assert torch.allclose(pruned.eval()(x), small.eval()(x), atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) <= sum(p.numel() for p in model.parameters())


def test_a_plan_keeps_at_least_one_unit_and_resizes_modules():
    model = cnn()
    mask = {n: torch.zeros_like(t, dtype=torch.bool) for n, t in model.named_parameters()}
    small = shrink(model, plan(mask, layout(model, example=torch.zeros(1, 1, 8, 8)).groups))
    assert (small[0].out_channels, small[3].in_channels, small[3].out_channels) == (1, 1, 1)
    assert (small[4].num_features, small[8].in_features, small[8].out_features, small[10].in_features) == (1, 4, 1, 1)
    assert small[10].out_features == 3
    assert model[0].out_channels == 4


def test_a_unit_with_an_unmasked_bias_is_not_dead():
    group = layout(cnn(), example=torch.zeros(1, 1, 8, 8)).groups[0]
    mask = {"0.weight": torch.zeros(4, 1, 3, 3, dtype=torch.bool)}
    assert not dead_units(mask, group).any()
    assert plan(mask, [group]) == Plan(())


def test_plan_json_round_trip_and_replay_on_a_fresh_model():
    torch.manual_seed(0)
    model = cnn()
    removal = plan(random_mask(model, 3), layout(model, example=torch.zeros(1, 1, 8, 8)).groups)
    again = Plan.from_json(removal.to_json())
    assert again == removal
    one, two = shrink(model, removal).state_dict(), shrink(copy.deepcopy(model), again).state_dict()
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not a structural plan"),
        ('{"cuts": []}', "not a structural plan"),
        ('{"secateur_plan": 4, "cuts": []}', "version 4"),
        ('{"secateur_plan": 2, "cuts": [{"tensor": "w", "dim": -1, "size": 2, "kept": [0]}]}', "must rise"),
        ('{"secateur_plan": 2, "cuts": [{"tensor": "w", "dim": 0, "size": 2, "kept": []}]}', "must rise"),
        (
            json.dumps({"secateur_plan": 2, "cuts": 2 * [{"tensor": "w", "dim": 0, "size": 2, "kept": [0]}]}),
            "cut twice",
        ),
        ('{"secateur_plan": 1, "cuts": [{"tensor": "w", "dim": 0, "size": 2, "kept": [0, 2]}]}', "must rise"),
        ('{"secateur_plan": 1, "cuts": [{"tensor": "w", "dim": 0, "size": 2, "kept": [1, 0]}]}', "must rise"),
        ('{"secateur_plan": 1, "cuts": [{"tensor": "w"}]}', "not a structural plan"),
    ],
)
def test_bad_plans(text, says):
    with pytest.raises(ModelError, match=says):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [({}, "absent"), ({"w": torch.zeros(3)}, r"shape \(3,\)"), ({"w": torch.tensor(1.0)}, r"shape \(\)")],
)
def test_a_plan_for_another_model_is_refused(tensors, says):
    removal = Plan.from_json('{"secateur_plan": 1, "cuts": [{"tensor": "w", "dim": 0, "size": 2, "kept": [1]}]}')
    with pytest.raises(ModelError, match=says):
        slim(tensors, removal)


# ---- hybrid granularity


def two_layers():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def hybrid_scores():
    return {
        "0.weight": torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0.1]]),
        "0.bias": torch.ones(4),
        "2.weight": torch.ones(2, 4),
        "2.bias": torch.ones(2),
    }


def test_hybrid_by_hand():
    # Threshold(0.5): kept fractions of the four neurons are 1, 1/2, 1/4, 0; rho = .5 removes the last two
    mask = Hybrid(rho=0.5).mask(
        hybrid_scores(), layout(two_layers(), example=torch.zeros(1, 4)), allocation=Threshold(), sparsity=0.5
    )
    assert mask["0.weight"].int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert mask["0.bias"].tolist() == [True, True, False, False]
    assert mask["2.weight"].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert mask["2.bias"].all()


def test_hybrid_guard_keeps_the_best_units():
    scores = hybrid_scores()
    low = {n: s * 0.4 for n, s in scores.items()}
    mask = Hybrid(rho=0.5, floor=0.5).mask(
        low, layout(two_layers(), example=torch.zeros(1, 4)), allocation=Threshold(), sparsity=0.5
    )
    # every kept fraction is 0; the two neurons with the best mean guidance stay as units
    assert [bool(e) for e in mask["2.weight"].any(0)] == [False] * 4  # all single weights fall to the threshold
    kept = Hybrid(rho=0.5, floor=0.5)._kept(
        layout(two_layers(), example=torch.zeros(1, 4)).groups[0],
        {"0.weight": torch.zeros(4, 4, dtype=torch.bool)},
        scores,
        0.5,
    )
    assert kept.tolist() == [True, True, False, False]
    one = Hybrid(rho=0.5, floor=0.0)._kept(
        layout(two_layers(), example=torch.zeros(1, 4)).groups[0],
        {"0.weight": torch.zeros(4, 4, dtype=torch.bool)},
        scores,
        0.5,
    )
    assert one.tolist() == [True, False, False, False]


def test_hybrid_mean_rule_and_rho_zero():
    by_mean = Hybrid(rule="mean").mask(
        hybrid_scores(), layout(two_layers(), example=torch.zeros(1, 4)), allocation=Threshold(), sparsity=0.25
    )
    assert by_mean["0.bias"].tolist() == [True, True, True, False]
    single = Hybrid(rho=0).mask(
        hybrid_scores(), layout(two_layers(), example=torch.zeros(1, 4)), allocation=Threshold(), sparsity=0.5
    )
    assert torch.equal(single["0.weight"], hybrid_scores()["0.weight"] > 0.5)
    assert single["0.bias"].all()


def test_hybrid_level_zero_keeps_everything_and_biases_can_be_exempt():
    mask = Hybrid().mask(
        hybrid_scores(), layout(two_layers(), example=torch.zeros(1, 4)), allocation=Quantile(), sparsity=0.0
    )
    assert all(m.all() for m in mask.values())
    exempt = Hybrid(biases=False, rho=0).prunable(layout(two_layers(), example=torch.zeros(1, 4)))
    assert exempt == ["0.weight", "2.weight"]
    # a removed unit takes its bias with it even when biases are exempt otherwise
    assert Hybrid(biases=False).prunable(layout(two_layers(), example=torch.zeros(1, 4))) == [
        "0.weight",
        "0.bias",
        "2.weight",
    ]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.floats(0.05, 0.9))
def test_hybrid_masks_leave_every_layer_alive_and_match_the_slim_model(seed, level):
    torch.manual_seed(seed)
    model = cnn()
    found = layout(model, example=torch.zeros(1, 1, 8, 8))
    scores = {n: torch.rand(t.shape) for n, t in model.state_dict().items() if found.roles.get(n, "buffer") != "buffer"}
    mask = Hybrid().mask(scores, found, allocation=Quantile(), sparsity=level)
    pruned = copy.deepcopy(model)
    pruned.load_state_dict(masks.apply(model.state_dict(), mask), strict=False)
    small = shrink(pruned, plan(mask, found.groups))
    assert min(small[0].out_channels, small[3].out_channels, small[8].out_features) >= 1
    x = torch.randn(2, 1, 8, 8)
    assert torch.allclose(pruned.eval()(x), small.eval()(x), atol=1e-5)


def test_weight_granularity_scope():
    found = layout(cnn(), example=torch.zeros(1, 1, 8, 8))
    assert Weight().prunable(found) == ["0.weight", "3.weight", "8.weight", "10.weight"]
    assert "3.bias" in Weight(biases=True).prunable(found)
    assert "4.bias" in Weight(norms=True).prunable(found)
    scores = {n: torch.rand(t.shape) for n, t in cnn().state_dict().items()}
    assert set(Weight().mask(scores, found, allocation=Quantile(), sparsity=0.5)) == set(Weight().prunable(found))


@pytest.mark.parametrize("options", [{"rho": 1.5}, {"floor": -0.1}])
def test_hybrid_bounds(options):
    with pytest.raises(Exception, match=r"granularity\."):
        Hybrid(**options)
