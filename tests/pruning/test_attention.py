"""Heads: found in attention as people write it, cut, and equal to the model whose heads are masked."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from architectures.measure import apart, cut
from secateur.pruning.attention import SlimMultiheadAttention
from secateur.pruning.discovery import layout
from secateur.pruning.structure import Plan, plan, slice_of
from secateur.pruning.surgery import plain, shrink
from zoo import drawn, masked, shapes

STEPS, WIDTH, HEADS, EACH = 5, 12, 3, 4


class Attention(nn.Module):
    """Projections of queries, keys and values, whose heads a function attends to."""

    def __init__(self, attend, *, queries=WIDTH, keys=WIDTH, fused=False):
        super().__init__()
        self.heads, self.width, self.head_dim = HEADS, WIDTH, EACH
        if fused:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.q, self.k, self.v = nn.Linear(WIDTH, queries), nn.Linear(WIDTH, keys), nn.Linear(WIDTH, keys)
        self.drop, self.out = nn.Dropout(0.0), nn.Linear(queries, WIDTH)
        self._attend = attend

    def forward(self, x, mask=None, scale=0.5):
        if mask is not None:
            x = x + mask
        return self.out(self._attend(self, x)) * scale


def model_of(attend, **options):
    """Return a model whose first layer makes what attention reads, and whose last reads its mean."""
    torch.manual_seed(1)
    first, attention = nn.Sequential(nn.Linear(6, WIDTH), nn.LayerNorm(WIDTH)), Attention(attend, **options)
    return nn.Sequential(first, attention, Mean(), nn.Linear(WIDTH, 3))


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def softmax(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1), dim=-1) @ v


def fused_and_permuted(m, x):
    rows, steps, width = x.shape
    q, k, v = m.qkv(x).reshape(rows, steps, 3, m.heads, width // m.heads).permute(2, 0, 3, 1, 4).unbind(0)
    return m.drop(softmax(q, k, v)).transpose(1, 2).reshape(rows, steps, width)


def chunked_under_a_causal_mask(m, x):
    rows, steps, width = x.size()
    q, k, v = (part.view(rows, steps, m.heads, width // m.heads).transpose(1, 2) for part in m.qkv(x).chunk(3, dim=-1))
    mask = torch.tril(torch.ones(steps, steps)).bool()
    weights = (q @ k.transpose(-2, -1)).masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights @ v).transpose(1, 2).contiguous().view(rows, steps, width)


def split_by_number(m, x):
    q, k, v = (part.unflatten(-1, (m.heads, -1)).transpose(1, 2) for part in m.qkv(x).split(m.width, dim=2))
    found = functional.scaled_dot_product_attention(q, k, v, dropout_p=m.drop.p if m.training else 0.0)
    return found.transpose(1, 2).flatten(2)


def sliced_by_number(m, x):
    both = m.qkv(x)
    q, k, v = both[..., : m.width], both[..., m.width : 2 * m.width], both[..., 2 * m.width :]
    q, k, v = (part.unflatten(-1, (-1, EACH)).transpose(1, 2) for part in (q, k, v))
    return softmax(q, k, v).transpose(1, 2).flatten(2)


def by_equation(m, x):
    q, k, v = (layer(x).view(*x.shape[:2], m.heads, -1) for layer in (m.q, m.k, m.v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape[0], x.shape[1], -1)


def rows_and_heads_together(m, x):
    rows, steps, _ = x.size()

    def split(part):
        return part.view(rows, steps, m.heads, m.head_dim).transpose(1, 2).reshape(rows * m.heads, steps, m.head_dim)

    weights = torch.bmm(split(m.q(x)), split(m.k(x)).transpose(1, 2)).softmax(-1)
    found = torch.bmm(weights, split(m.v(x))).view(rows, m.heads, steps, m.head_dim)
    return found.transpose(1, 2).reshape(rows, steps, m.width)


def groups_of_queries(m, x):
    q, k, v = (layer(x).unflatten(-1, (-1, EACH)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


def repeated_keys(m, x):
    q, k, v = (layer(x).unflatten(-1, (-1, EACH)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    k, v = (part[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for part in (k, v))
    return softmax(q, k, v).transpose(1, 2).flatten(2)


def one_head(m, x):
    return softmax(m.q(x), m.k(x), m.v(x))


FOUND = {
    "fused, permuted": (fused_and_permuted, {"fused": True}, {"1.qkv": (3, "head")}),
    "chunked, causal": (chunked_under_a_causal_mask, {"fused": True}, {"1.qkv": (3, "head")}),
    "split by number": (split_by_number, {"fused": True}, {"1.qkv": (3, "head")}),
    "sliced by number": (sliced_by_number, {"fused": True}, {"1.qkv": (3, "head")}),
    "by equation": (by_equation, {}, {"1.q": (3, "head")}),
    "rows and heads together": (rows_and_heads_together, {}, {"1.q": (3, "head")}),
    "groups of queries": (groups_of_queries, {"queries": 24}, {"1.q": (3, "head")}),
    "repeated keys": (repeated_keys, {"queries": 24}, {"1.q": (3, "head")}),
    "one head": (one_head, {}, {"1.q": (12, "channel"), "1.v": (12, "channel")}),
}


@pytest.mark.parametrize("name", FOUND)
def test_heads_are_found_however_they_are_written(name):
    attend, options, expected = FOUND[name]
    model = model_of(attend, **options)
    found = layout(model, example=torch.zeros(1, STEPS, 6))
    assert {g.name: (g.units, g.kind) for g in found.groups} == {**expected, "1.out": (12, "channel")}
    x = torch.randn(2, STEPS, 6)
    for seed in range(3):
        pruned, small = cut(model, found, drawn(found, seed, 0.5))
        assert apart(pruned, small, x, train=True) < 1e-12
        assert apart(pruned, small, x, train=False) < 1e-12
        assert apart(small, plain(small), torch.randn(4, STEPS, 6), train=False) < 1e-12


def test_a_head_and_the_queries_that_share_it_are_one_unit():
    model = model_of(groups_of_queries, queries=24)
    (heads,) = layout(model, example=torch.zeros(1, STEPS, 6)).of("head")
    assert {slot.tensor: slot.repeat for slot in heads.weights} == {
        "1.q.weight": 2 * EACH, "1.k.weight": EACH, "1.v.weight": EACH,
    }  # fmt: skip


def test_heads_whose_norm_is_of_all_stay_and_say_so():
    def normed(m, x):
        q, k, v = (layer(x) for layer in (m.q, m.k, m.v))
        q = functional.layer_norm(q, (WIDTH,))
        return softmax(*(part.unflatten(-1, (m.heads, -1)).transpose(1, 2) for part in (q, k, v))).flatten(1, 2)

    def scaled(m, x):
        return normed(m, x).unflatten(1, (m.heads, -1)).transpose(1, 2).flatten(2)

    found = layout(model_of(scaled), example=torch.zeros(1, STEPS, 6))
    assert found.of("head") == []
    assert "layer_norm mixes" in found.whole["1.q"]
    assert found.whole["1.v"]


# ---- torch's own layer

MASKS = {
    "none": {},
    "causal": {"attn_mask": torch.ones(STEPS, STEPS, dtype=torch.bool).triu(1)},
    "a float for each head": {"attn_mask": torch.linspace(-1, 1, 2 * HEADS * STEPS * STEPS).view(-1, STEPS, STEPS)},
    "padding": {"key_padding_mask": torch.arange(STEPS).expand(2, STEPS) >= 3},
    "both": {
        "attn_mask": nn.Transformer.generate_square_subsequent_mask(STEPS),
        "key_padding_mask": torch.zeros(2, STEPS).masked_fill(torch.arange(STEPS) > 3, float("-inf")),
    },
}


def cut_heads(layer, keep):
    """Return torch's layer with masked heads, and the slim one."""
    holder = nn.Sequential(layer)
    (group,) = (g for g in layout(nn.Sequential(Itself(layer)), example=torch.zeros(1, STEPS, WIDTH)).groups)
    found = {group.name: keep}
    mask = slice_of([group], {f"0.layer.{n}": tuple(p.shape) for n, p in layer.named_parameters()}, found)
    mask = {name.replace("0.layer.", "0."): part for name, part in mask.items()}
    pruned = masked(holder, mask)
    removal = plan({n.replace("0.", "0.layer.", 1): p for n, p in mask.items()}, [group])
    text = removal.to_json().replace("0.layer.", "0.")
    return pruned[0], shrink(pruned, Plan.from_json(text))[0]


