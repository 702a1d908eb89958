"""Masks: apply, combine, count."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.pruning import mask as masks


def test_apply_gives_positive_zero_for_negative_and_infinite_weights():
    w = {"a": torch.tensor([-1.0, torch.inf, 2.0, -0.0])}
    out = masks.apply(w, {"a": torch.tensor([False, False, True, True])})["a"]
    assert out.tolist()[:3] == [0.0, 0.0, 2.0]
    assert not torch.signbit(out[:2]).any()
    assert torch.signbit(out[3])  # a surviving -0.0 keeps its bits


def test_apply_passes_unnamed_tensors_through_and_none_keeps_all():
    w = {"a": torch.ones(2), "b": torch.ones(2)}
    assert masks.apply(w, {"a": torch.tensor([True, False])})["b"] is w["b"]
    assert masks.apply(w, None)["a"] is w["a"]


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(1, 4))
def test_reapplication_is_idempotent(flags, times):
    mask = {"a": torch.tensor(flags)}
    w = {"a": torch.randn(len(flags), generator=torch.Generator().manual_seed(len(flags)))}
    once = again = masks.apply(w, mask)
    for _ in range(times):
        again = masks.apply(again, mask)
    assert torch.equal(once["a"], again["a"])
    assert set(mask["a"].tolist()) <= {True, False}


def test_counts_and_sparsity():
    mask = {"a": torch.tensor([True, False, False]), "b": torch.tensor([[True]])}
    assert (masks.kept(mask), masks.size(mask)) == (2, 4)
    assert masks.sparsity(mask) == 0.5
    assert masks.sparsity(None) == 0.0
    assert masks.sparsity({}) == 0.0


def test_intersect_keeps_what_both_keep_and_none_is_everything():
    one = {"a": torch.tensor([True, False]), "b": torch.tensor([False])}
    two = {"a": torch.tensor([True, True]), "c": torch.tensor([True])}
    both = masks.intersect(one, two)
    assert {n: m.tolist() for n, m in both.items()} == {"a": [True, False], "b": [False], "c": [True]}
    assert masks.intersect(None, two) is two
    assert masks.intersect(one, None) is one
    assert masks.intersect(None, None) is None
