"""Aggregation against hand-computed values and numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.aggregation.steps import FedAdagrad, FedAdam, FedYogi, Mean, ServerMomentum
from secateur.aggregation.weighted import WeightedMean
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


# Two rounds of algorithm 2 of arXiv 2003.00295 by hand, tau = 0.5 (v begins at 0.25), eta = 0.1, beta1 = beta2 = 0.5
# where a rule has them; W = 1, means 3 and 2, so Delta_1 = 2.
#   adam     m 1, v .5 * .25 + .5 * 4 = 2.125, W = 1 + .1 / (sqrt 2.125 + .5)
#   yogi     v .25 - .5 * 4 * sign(.25 - 4) = 2.25, W = 1 + .1 / (1.5 + .5) = 1.05
#            Delta .95, m .5 + .475 = .975, v 2.25 - .5 * .9025 = 1.79875
#   adagrad  m 2 (no momentum), v .25 + 4 = 4.25, W = 1 + .2 / (sqrt 4.25 + .5)
ADAM_1 = 1 + 0.1 / (2.125**0.5 + 0.5)
ADAGRAD_1 = 1 + 0.2 / (4.25**0.5 + 0.5)
BY_HAND = [
    (
        FedAdam, {"beta1": 0.5, "beta2": 0.5}, (1.0, 2.125, ADAM_1),
        (0.5 + 0.5 * (2 - ADAM_1), 1.0625 + 0.5 * (2 - ADAM_1) ** 2),
    ),
    (FedYogi, {"beta1": 0.5, "beta2": 0.5}, (1.0, 2.25, 1.05), (0.975, 1.79875)),
    (FedAdagrad, {}, (2.0, 4.25, ADAGRAD_1), (2 - ADAGRAD_1, 4.25 + (2 - ADAGRAD_1) ** 2)),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "options", "one", "two"), BY_HAND)
def test_adaptive_steps_by_hand(rule, options, one, two):
    step = rule(lr=0.1, tau=0.5, **options)
    w, memory = step.step(t(1.0), t(3.0), mask=None, memory={"other": t(9.0)})
    assert (memory["first"]["w"].item(), memory["second"]["w"].item(), w["w"].item()) == pytest.approx(one)
    assert memory["other"]["w"].item() == 9.0
    second, memory = step.step(w, t(2.0), mask=None, memory=memory)
    assert (memory["first"]["w"].item(), memory["second"]["w"].item()) == pytest.approx(two)
    m, v = two
    assert second["w"].item() == pytest.approx(one[2] + 0.1 * m / (v**0.5 + 0.5))


@given(st.lists(st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3), min_size=1, max_size=6))
def test_adaptive_steps_against_numpy(means):
    """The three recursions written out once more, in float64."""
    for rule in (FedAdam(), FedYogi(), FedAdagrad()):
        w, memory = {"w": torch.zeros(3, dtype=torch.float64)}, {}
        x, m, v = np.zeros(3), np.zeros(3), np.full(3, 1e-6)
        for mean in means:
            d = np.array(mean) - x
            m = rule.beta1 * m + (1 - rule.beta1) * d
            v = {
                FedAdam: lambda v, d: 0.99 * v + 0.01 * d**2,
                FedYogi: lambda v, d: v - 0.01 * d**2 * np.sign(v - d**2),
                FedAdagrad: lambda v, d: v + d**2,
            }[type(rule)](v, d)
            x = x + 0.1 * m / (np.sqrt(v) + 1e-3)
            w, memory = rule.step(w, {"w": torch.tensor(mean, dtype=torch.float64)}, mask=None, memory=memory)
        assert w["w"].numpy() == pytest.approx(x, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("rule", [FedAdam, FedYogi, FedAdagrad])
def test_what_becomes_of_a_pruned_weight_in_an_adaptive_step(rule):
    """The kept weight moves the same way; the pruned one stays, is given up, or follows the client's zero."""
    found = {
        pruned: rule(pruned=pruned).step(t(8.0, 8.0), t(2.0, 0.0), mask=MASK, memory={})[0]["w"].tolist()
        for pruned in ("shadow", "zero", "decay")
    }
    assert len({kept for kept, _ in found.values()}) == 1
    assert found["shadow"][1] == 8.0
    assert found["zero"][1] == 0.0
    assert 7.0 < found["decay"][1] < 8.0


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"tau": 0.0}, {"beta1": 1.0}, {"beta2": -0.1}])
def test_bounds_of_adaptive_steps(bad):
    with pytest.raises(ConfigError, match=rf"aggregator\.{next(iter(bad))}"):
        FedAdam(**bad)
