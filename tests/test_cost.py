"""MACs against torch's own counter and hand counts."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from secateur import cost, models
from secateur.pruning.discovery import layout
from secateur.pruning.structure import plan
from secateur.pruning.surgery import shrink


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mlp", (1, 28, 28)),
        ("smallcnn", (1, 8, 8)),
        ("twocnn", (1, 24, 24)),
        ("sparsifycnn", (3, 32, 32)),
        ("resnet20", (3, 32, 32)),
    ],
)
def test_dense_macs_are_half_of_torchs_flops(name, shape):
    model = models.build(name, input_shape=shape, outputs=10)
    x = torch.zeros(1, *shape)
    with FlopCounterMode(display=False) as counter:
        model.eval()(x)
    uses = cost.uses(model, x)
    assert 2 * cost.macs(uses, model.state_dict(), None) == counter.get_total_flops()


@pytest.mark.parametrize(("shape", "total"), [((1, 24, 24), 7.12e6), ((3, 24, 24), 7.89e6)])
def test_twocnn_matches_the_hand_counts_of_the_paper(shape, total):
    model = models.build("twocnn", input_shape=shape, outputs=10)
    uses = cost.uses(model, torch.zeros(1, *shape))
    # 24 -> conv 22 -> pool 12 -> conv 10 -> pool 6 -> 7x7
    by_hand = shape[0] * 25 * 32 * 22**2 + 32 * 25 * 64 * 10**2 + 64 * 49 * 512 + 512 * 10
    assert cost.macs(uses, model.state_dict(), None) == by_hand == pytest.approx(total, rel=2e-3)


def test_surviving_weights_and_physical_removal_by_hand():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    uses = cost.uses(model, torch.zeros(1, 3))
    mask = {
        "0.weight": torch.tensor([[True, False, True], [False, False, False]]), "0.bias": torch.tensor([True, False]),
        "2.weight": torch.tensor([[True, False]]),
    }  # fmt: skip
    assert cost.macs(uses, model.state_dict(), None) == 8
    assert cost.macs(uses, model.state_dict(), mask) == 3
    small = shrink(model, plan(mask, layout(model, example=torch.zeros(1, 3)).groups))
    assert cost.macs(cost.uses(small, torch.zeros(1, 3)), small.state_dict(), None) == 4


def test_recurrent_and_transposed_layers():
    lstm = nn.LSTM(3, 4, batch_first=True)
    assert cost.macs(cost.uses(lstm, torch.zeros(1, 5, 3)), lstm.state_dict(), None) == 5 * (16 * 3 + 16 * 4)
    time_first = nn.LSTM(3, 4)
    assert set(cost.uses(time_first, torch.zeros(5, 1, 3)).values()) == {5}
    up = nn.ConvTranspose2d(2, 3, 2, stride=2)
    x = torch.zeros(1, 2, 4, 4)
    with FlopCounterMode(display=False) as counter:
        up(x)
    assert 2 * cost.macs(cost.uses(up, x), up.state_dict(), None) == counter.get_total_flops()


def test_a_shared_layer_counts_each_time_and_training_mode_is_kept():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, shared).train()
    assert sum(cost.uses(model, torch.zeros(1, 2)).values()) == 2
    assert model.training
