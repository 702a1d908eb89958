"""Methods that learn masks over weights that never move: their rules by hand, and what travels."""

import pytest
import torch
from torch import nn

from helpers import model_of, play, rows_of, same, small, tiny_shards
from secateur import client
from secateur.data.shards import open_shards
from secateur.errors import ConfigError
from secateur.method import Client, Replies
from secateur.methods.fedpm import FedPM
from secateur.streams import stream
from secateur.supermask import frozen, learn, straight_through
from secateur.training import Data, Training, tensors_of
from secateur.wire.codec import encode, part_sizes
from secateur.wire.message import Message


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def lab(folder, study):
    shards = open_shards(folder)
    model = client.make_model(study, shards)
    setting = client.make_setting(study, model, shards.clients)
    theta = tensors_of(model)

    def view(k):
        return Client(k, setting, model, client.wrap(shards, *shards.train(k)), study.training, {}, theta)

    return study.build_method().start(setting, theta, {}), view


def voted(mask, samples=1):
    zeros = {n: torch.zeros(m.shape) for n, m in mask.items()}
    return Message(zeros, mask, {"samples": samples, "processed": 0, "loss": 0.0})


# ---- the parts


def test_straight_through_is_the_step_forward_and_the_identity_backward():
    soft = torch.tensor([0.3, 0.9], requires_grad=True)
    out = straight_through(torch.tensor([1.0, 0.0]), soft)
    (out * torch.tensor([2.0, 5.0])).sum().backward()
    assert out.tolist() == [1.0, 0.0]
    assert soft.grad.tolist() == [2.0, 5.0]


def test_frozen_weights_are_signs_over_the_root_of_the_fan_in():
    tensors = {"w": torch.tensor([[[[-3.0, 0.0], [1.0, 2.0]]]]), "b": torch.tensor([5.0])}
    found = frozen(tensors, ["w"])
    assert found["w"].flatten().tolist() == [-0.5, 0.5, 0.5, 0.5]
    assert found["b"].tolist() == [5.0]


def test_scores_move_by_the_gradient_through_the_weights_made_of_them():
    """One step on y = u x with u = 2 s, mean squared error: ds = 2 * mean(2 (u x - y) x)."""
    model = nn.Linear(1, 1, bias=False)
    data = Data(torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 1.0]), kind="tabular", task="regression")
    before = model.weight.detach().clone()
    found, done = learn(
        model, data, Training(epochs=1, batch_size=2, lr=0.01), {"weight": torch.tensor([[0.5]])},
        lambda _, s: 2 * s, round_=1, seed=0, client=0,
    )  # fmt: skip
    # u = 1: residuals 1 and 2, slopes of u: mean(2 * 1 * 1, 2 * 2 * 3) = 7
    assert found["weight"].item() == pytest.approx(0.5 - 0.01 * 2 * 7)
    assert (done.steps, done.processed) == (1, 2)
    assert torch.equal(model.weight, before)


# ---- FedPM


@pytest.mark.parametrize(("prior", "expected"), [(1.0, [0.99, 0.5, 0.01]), (2.0, [0.75, 0.5, 0.25])])
def test_the_posterior_by_hand(folder, prior, expected):
    method = FedPM(prior=prior)
    state, _ = lab(folder, small("fedpm", f"prior={prior}"))
    ask = method.plan(state)
    masks = []
    for k in range(2):
        mask = {n: torch.ones_like(t, dtype=torch.bool) for n, t in ask.message.tensors.items()}
        mask["fc3.weight"][0, 1] = k == 0
        mask["fc3.weight"][0, 2] = False
        masks.append((k, voted(mask, samples=100 if k else 1)))  # one client, one vote
    after = method.absorb(state, Replies(ask, masks))
    assert after.memory["chance"]["fc3.weight"][0, :3].tolist() == pytest.approx(expected)
    assert after.mask["fc3.weight"][0, :3].tolist() == [True, True, False]
    assert same(after.weights, state.weights)


def test_without_learning_a_client_sends_a_draw_of_what_it_was_sent(folder):
    state, view = lab(folder, small("fedpm", training={"epochs": 1, "batch_size": 64, "lr": 1e-12}))
    method = FedPM()
    ask = method.plan(state)
    chance = {n: torch.full_like(t, 0.9) for n, t in ask.message.tensors.items()}
    ask.message.tensors.update(chance)
    reply = method.respond(ask, view(2))
    draw = stream(0, "bernoulli", 1, 2)
    for tensor in chance.values():  # the one step's draw
        torch.rand(tensor.shape, generator=draw)
    for name, tensor in chance.items():
        assert torch.equal(
            reply.mask[name], torch.rand(tensor.shape, generator=draw) < torch.sigmoid(torch.logit(tensor))
        )
    assert not any(t.any() for t in reply.tensors.values())


def test_learning_raises_what_helps(folder):
    state, view = lab(folder, small("fedpm", training={"epochs": 20, "batch_size": 8, "lr": 0.1, "optimiser": "adam"}))
    method = FedPM()
    ask = method.plan(state)
    first = method.respond(ask, view(0)).scalars["loss"]
    short, view = lab(folder, small("fedpm", training={"epochs": 1, "batch_size": 8, "lr": 1e-12}))
    assert first < method.respond(method.plan(short), view(0)).scalars["loss"]


def test_a_client_sends_at_most_a_bit_a_weight(tmp_path):
    shards = tiny_shards(tmp_path / "shards", size=16)
    study = small("fedpm", model={"name": "mlp", "options": {"hidden": (256, 64)}})
    _, view = lab(shards, study)
    method = FedPM()
    state, _ = lab(shards, study)
    reply = method.respond(method.plan(state), view(0))
    weights = sum(m.numel() for m in reply.mask.values())
    parts = part_sizes(encode(reply))
    assert parts["mask"] * 8 < 1.01 * weights
    assert parts["values"] < 100  # zeros


def test_a_run_learns_above_chance_and_ships_a_masked_network_of_signs(folder, tmp_path):
    training = {"epochs": 5, "batch_size": 8, "lr": 0.1, "optimiser": "adam"}
    summary = play(small("fedpm", participation=1.0, rounds=12, training=training), tmp_path / "run", folder)
    rows = rows_of(tmp_path / "run")
    assert summary["final"]["accuracy"] > 0.6  # three classes
    assert all(row["up"]["mask"] * 8 < 1.3 * 4 * (16 * 12 + 12 * 8 + 8 * 3) for row in rows)  # four clients, a bit each
    shipped = model_of(tmp_path / "run")
    values = shipped["fc1.weight"][shipped["mask/fc1.weight"].bool()]
    assert values.abs().tolist() == pytest.approx([0.25] * len(values))


def test_updates_and_half_precision_leave_masks_alone(folder, tmp_path):
    play(small("fedpm", rounds=2), tmp_path / "plain", folder)
    play(small("fedpm", "wire.replies=updates", rounds=2), tmp_path / "updates", folder)
    assert same(model_of(tmp_path / "plain"), model_of(tmp_path / "updates"))
    summary = play(small("fedpm", "wire.values=bf16", rounds=2), tmp_path / "half", folder)
    assert summary["left_out"] == {}


def test_bounds_are_told():
    with pytest.raises(ConfigError, match="prior"):
        FedPM(prior=0.5)
