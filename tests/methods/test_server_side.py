"""FedConv and FedCompress: what the server makes of the model itself; resizing and clusters by hand; limits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import lab as helpers_lab
from helpers import model_of, play, rows_of, same, small, tiny_shards
from secateur.contract.ask import SERVER
from secateur.contract.client import Client
from secateur.contract.reducer import reduce
from secateur.data.shards import open_shards
from secateur.errors import ConfigError
from secateur.learning.optimiser import Training
from secateur.learning.task import Data
from secateur.methods.kit import learned_resize as resize
from secateur.methods.kit.clustered import start
from secateur.methods.kit.similarity import Distillation, effective_rank
from secateur.pruning import clustering
from secateur.wire.message import Message


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def server_of(view, folder):
    """Return the server's view: as a client's, with public rows."""
    client = view(0)
    x, y = open_shards(folder).public()
    return Client(SERVER, client.setting, client.model, replace(client.data, x=x, y=y), client.training)


# ---- resizing


def naive(x, kernel, shape):
    """Convolve by loops; x is (outputs, inputs, positions)."""
    found = np.zeros((shape[0], shape[1], x.shape[2]))
    for o in range(shape[0]):
        for i in range(shape[1]):
            for p in range(kernel.shape[0]):
                for q in range(kernel.shape[1]):
                    found[o, i] += x[o + p, i + q] * kernel[p, q]
    return found


@pytest.mark.parametrize(("large", "small_"), [((5, 4), (3, 2)), ((4, 3, 2, 2), (4, 2, 2, 2)), ((6, 1), (4, 1))])
def test_resizing_is_the_convolution_and_its_transpose(large, small_):
    torch.manual_seed(0)
    learnt = {n: torch.randn_like(t) for n, t in resize.identity({"w": large}, {"w": small_}).items()}
    kernel = learnt["kernel.w"] / learnt["kernel.w"].numel() ** 0.5
    kernel.view(-1)[0] += 1
    kernel = learnt["gain.w"] * kernel / kernel.norm()
    x = torch.randn(large)
    inner = learnt["mix.w"][0] * x + learnt["mix.w"][1] * x.std(correction=0)
    entering = (x + torch.where(inner > 0, 0.85 * inner, 0.001 * inner)).reshape(large[0], large[1], -1)
    expected = naive(entering.double().numpy(), kernel.double().numpy(), small_)
    made = resize.compressed({"w": x}, learnt, {"w": small_})["w"]
    assert made.shape == small_
    assert np.allclose(made.reshape(expected.shape).numpy(), expected, atol=1e-5)

    y = torch.randn(small_)
    back = resize.dilated({"w": y}, learnt, {"w": large})["w"]
    expected = np.zeros((large[0], large[1], x[0, 0].numel()))
    wide = y.reshape(small_[0], small_[1], -1).numpy()
    for o, i, p, q in np.ndindex(small_[0], small_[1], *kernel.shape):
        expected[o + p, i + q] += wide[o, i] * kernel[p, q].item()
    assert np.allclose(back.reshape(expected.shape).numpy(), expected, atol=1e-5)


def test_before_anything_is_learnt_it_cuts_and_puts_back():
    large, small_ = {"w": (5, 4), "b": (5,), "same": (2, 2)}, {"w": (3, 4), "b": (3,), "same": (2, 2)}
    x = {name: torch.randn(shape) for name, shape in large.items()}
    start = resize.identity(large, small_)
    assert not any("same" in name for name in start)
    made = resize.compressed(x, start, small_)
    assert torch.allclose(made["w"], x["w"][:3], atol=1e-6)
    assert torch.allclose(made["b"], x["b"][:3], atol=1e-6)
    assert torch.equal(made["same"], x["same"])
    back = resize.dilated(made, start, large)
    assert torch.allclose(back["w"][:3], x["w"][:3], atol=1e-6)
    assert torch.allclose(back["w"][3:], torch.zeros(2, 4), atol=1e-6)


# ---- FedConv


def test_without_learning_it_is_heterofl(folder, tmp_path):
    top = {"participation": 1.0, "rounds": 3}
    still = ("levels=2", "ratio=0.5", "server_lr=1e-30", "tuning_lr=0")
    play(small("fedconv", *still, **top), tmp_path / "conv", folder)
    play(small("heterofl", "levels=2", **top), tmp_path / "hetero", folder)
    conv, hetero = model_of(tmp_path / "conv"), model_of(tmp_path / "hetero")
    assert all(torch.allclose(conv[n], hetero[n], atol=1e-4) for n in hetero)


def test_the_server_learns_a_better_small_model(folder):
    """The loss of the small model on public rows falls as the server learns longer; it beats the slice."""
    study = small("fedconv", training={"epochs": 1, "batch_size": 4, "lr": 0.1})
    state, view = helpers_lab(folder, study)
    server, method = server_of(view, folder), study.build_method()
    cut = method.cut(server.setting, 2)
    losses = []
    for lr, epochs in ((1e-30, 1), (0.01, 5), (0.01, 25)):
        resizing = resize.ServerResizing(server, Training(epochs, 4, "adam", lr), 1)
        made, learnt = resizing.compress(state.weights, cut, {})
        assert any(name.startswith("kernel.") for name in learnt)
        with torch.no_grad():
            x, y = server.data.batch(slice(0, len(server.data)))
            losses.append(float(server.data.task.loss(torch.func.functional_call(server.model, made, (x,)), y)))
    assert losses[0] > losses[1] > losses[2]


def test_shares_begin_as_the_average_over_holders(folder):
    state, view = helpers_lab(folder, small("fedconv"))
    server, method = server_of(view, folder), small("fedconv", "ratio=0.5").build_method()
    resizing = resize.ServerResizing(server, Training(1, 8, "adam", 1e-30), 1)
    cuts = {0: method.cut(server.setting, 0), 1: method.cut(server.setting, 1)}
    whole = {n: torch.full_like(t, 4.0) for n, t in state.weights.items()}
    part = {n: torch.full_like(t, 1.0) for n, t in state.weights.items()}
    merged = resizing.merge({0: whole, 1: part}, {0: 10.0, 1: 30.0}, cuts, state.weights)
    assert torch.allclose(merged["fc1.weight"][:6], torch.tensor((10 * 4 + 30 * 1) / 40))
    assert torch.allclose(merged["fc1.weight"][6:], torch.tensor(4.0))
    alone = resizing.merge({1: part}, {1: 30.0}, {1: cuts[1]}, state.weights)
    assert torch.allclose(alone["fc1.weight"][:6], torch.tensor(1.0))
    assert torch.equal(alone["fc1.weight"][6:], state.weights["fc1.weight"][6:])  # nobody held it


def test_what_the_server_computes_is_counted(folder, tmp_path):
    study = small("fedconv", participation=1.0, rounds=2)
    summary = play(study, tmp_path / "run", folder)
    rows = rows_of(tmp_path / "run")
    public, dense = len(open_shards(folder).public()[1]), summary["final"]["macs_dense"]
    # before round 1 two compressors; after each round two dilators, shares, the model, two compressors; 2 epochs each
    assert rows[0]["server_macs"] == 3 * dense * public * 2 * (2 + 6)
    assert rows[1]["server_macs"] == 3 * dense * public * 2 * 6
    assert summary["phases"]["train"]["server_macs"] == sum(row["server_macs"] for row in rows)


def test_fedconv_without_public_rows_is_one_line(tmp_path):
    source = tiny_shards(tmp_path / "rows")
    for name in ("x_public", "y_public"):
        np.save(source / f"{name}.npy", np.load(source / f"{name}.npy")[:0])
    meta = (source / "meta.json").read_text().replace('"public": 12', '"public": 0')
    (source / "meta.json").write_text(meta)
    with pytest.raises(ConfigError, match="fedconv trains at the server: give it rows with data.public = N"):
        play(small("fedconv"), tmp_path / "run", source)


# ---- clusters


def test_centroids_by_hand():
    values = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])
    assert clustering.nearest(values, torch.tensor([0.0, 8.0])).tolist() == [0, 0, 1, 1, 1]
    assert clustering.lloyd(values, torch.tensor([0.0, 8.0])).tolist() == [0.5, 11.0]
    assert clustering.lloyd(values, torch.tensor([0.0, 5.0, 100.0]))[-1].item() == 100.0  # nothing near: it stays


def test_each_term_moves_its_own_part():
    weight = torch.tensor([[0.0, 2.0, 10.0]], requires_grad=True)
    centroids = torch.tensor([8.0, 0.5], requires_grad=True)
    weights, means = clustering.clustering_losses(weight, centroids)
    assert weights.item() == pytest.approx(0.25 + 2.25 + 4.0)
    (weights + 0.5 * means).backward()
    assert weight.grad.tolist() == [[-1.0, 3.0, 4.0]]
    assert centroids.grad.tolist() == pytest.approx([8.0 - 10.0, 0.5 - 1.0])  # the way to the means


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=60), st.integers(1, 256))
def test_clustered_tensors_open_to_their_centroids(values, count):
    tensor = torch.tensor(values).reshape(1, -1)
    book = clustering.lloyd(tensor, clustering.quantile_centroids(tensor, count))
    shapes = {"w": tuple(tensor.shape), "b": (2,)}
    bits = clustering.width(count)
    parts = clustering.quantised({"w": tensor, "b": torch.ones(2)}, {"w": book}, bits)
    planes = clustering.planes({"w": shapes["w"]}, bits)
    assert {n: tuple(t.shape) for n, t in parts.items()} == {**planes, "codebook.w": (count,), "b": (2,)}
    decoded = clustering.dequantised(parts, shapes)
    assert torch.equal(decoded["w"], book[clustering.nearest(tensor, book)])
    assert (decoded["w"] - tensor).abs().max() <= (tensor[..., None] - book).abs().min(-1).values.max() + 1e-5


# ---- FedCompress


def test_features_of_full_rank_have_the_best_quality():
    assert effective_rank(torch.eye(4)) == pytest.approx(4.0)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1.0)
    assert effective_rank(torch.zeros(2, 2)) == pytest.approx(1.0)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(0.75**-0.75 * 0.25**-0.25)


def test_what_one_teaches_itself_has_no_loss():
    data = Data(torch.zeros(2, 1), torch.tensor([[0.0, 0.0], [1.0, 3.0]]), "tabular", task=Distillation())
    x, y = data.batch(slice(0, 2))
    assert data.task.loss(y, y).item() == pytest.approx(0.0, abs=1e-7)
    half = torch.tensor([[0.0, 0.0]])
    certain = torch.tensor([[0.0, 40.0]])
    assert data.task.loss(half, certain).item() == pytest.approx(np.log(2), abs=1e-5)
    assert len(x) == 2


def test_a_value_for_every_weight_is_nearly_fedavg(folder, tmp_path):
    top = {"participation": 1.0, "rounds": 3}
    play(small("fedcompress", "clusters=256", "beta=0", "proxies=0", **top), tmp_path / "many", folder)
    play(small("fedcompress", "clusters=2", "beta=0", "proxies=0", "most=2", **top), tmp_path / "two", folder)
    play(small("fedavg", **top), tmp_path / "dense", folder)
    many, two, dense = (model_of(tmp_path / n) for n in ("many", "two", "dense"))

    def away(one):
        return sum(float((one[n] - dense[n]).square().sum()) for n in dense)

    assert away(many) < 0.01
    assert away(many) < 0.01 * away(two)
    assert all(len(two[n].unique()) <= 2 for n in two if n.endswith("weight"))


def test_a_clustered_model_travels_in_a_few_bits(folder):
    state, view = helpers_lab(folder, small("fedcompress", "clusters=4", "most=4"))
    method = small("fedcompress", "clusters=4", "most=4").build_method()
    state, _ = method.refine(state, server_of(view, folder))
    ask = method.plan(state)
    reply = method.respond(ask, view(1))
    for message in (ask.message, reply):
        clustered = [t for n, t in message.tensors.items() if n.startswith("bit")]
        assert sum(t.numel() for t in clustered) == 2 * (192 + 96 + 24) // 8
    shapes = {n: s.shape for n, s in state.setting.specs.items()}
    assert same(clustering.dequantised(ask.message.tensors, shapes), dict(state.weights))


def test_clusters_double_when_features_stop_getting_better(folder):
    state, view = helpers_lab(folder, small("fedcompress", rounds=9))
    method = small("fedcompress", "clusters=8", "most=30", "patience=2", "proxies=0").build_method()
    server = server_of(view, folder)
    state, _ = method.refine(state, server)
    counts = []
    for told in (2.0, 3.0, 2.5, 2.9, 2.0, 1.0, 5.0):
        ask = method.plan(state)
        message = Message(ask.message.tensors, None, {"samples": 5, "processed": 0, "loss": 0.0, "quality": told})
        state, _ = method.refine(method.absorb(state, reduce(ask, state, [(0, message)])), server)
        counts.append(method.count(state))
    assert counts == [8, 8, 8, 16, 16, 30, 30]


def test_a_heavier_beta_brings_weights_to_their_centroids(folder):
    found = []
    for beta in (1e-6, 0.1, 1.0):
        study = small("fedcompress", f"beta={beta}", "clusters=4", "most=4")
        state, view = helpers_lab(folder, study)
        client = view(0)
        scores = start(state.weights, 4, client.setting)
        learnt, _ = client.learn(
            state.weights,
            scores,
            clustering.without_codebooks,
            round_=1,
            penalty=lambda s, b=beta: clustering.clustering_penalty(s, b),
        )
        found.append(float(clustering.clustering_penalty(learnt, 1.0)))
    assert found[0] > found[1] > found[2]
