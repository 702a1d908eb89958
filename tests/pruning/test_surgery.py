"""Every network of the zoo, cut at random, against the same network masked: outputs, gradients, plans."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx, nn

from secateur import models
from secateur.errors import ModelError
from secateur.pruning import mask as masks
from secateur.pruning.discovery import layout
from secateur.pruning.structure import Cut, Group, Plan, plan, slice_of, slim, slim_mask, widen
from secateur.pruning.surgery import SlimGroupNorm, plain, shrink
from zoo import SLOW, SMALL, drawn, inputs, masked, network, shapes


def test_the_table_has_every_network():
    assert set(SMALL) == set(models.names()) - {"gcn"}


def test_a_graph_network_passes_its_units_on_to_the_nodes_beside():
    found = layout(models.build("gcn", input_shape=(4, 9), outputs=3), example=torch.zeros(1, 4, 9))
    assert [(group.name, group.units) for group in found.groups] == [("conv1", 128), ("conv2", 128)]


@pytest.mark.parametrize("name", sorted(SMALL))
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.too_slow], derandomize=False)
@given(seed=st.integers(0, 10**6), drop=st.sampled_from([0.2, 0.5, 0.8, 1.0]))
def test_slim_equals_masked_in_outputs_and_gradients(name, seed, drop):
    model, found = network(name)
    mask = slice_of(found.groups, shapes(model), drawn(found, seed, drop))
    pruned = masked(model, mask)
    removal = plan(mask, found.groups)
    small = shrink(pruned, removal)
    torch.manual_seed(seed)
    x = inputs(name)
    exact = [copy.deepcopy(net).double().eval()(x if x.dtype == torch.int64 else x.double()) for net in (pruned, small)]
    assert torch.allclose(*exact, rtol=0, atol=1e-10)
    # in single precision sums have another order; batch norm over two rows and sixteen layers make more of that
    for mode, bound in ((False, 1e-5), (True, 5e-5)):
        one, two = pruned.train(mode)(x), small.train(mode)(x)
        assert float((one - two).detach().abs().max()) < bound * max(1.0, float(one.detach().abs().max()))
    # in double precision: some of these gradients are ill-conditioned, and single precision tells little about them
    expected = slim(
        gradients(pruned, x), Plan(tuple(c for c in removal.cuts if "running" not in c.tensor), removal.dropped)
    )
    found_ = gradients(small, x)
    kept = slim_mask(mask, removal)
    for tensor, gradient in masks.apply(found_, {n: kept[n] for n in found_ if n in kept}).items():
        assert torch.allclose(gradient, masks.apply(expected, kept)[tensor], rtol=1e-7, atol=1e-10), tensor


def gradients(net, x):
    net = copy.deepcopy(net).double().train()
    x = x if x.dtype == torch.int64 else x.double()
    parameters = dict(net.named_parameters())
    found = torch.autograd.grad(net(x).square().sum(), list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


@pytest.mark.parametrize("name", sorted(set(SMALL) - SLOW))
def test_a_plan_survives_json_and_replays_on_a_fresh_model_bit_for_bit(name):
    model, found = network(name)
    removal = plan(slice_of(found.groups, shapes(model), drawn(found, 3, 0.6)), found.groups)
    again = Plan.from_json(removal.to_json())
    assert again == removal
    one, two = shrink(model, removal).state_dict(), shrink(copy.deepcopy(model), again).state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("name", sorted(set(SMALL) - SLOW))
def test_slim_tensors_and_moments_go_back_to_where_they_came_from(name):
    model, found = network(name)
    removal = plan(slice_of(found.groups, shapes(model), drawn(found, 5, 0.5)), found.groups)
    moments = {n: torch.randn(p.shape) for n, p in model.named_parameters()}
    assert {n: t.shape for n, t in slim(moments, removal).items()} == {
        n: p.shape for n, p in shrink(model, removal).named_parameters()
    }
    back = widen(slim(moments, removal), removal, {n: torch.full_like(t, 9.0) for n, t in moments.items()})
    for n, tensor in back.items():
        away = tensor == 9.0
        assert torch.equal(tensor[~away], moments[n][~away])
    assert sum(int((t != 9.0).sum()) for t in back.values()) == sum(t.numel() for t in slim(moments, removal).values())
    assert torch.equal(slim(back, removal)[n], slim(moments, removal)[n])


@pytest.mark.parametrize("name", ["twocnn", "resnet20", "resnet18", "chartransformer"])
def test_a_cut_of_a_cut_is_one_cut(name):
    model, found = network(name)
    first_keep, more = drawn(found, 1, 0.3), drawn(found, 2, 0.4)
    both_keep = {n: first_keep[n] & more[n] for n in first_keep}
    for group in found.groups:
        if group.kind != "block" and not both_keep[group.name].any():
            both_keep[group.name] = first_keep[group.name]
    first_mask, mask = (slice_of(found.groups, shapes(model), keep) for keep in (first_keep, both_keep))
    first, whole = plan(first_mask, found.groups), plan(mask, found.groups)
    small = shrink(model, first)
    # the same cuts, counted from the slim model
    places = {(c.tensor, c.dim): {original: i for i, original in enumerate(c.kept)} for c in first.cuts}
    later = Plan(
        tuple(
            Cut(c.tensor, c.dim, len(places[c.tensor, c.dim]), tuple(places[c.tensor, c.dim][k] for k in c.kept))
            if (c.tensor, c.dim) in places
            else c
            for c in whole.cuts
        ),
        tuple(block for block in whole.dropped if block not in first.dropped),
    )
    composed = first.then(later)
    assert {(c.tensor, c.dim): c for c in composed.cuts} == {(c.tensor, c.dim): c for c in whole.cuts}
    assert set(composed.dropped) == set(whole.dropped)
    pruned = masked(model, mask)
    x = inputs(name)
    twice = shrink(masked(small, slim_mask(mask, first)), later)
    assert torch.allclose(twice.eval()(x), pruned.eval()(x), atol=1e-5)
    with pytest.raises(ModelError, match="the first left"):
        first.then(Plan((Cut(first.cuts[0].tensor, first.cuts[0].dim, 999, (0,)),)))


# ---- group normalisation


def test_slim_group_norm_by_hand():
    norm = nn.GroupNorm(1, 4, eps=0.0)
    slimmer = SlimGroupNorm(norm, [0, 2])
    # (3, 1) and two zeros: mean 1, variance (4 + 0 + 1 + 1) / 4
    found = slimmer.eval()(torch.tensor([[[3.0], [1.0]]]))
    assert torch.allclose(found, torch.tensor([[[2.0], [0.0]]]) / 1.5**0.5)


def test_slim_group_norm_gradient_is_that_of_finite_differences_and_of_autograd():
    torch.manual_seed(0)
    norm = SlimGroupNorm(nn.GroupNorm(3, 12), [0, 1, 5, 8, 9, 10]).double()
    x = torch.randn(2, 6, 3, 2, dtype=torch.double, requires_grad=True)
    parts = (x, norm.weight, norm.bias)

    def forward(x, weight, bias):
        return torch.func.functional_call(norm.train(), {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(forward, parts)
    dy = torch.randn_like(x)
    for mine, autograds in zip(
        torch.autograd.grad(norm.train()(x), parts, dy), torch.autograd.grad(norm.eval()(x), parts, dy), strict=True
    ):
        assert torch.allclose(mine, autograds)


def test_where_whole_groups_go_the_layer_stays_torchs_own():
    norm = nn.Sequential(nn.Conv2d(1, 6, 1), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    found = layout(norm, example=torch.zeros(1, 1, 2, 2))
    keep = {"0": torch.tensor([True, True, False, False, True, True])}
    small = shrink(norm, plan(slice_of(found.groups, shapes(norm), keep), found.groups))
    assert type(small[1]) is nn.GroupNorm
    assert (small[1].num_groups, small[1].num_channels) == (2, 4)


# ---- refusals, and models as torch's own graph


def test_a_plain_model_has_no_class_of_ours_and_says_the_same():
    for name in ("twocnn", "resnet20", "charlstm", "chartransformer"):
        model, found = network(name)
        mask = slice_of(found.groups, shapes(model), drawn(found, 4, 0.5))
        small = shrink(masked(model, mask), plan(mask, found.groups)).eval()
        own = plain(small)
        assert isinstance(own, fx.GraphModule)
        modules = {type(m).__module__ for m in own.modules()}
        assert all(name.startswith("torch.") for name in modules), modules
        assert {n: p.shape for n, p in own.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
        x = inputs(name)
        assert torch.equal(own(x), small(x))


def test_a_model_that_cannot_be_traced_stays_itself():
    class Odd(nn.Module):
        def forward(self, x):
            return -x if x.sum() > 0 else x

    assert type(plain(Odd())) is Odd


@pytest.mark.parametrize(
    ("removal", "says"),
    [
        (Plan((Cut("9.weight", 0, 2, (0,)),)), "'9.weight' to 2 along 0: it is absent"),
        (Plan((Cut("0.weight", 0, 5, (0,)),)), r"of shape \(4, 4\)"),
        (Plan((), ("nowhere.to",)), "'nowhere', which the model does not have"),
        (Plan((Cut("1.weight", 0, 4, (0,)),)), "cuts a LayerNorm"),
    ],
)
def test_plans_for_another_model_are_refused(removal, says):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(ModelError, match=says):
        shrink(model, removal)


def test_what_comes_back_must_have_the_shape_that_the_plan_left():
    base, removal = {"w": torch.zeros(4, 2)}, Plan((Cut("w", 0, 4, (1, 3)),))
    assert widen({"w": torch.ones(2, 2)}, removal, base)["w"].tolist() == [[0, 0], [1, 1], [0, 0], [1, 1]]
    with pytest.raises(ModelError, match="absent"):
        widen({}, removal, base)
    with pytest.raises(ModelError, match=r"of shape \(4, 2\): the plan leaves \(2, 2\)"):
        widen(base, removal, base)


def test_layers_of_one_family_keep_equally_many_units():
    model, found = network("charlstm")
    keep = {"lstm.0": torch.arange(7) < 5, "lstm.1": torch.arange(7) < 2}
    removal = plan(slice_of(found.groups, shapes(model), keep), found.groups)
    left = {c.tensor: len(c.kept) for c in removal.cuts if "weight_hh" in c.tensor and c.dim == 1}
    assert left == {"lstm.weight_hh_l0": 5, "lstm.weight_hh_l1": 5}
    assert isinstance(found.groups[0], Group)
