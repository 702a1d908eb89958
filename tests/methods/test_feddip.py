"""FedDIP and DPF: the ramp by its formula, feedback by a loop of its own, what it reduces to."""

from dataclasses import replace

import pytest
import torch

from helpers import model_of, play, rows_of, same, small, tiny_shards
from secateur.contract.client import Client
from secateur.contract.reducer import reduce
from secateur.data.shards import open_shards
from secateur.errors import ConfigError
from secateur.federation import client
from secateur.learning.resident import tensors_of
from secateur.methods.feddip import FedDIP
from secateur.methods.kit.hooks import Feedback
from secateur.pruning import mask as masks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def test_the_ramp_is_the_formula(folder, tmp_path):
    method = FedDIP(sparsity=0.9, initial=0.5, every=2)
    assert method.level(0, 10) == pytest.approx(0.5)
    assert method.level(5, 10) == pytest.approx(0.9 - 0.4 / 8)
    assert method.level(10, 10) == 0.9
    assert FedDIP(sparsity=0.3, initial=0.5).level(0, 10) == pytest.approx(0.3)  # it never starts above its end
    play(small("feddip", "every=2", "sparsity=0.9", rounds=5), tmp_path / "run", folder)
    total = 16 * 12 + 12 * 8 + 8 * 3
    # the level after a round is that of the rounds before it, and the last round ends at the asked one
    levels = [*(method.level(t, 5) for t in (0, 0, 2, 2)), 0.9]
    found = [row["kept"] - (12 + 8 + 3) for row in rows_of(tmp_path / "run")]
    assert found == [total - int(level * total + 1e-6) for level in levels]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_feedback_takes_gradients_under_the_mask_and_moves_every_weight(folder, momentum):
    study = small("feddip", training={"epochs": 2, "batch_size": 1000, "lr": 0.1, "momentum": momentum})
    shards = open_shards(folder)
    model = client.make_model(study, shards)
    setting = client.make_setting(study, model, shards.clients, client.example(shards))
    start = tensors_of(model)
    view = Client(0, setting, model, client.wrap(shards, *shards.train(0)), study.training)
    mask = {"fc1.weight": torch.rand(12, 16, generator=torch.Generator().manual_seed(0)) < 0.5}
    found, _ = view.train(start, mask, round_=1, hooks=[Feedback()])
    # one batch an epoch, so the order of rows cannot matter beyond the last bits
    other = client.make_model(study, shards)
    other.load_state_dict(start)
    whole = start["fc1.weight"].clone()  # dense: what is pruned keeps its value, and steps go on from there
    optimiser = torch.optim.SGD(other.parameters(), lr=0.1, momentum=momentum)
    x, y = view.data.batch(slice(None))
    for _ in range(2):
        with torch.no_grad():
            other.fc1.weight.copy_(whole.masked_fill(~mask["fc1.weight"], 0.0))
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(other(x), y).backward()
        with torch.no_grad():
            other.fc1.weight.copy_(whole)
        optimiser.step()
        whole = other.fc1.weight.detach().clone()
    torch.testing.assert_close(found["fc1.weight"], whole, rtol=1e-5, atol=1e-6)
    assert found["fc1.weight"][~mask["fc1.weight"]].any()


def test_with_a_mask_that_keeps_everything_feedback_changes_no_bit(folder):
    study = small("feddip")
    shards = open_shards(folder)
    model = client.make_model(study, shards)
    setting = client.make_setting(study, model, shards.clients, client.example(shards))
    start = tensors_of(model)
    view = Client(0, setting, model, client.wrap(shards, *shards.train(0)), study.training)
    full = {"fc1.weight": torch.ones(12, 16, dtype=torch.bool)}
    one, _ = view.train(start, full, round_=1, hooks=[Feedback()])
    other, _ = view.train(start, None, round_=1)
    assert same(one, other)


def test_sparse_down_dense_up(folder, tmp_path):
    play(small("feddip", "every=2", rounds=4), tmp_path / "run", folder)
    play(small("fedavg", rounds=4), tmp_path / "dense", folder)
    rows, dense = rows_of(tmp_path / "run"), rows_of(tmp_path / "dense")
    for row, plain in zip(rows, dense, strict=True):
        assert row["down"]["values"] < 0.8 * plain["down"]["values"]
        assert row["up"]["values"] > 0.7 * plain["up"]["values"]
    assert not same(model_of(tmp_path / "run"), model_of(tmp_path / "dense"))


def test_without_regularisation_nothing_is_pulled(folder, tmp_path):
    assert FedDIP(regularisation=0).strength(25, 30) == 0.0
    play(small("feddip", "regularisation=0"), tmp_path / "none", folder)
    play(small("feddip", "regularisation=0.5"), tmp_path / "some", folder)
    assert not same(model_of(tmp_path / "none"), model_of(tmp_path / "some"))
    with pytest.raises(ConfigError, match="regularisation"):
        FedDIP(regularisation=-1)


# ---- DPF


def test_dpf_sends_dense_weights_and_trains_under_the_mask_that_they_imply(folder):
    study = small("dpf", "sparsity=0.8", rounds=5)  # the ramp ends after 3 * 5 // 4 = 3
    shards = open_shards(folder)
    model = client.make_model(study, shards)
    setting = client.make_setting(study, model, shards.clients, client.example(shards))
    method = study.build_method()
    state = method.start(setting, tensors_of(model), {})
    view = Client(0, setting, model, client.wrap(shards, *shards.train(0)), study.training)
    state = replace(state, round=2, mask=method.mask(setting, state.weights, 2))
    level = 0.8 * (1 - (1 / 3) ** 3)
    total = masks.size(state.mask)
    assert masks.size(state.mask) - masks.kept(state.mask) == int(level * total)
    ask = method.plan(state)
    assert ask.message.mask is None
    assert same(ask.message.tensors, state.weights)  # what is pruned goes down too
    reply = method.respond(ask, view)
    expected, _ = view.train(state.weights, state.mask, round_=3, hooks=[Feedback()])
    assert same(reply.tensors, expected)
    pruned = ~state.mask["fc1.weight"]
    after = method.absorb(state, reduce(ask, state, [(0, reply)]))
    assert after.weights["fc1.weight"][pruned].any()  # it stays, and may come back
    assert same(after.mask, method.mask(setting, after.weights, 3))
    assert not after.model()["fc1.weight"][~after.mask["fc1.weight"]].any()
    rests = method.plan(after)  # the last rounds train and send what is left
    assert same(rests.message.mask, after.mask)
    tuned = method.absorb(after, reduce(rests, state, [(0, method.respond(rests, view))]))
    assert same(tuned.mask, after.mask)
    assert not tuned.weights["fc1.weight"][~after.mask["fc1.weight"]].any()


def test_dpf_ends_at_its_sparsity_and_ships_the_pruned_model(folder, tmp_path):
    summary = play(small("dpf", "sparsity=0.7"), tmp_path / "run", folder)
    assert summary["final"]["sparsity"] == pytest.approx(0.7, abs=0.01)
    sparsities = [row["sparsity"] for row in rows_of(tmp_path / "run")]
    assert sparsities == sorted(sparsities)
    assert sparsities[0] > 0
