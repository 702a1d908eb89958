"""Criteria: guidance by hand, randomness by seed."""

import pytest
import torch

from secateur.errors import ConfigError
from secateur.methods.kit.criteria import Magnitude, Random
from secateur.methods.kit.criteria.explored import Deviation
from secateur.methods.kit.criteria.measured import SNIP, Fisher, Grasp, Synflow, Taylor
from secateur.pruning.criteria import Exploration, Gradients, min_max

W = {"w": torch.tensor([[-3.0, 1.0], [0.0, 2.0]]), "b": torch.tensor([0.5, -0.5])}


def test_magnitude():
    assert Magnitude().scores(W, (), seed=0)["w"].tolist() == [[3.0, 1.0], [0.0, 2.0]]
    assert Magnitude().by_training == 0


def test_random_is_persistent_and_depends_on_the_seed_only():
    one = Random().scores(W, (), seed=1)
    other = Random().scores({n: t + 1 for n, t in W.items()}, (), seed=1)
    assert all(torch.equal(one[n], other[n]) for n in W)
    assert not torch.equal(one["w"], Random().scores(W, (), seed=2)["w"])


def test_guidance_by_hand_after_and_before_the_mean():
    d = [{"w": torch.tensor([0.0, 1.0, 3.0])}, {"w": torch.tensor([10.0, 0.0, 5.0])}]
    # mean = 5, .5, 4 -> (x - .5) / 4.5
    after = Deviation().scores(W, d, seed=0)["w"]
    assert after.tolist() == pytest.approx([1.0, 0.0, 3.5 / 4.5])
    # client 1: 0, 1/3, 1; client 2: 1, 0, .5; mean
    before = Deviation(normalise="before").scores(W, d, seed=0)["w"]
    assert before.tolist() == pytest.approx([0.5, 1 / 6, 0.75])


def test_constant_tensor_gives_ones_and_no_nan():
    d = [{"w": torch.zeros(3), "v": torch.tensor([0.0, 2.0])}]
    g = Deviation().scores(W, d, seed=0)
    assert g["w"].tolist() == [1.0, 1.0, 1.0]
    assert g["v"].tolist() == [0.0, 1.0]


def test_scope_of_the_minimum_and_maximum():
    t = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([3.0, 4.0])}
    assert min_max(t, "tensor")["b"].tolist() == [0.0, 1.0]
    assert min_max(t, "global")["b"].tolist() == [0.75, 1.0]
    assert min_max({"e": torch.zeros(0)}, "global")["e"].numel() == 0
    assert min_max({"a": torch.ones(2), "e": torch.zeros(0)}, "tensor")["e"].numel() == 0


def test_order_of_explorers_does_not_matter():
    g = torch.Generator().manual_seed(0)
    d = [{"w": torch.rand(50, generator=g)} for _ in range(5)]
    one, other = Deviation().scores(W, d, seed=0), Deviation().scores(W, d[::-1], seed=0)
    assert torch.allclose(one["w"], other["w"], atol=1e-12)


def test_exploration_defaults_are_the_papers():
    e = Deviation().explore
    assert (e.epochs, e.patience, e.fraction, e.start, e.base, e.warm_start) == (
        150,
        40,
        1.0,
        "common",
        "initial",
        False,
    )


@pytest.mark.parametrize(
    "settings",
    [{"epochs": 0}, {"patience": 0}, {"fraction": 0.0}, {"data": 1.1}, {"start": "sequential", "base": "epoch"}],
)
def test_bad_exploration(settings):
    with pytest.raises(ConfigError, match=r"explore\."):
        Exploration(**settings)


@pytest.mark.parametrize(
    ("criterion", "form", "expected"),
    [
        (SNIP(), "gradient", [6.0, 4.0, 0.0]),
        (SNIP(each=True), "saliency", [2.0, -2.0, 5.0]),  # what clients report is the score
        (Taylor(), "gradient", [36.0, 16.0, 0.0]),
        (Fisher(), "square", [9.0, -4.0, 0.0]),
        (Grasp(), "curvature", [-6.0, -4.0, 0.0]),
        (Synflow(), "flow", [2.0, -2.0, 5.0]),
    ],
)
def test_measured_criteria_by_hand(criterion, form, expected):
    weights, mean = {"w": torch.tensor([-3.0, 2.0, 0.0]), "unmeasured": W["w"]}, {"w": torch.tensor([2.0, -2.0, 5.0])}
    assert criterion.form == form
    assert criterion.measure == Gradients()
    found = criterion.scores(weights, [mean], seed=0)
    assert list(found) == ["w"]
    assert found["w"].tolist() == expected


def test_at_least_one_batch_is_measured():
    with pytest.raises(ConfigError, match=r"measure\.batches"):
        Gradients(batches=0)
