"""FedMef: weights that are pulled to 0 before they go, activations of which a share is remembered."""

import pytest
import torch
from torch import nn

from helpers import lab, model_of, play, same, small, tiny_shards
from secateur.learning.loop import fit
from secateur.learning.optimiser import Training
from secateur.learning.task import Data, Regression
from secateur.methods.fedmef import FedMef
from secateur.methods.kit.hooks import Fading, PrunedActivations
from secateur.pruning import mask as masks
from secateur.pruning.activations import keeping, pack
from secateur.streams import Turn
from secateur.wire.message import Message


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def test_the_largest_entries_stay_where_they_were():
    kept = pack(torch.tensor([[3.0, -5.0, 0.5], [0.0, -1.0, 4.0]]), 0.5)
    assert kept.open().tolist() == [[3.0, -5.0, 0.0], [0.0, 0.0, 4.0]]
    assert kept.bytes == 3 * 4 + 1


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_backward_sees_what_was_remembered_and_memory_shrinks(share):
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32), torch.randn(128, 64)
    with keeping(share) as held:
        out = layer(x)
    slope = torch.randn(128, 32)
    out.backward(slope)
    assert torch.allclose(layer.weight.grad, slope.T @ pack(x, share).open(), atol=1e-5)
    assert torch.allclose(layer.bias.grad, slope.sum(0), atol=1e-5)
    assert sum(p.bytes for p in held) <= (share + 1 / 32) * x.numel() * 4 + 8


def test_two_layers_share_an_activation():
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with keeping(0.5) as held:
        net(torch.randn(32, 64)).sum().backward()
    assert len(held) == 2  # the input, and what ReLU and the second layer both remember


def test_a_pull_is_added_to_the_slope_of_chosen_weights():
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    data = Data(torch.tensor([[1.0, 1.0]]), torch.tensor([2.0]), kind="tabular", task=Regression())
    fading = {"weight": torch.tensor([[True, False]])}
    fit(model, data, Training(epochs=1, batch_size=1, lr=0.1), Turn(0, 1, 0), hooks=[Fading(fading, 0.5)])
    # residual 1, slope 2 x = (2, 2); the first is pulled by 0.5 times the slope of |w| = 1
    assert model.weight.tolist()[0] == pytest.approx([1 - 0.1 * 2.5, 2 - 0.1 * 2])


def test_without_notice_and_with_all_activations_it_is_fedtiny(folder, tmp_path):
    play(small("fedtiny", "every=2"), tmp_path / "tiny", folder)
    play(small("fedmef", "every=2", "candidates=4", "extrusion=0", "gamma=0"), tmp_path / "mef", folder)
    assert same(model_of(tmp_path / "tiny"), model_of(tmp_path / "mef"))


def test_what_will_go_shrinks_only_before_an_adjustment(folder):
    settings = ("sparsity=0.5", "every=2", "until=1.0", "alpha=0.5", "gamma=0", "blocks=1")
    state, view = lab(folder, small("fedmef", *settings, rounds=8))

    def respond(round_, pull):
        method = FedMef(sparsity=0.5, every=2, until=1.0, alpha=0.5, gamma=0.0, blocks=1, extrusion=pull)
        ask = method.plan(state)
        ask = type(ask)("train", round_, (0,), Message(masks.apply(state.weights, state.mask), state.mask), ask.expects)
        return method.respond(ask, view(0)).tensors

    assert same(respond(1, 0.0), respond(1, 5.0))
    calm, pulled = respond(2, 0.0), respond(2, 5.0)
    names = state.setting.layout.names("weight")
    assert sum(float(pulled[n].abs().sum()) for n in names) < sum(float(calm[n].abs().sum()) for n in names)
    share = FedMef(sparsity=0.5, every=2, until=1.0, alpha=0.5).share(state.setting, 2)
    for name in names:
        kept = state.mask[name]
        size = torch.where(kept, state.weights[name].abs(), torch.inf).reshape(-1)
        going = size.argsort()[: int(share * int(kept.sum()))]
        assert (pulled[name].reshape(-1)[going].abs() < calm[name].reshape(-1)[going].abs() + 1e-3).float().mean() > 0.8


def test_remembered_activations_change_little_and_train(folder, tmp_path):
    wide = {"model": {"name": "mlp", "options": {"hidden": (128, 64)}}, "rounds": 12, "participation": 1.0}
    found = [
        play(small("fedmef", "every=2", "sparsity=0.5", f"gamma={gamma}", **wide), tmp_path / f"{gamma}", folder)
        for gamma in (0, 0.6)  # half of what ReLU passes is 0 anyway
    ]
    assert not same(model_of(tmp_path / "0"), model_of(tmp_path / "0.6"))
    assert all(summary["final"]["accuracy"] > 0.6 for summary in found)


def test_a_hook_says_how_much_is_remembered():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    data = Data(torch.randn(64, 64), torch.randn(64), kind="tabular", task=Regression())
    found = []
    for share in (1.0, 0.3):
        torch.manual_seed(1)
        for p in model.parameters():
            nn.init.normal_(p, std=0.1)
        done = fit(
            model, data, Training(epochs=1, batch_size=32, lr=0.1), Turn(0, 1, 0),
            hooks=[PrunedActivations(share)],
        )  # fmt: skip
        found.append((done.processed, model[0].weight.detach().clone()))
    assert found[0][0] == found[1][0] == 64
    assert not torch.equal(found[0][1], found[1][1])