class Itself(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.source = layer, layer.kdim

    def forward(self, x):
        if not self.layer.batch_first:
            x = x.transpose(0, 1)
        source = x[..., : self.source]
        return self.layer(x, source, source)[0].mean(-1)


LAYERS = {
    "rows first": {"batch_first": True},
    "steps first": {},
    "no biases": {"batch_first": True, "bias": False},
    "keys of another width": {"batch_first": True, "kdim": 7, "vdim": 7},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_slim_layer_attends_and_weighs_as_torchs_with_masked_heads(kind, mask):
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(WIDTH, HEADS, **LAYERS[kind])
    pruned, small = cut_heads(dense, torch.tensor([True, False, True]))
    assert isinstance(small, SlimMultiheadAttention)
    x = torch.randn(2, STEPS, WIDTH)
    source = x[..., :7] if "kdim" in LAYERS[kind] else x
    if not dense.batch_first:
        x, source = x.transpose(0, 1), source.transpose(0, 1)
    for average in (True, False):
        expected = pruned(x, source, source, average_attn_weights=average, **MASKS[mask])
        found = small(x, source, source, average_attn_weights=average, **MASKS[mask])
        for one, other in zip(expected, found, strict=True):
            assert torch.allclose(one, other, atol=1e-6)
    assert small(x, source, source, need_weights=False)[1] is None


def test_a_slim_layer_can_be_cut_again():
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    _, small = cut_heads(dense, torch.tensor([True, False, True]))
    x = torch.randn(2, STEPS, WIDTH)
    last, smallest = cut_heads(copy.deepcopy(dense), torch.tensor([False, False, True]))
    again = shrink(
        nn.Sequential(small),
        Plan.from_json(
            '{"secateur_plan": 2, "dropped": [], "cuts": ['
            + ", ".join(
                f'{{"tensor": "0.{name}", "dim": {dim}, "size": {size}, "kept": {kept}}}'
                for name, dim, size, kept in (
                    ("in_proj_weight", 0, 24, [*range(4, 8), *range(12, 16), *range(20, 24)]),
                    ("in_proj_bias", 0, 24, [*range(4, 8), *range(12, 16), *range(20, 24)]),
                    ("out_proj.weight", 1, 8, [*range(4, 8)]),
                )
            )
            + "]}"
        ),
    )[0]
    assert again.kept == smallest.kept == (2,)
    assert torch.allclose(again(x, x, x)[0], last(x, x, x)[0], atol=1e-6)


def test_heads_with_a_row_of_their_own_among_the_keys_stay():
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, add_bias_kv=True)
    found = layout(nn.Sequential(Itself(layer)), example=torch.zeros(1, STEPS, WIDTH))
    assert found.groups == ()
    assert "heads whose keys get a row" in found.whole["0.layer"]


def test_the_order_of_names_stays():
    model = nn.Sequential(Itself(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)))
    found = layout(model, example=torch.zeros(1, STEPS, WIDTH))
    small = shrink(model, plan(slice_of(found.groups, shapes(model), drawn(found, 0, 0.5)), found.groups))
    assert list(small.state_dict()) == list(model.state_dict())
