"""Aggregation against hand-computed values and numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.aggregation.steps import Mean, ServerMomentum, WeightedMean
from secateur.errors import ConfigError

MASK = {"w": torch.tensor([True, False])}


def t(*values):
    return {"w": torch.tensor(values)}


@given(
    st.lists(
        st.tuples(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), st.integers(1, 10**6)), min_size=1
    )
)
def test_weighted_mean_against_numpy(clients):
    mean = WeightedMean()
    for values, n in clients:
        mean.add({"w": torch.tensor(values)}, n)
    expected = np.average([np.array(v, np.float32) for v, _ in clients], axis=0, weights=[n for _, n in clients])
    assert mean.mean()["w"].numpy() == pytest.approx(expected.astype(np.float32), rel=1e-6, abs=1e-4)


def test_one_client_passes_through_bit_for_bit():
    mean = WeightedMean()
    w = torch.randn(100, generator=torch.Generator().manual_seed(0))
    mean.add({"w": w}, 72)
    assert torch.equal(mean.mean()["w"], w)
    assert WeightedMean().mean() == {}
    empty = WeightedMean()
    empty.add({"w": w}, 0)
    assert empty.mean() == {}  # clients without samples cannot divide by zero


def test_coverage_divides_by_those_who_kept_it():
    mean = WeightedMean(coverage=True)
    mean.add({**t(2.0, 0.0, 0.0), "b": torch.tensor([1.0])}, 1, {"w": torch.tensor([True, False, False])})
    mean.add({**t(4.0, 6.0, 0.0), "b": torch.tensor([4.0])}, 2, {"w": torch.tensor([True, True, False])})
    assert mean.mean()["w"].tolist() == pytest.approx([10 / 3, 6.0, 0.0])
    assert mean.mean()["b"].tolist() == pytest.approx([3.0])


def test_mean_zero_and_shadow():
    memory = {"kept": t(1.0)}
    zero, kept = Mean().step(t(9.0, 9.0), t(1.0, 0.0), mask=MASK, memory=memory)
    assert (zero["w"].tolist(), kept) == ([1.0, 0.0], memory)
    shadow, _ = Mean(pruned="shadow").step(t(9.0, 9.0), t(1.0, 0.0), mask=MASK, memory={})
    assert shadow["w"].tolist() == [1.0, 9.0]
    unnamed, _ = Mean(pruned="shadow").step({"b": torch.ones(1)}, {"b": torch.zeros(1)}, mask=MASK, memory={})
    assert unnamed["b"].tolist() == [0.0]
    dense, _ = Mean(pruned="shadow").step(t(9.0, 9.0), t(1.0, 0.0), mask=None, memory={})
    assert dense["w"].tolist() == [1.0, 0.0]


def test_server_momentum_by_hand():
    """v1 = .1 * (10 - 0) = 1, W1 = 9; v2 = .9 * 1 + .1 * (9 - 4) = 1.4, W2 = 7.6."""
    rule = ServerMomentum(beta=0.9)
    w, memory = rule.step(t(10.0), t(0.0), mask=None, memory={})
    assert w["w"].item() == pytest.approx(9.0)
    w, memory = rule.step(w, t(4.0), mask=None, memory=memory)
    assert memory["velocity"]["w"].item() == pytest.approx(1.4)
    assert w["w"].item() == pytest.approx(7.6)


@pytest.mark.parametrize(("pruned", "second"), [("shadow", 8.0), ("zero", 0.0), ("decay", 4.0)])
def test_what_becomes_of_a_pruned_weight(pruned, second):
    """beta = .5: the kept weight moves from 8 to 8 - .5 * (8 - 2) = 5 whatever happens to the pruned one."""
    w, _ = ServerMomentum(beta=0.5, pruned=pruned).step(t(8.0, 8.0), t(2.0, 0.0), mask=MASK, memory={})
    assert w["w"].tolist() == [5.0, second]


def test_beta_bounds():
    with pytest.raises(ConfigError, match=r"aggregator\.beta"):
        ServerMomentum(beta=1.0)
