"""Local optimisers bit for bit those of torch.optim; learning rates by hand and against torch's schedulers."""

import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from secateur.errors import ConfigError
from secateur.learning.optimiser import Optimiser, Training

STEPS = 7


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def moved(model, step, clear):
    draw = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        clear()
        model(torch.randn(4, 6, generator=draw)).square().mean().backward()
        step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize(
    ("name", "make", "own"),
    [
        ("sgd", torch.optim.SGD, {}), ("sgd", torch.optim.SGD, {"momentum": 0.9}),
        ("adam", torch.optim.Adam, {}), ("adamw", torch.optim.AdamW, {}),
    ],
)  # fmt: skip
def test_steps_are_torchs_bit_for_bit(name, make, own, decay, foreach):
    ours, theirs = net(), net()
    steps = Optimiser(ours.parameters(), Training(optimiser=name, lr=0.03, weight_decay=decay, **own), 1)
    other = make(theirs.parameters(), lr=0.03, weight_decay=decay, foreach=foreach, **own)
    found, expected = moved(ours, steps.step, steps.clear), moved(theirs, other.step, other.zero_grad)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_decay_of_weights_is_no_part_of_adamws_gradient():
    """Without a slope nothing but decay moves a weight: w (1 - lr decay) in each step; Adam's would move it by lr."""
    weight = nn.Parameter(torch.tensor([2.0]))
    steps = Optimiser([weight], Training(optimiser="adamw", lr=0.1, weight_decay=0.5), 1)
    for _ in range(2):
        weight.grad = torch.zeros(1)
        steps.step()
    assert weight.item() == pytest.approx(2.0 * 0.95**2)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.8, 0.8, 0.8, 0.8, 0.8]),
        ({"schedule": "constant"}, [0.8, 0.8, 0.8, 0.8, 0.8]),
        ({"decay": 0.5}, [0.8, 0.4, 0.2, 0.1, 0.05]),
        ({"schedule": "exponential", "decay": 0.5}, [0.8, 0.4, 0.2, 0.1, 0.05]),
        ({"schedule": "step", "decay": 0.5, "period": 2}, [0.8, 0.8, 0.4, 0.4, 0.2]),
        # cos 0, pi/4, pi/2, 3 pi/4, pi; between 0.8 and 0
        ({"schedule": "cosine", "period": 4}, [0.8, 0.4 + 0.4 * 0.5**0.5, 0.4, 0.4 - 0.4 * 0.5**0.5, 0.0]),
        ({"schedule": "cosine", "period": 2, "floor": 0.2}, [0.8, 0.5, 0.2, 0.2, 0.2]),
    ],
)
def test_rates_by_hand(settings, expected):
    training = Training(lr=0.8, **settings)
    assert [training.rate(t) for t in range(1, 6)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "make"),
    [
        ({"decay": 0.9}, lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
        ({"schedule": "step", "decay": 0.3, "period": 3}, lambda o: lr_scheduler.StepLR(o, 3, 0.3)),
        ({"schedule": "cosine", "period": 9, "floor": 0.1}, lambda o: lr_scheduler.CosineAnnealingLR(o, 9, 0.1)),
    ],
)  # fmt: skip
def test_rates_are_those_of_torchs_schedulers(settings, make):
    training, optimiser = Training(lr=0.5, **settings), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = make(optimiser)
    for round_ in range(1, 10):
        assert training.rate(round_) == pytest.approx(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()


def test_a_cosine_takes_its_rounds_from_the_study():
    training = Training(lr=1.0, schedule="cosine")
    assert training.over(10).rate(6) == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert Training(lr=1.0, schedule="cosine", period=5).over(10).period == 5
    assert Training(decay=0.9).over(10) == Training(decay=0.9)
    with pytest.raises(ConfigError, match=r"training\.period = 0"):
        training.rate(1)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"schedule": "constant", "decay": 0.9}, r"decay = 0\.9: training\.schedule = constant does not read it"),
        ({"period": 3}, r"training\.period = 3: training\.schedule = exponential does not read it"),
        ({"schedule": "step", "decay": 0.9}, r"training\.period = 0 must be at least 1"),
        ({"schedule": "cosine", "floor": 0.5}, r"training\.floor = 0\.5 must be from 0 to training\.lr"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(bad, words):
    with pytest.raises(ConfigError, match=words):
        Training(lr=0.1, **bad)
