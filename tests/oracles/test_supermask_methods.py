"""SpaFL, FedPM and FRL against what their published code does, written down anew from reading it.

Each test names the repository and the file it was read in. Of HideNseek no code was found, so there is no oracle.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from helpers import lab, small, tiny_shards
from secateur.contract.reducer import reduce
from secateur.methods.fedpm import FedPM
from secateur.methods.frl import FRL, initial_scores, scores_by_rank
from secateur.methods.kit.thresholds import received
from secateur.methods.spafl import SpaFL
from secateur.pruning.ranking import packed, ranked
from secateur.streams import stream
from secateur.wire.message import Message

SHAPES = {"conv": (6, 3, 5, 5), "fc": (7, 11)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"), size=16)


def draws(*label):
    return stream(0, "oracle", *label)


def told(tensors, mask=None):
    return Message(tensors, mask, {"samples": 1, "processed": 0, "loss": 0.0})


def captured(method, ask, client):
    """Return what a client would train: the weights beneath, the scores, and how scores become weights."""
    found = []

    class Stopped(Exception):
        pass

    def learn(weights, scores, effective, **_):
        found.append((weights, scores, effective))
        raise Stopped

    client.learn = learn
    with pytest.raises(Stopped):
        method.respond(ask, client)
    return found[0]


def slopes(effective, scores, weight):
    """Return the gradient by the scores of a loss that is linear in the weights, with these slopes."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in scores.items()}
    made = effective(leaves)
    sum((made[name] * slope).sum() for name, slope in weight.items()).backward()
    return made, {name: leaves[name].grad for name in weight}


# ---- SpaFL: news-vt/SpaFL_NeruIPS_2024


@pytest.mark.parametrize("kind", SHAPES)
def test_spafl_a_change_of_thresholds_pushes_weights(kind):
    """main/fmnist/client/Client_Class.py, th_update: by 1/kernel_size^2 in a convolution, by 1/in_size in a layer."""
    weight, change = (
        torch.randn(SHAPES[kind], generator=draws(kind)),
        torch.randn(SHAPES[kind][0], generator=draws("change")),
    )
    expected = weight.numpy().copy()
    for unit in range(len(expected)):
        toward = np.sign(expected[unit].sum())
        divisor = weight.shape[2] ** 2 if kind == "conv" else weight.shape[1]
        expected[unit] -= toward * float(change[unit]) / divisor
    found = received({f"change.{kind}": change}, {kind: weight})[kind]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_spafl_the_server_averages_and_tells_the_difference(folder):
    """main/fmnist/server/Server_Class.py, aggregation: the mean over the cohort, each client alike, less the old."""
    state, _ = lab(folder, small("spafl"))
    method, old = SpaFL(), {n: np.zeros(t.shape, np.float32) for n, t in state.memory["threshold"].items()}
    for round_ in (1, 2):
        clients = [{n: torch.randn(t.shape, generator=draws(round_, k, n)) for n, t in old.items()} for k in range(3)]
        replies = [(k, told({f"threshold.{n}": t for n, t in own.items()})) for k, own in enumerate(clients)]
        state = method.absorb(state, reduce(method.plan(state), state, replies))
        new = {n: sum(own[n].numpy() / 3 for own in clients) for n in old}
        sent = method.plan(state).message.tensors
        for n, before in old.items():
            np.testing.assert_allclose(sent[f"threshold.{n}"].numpy(), new[n], atol=1e-6)
            np.testing.assert_allclose(sent[f"change.{n}"].numpy(), new[n] - before, atol=1e-6)
        old = new


class Step(torch.autograd.Function):
    """1 above 0, else 0; the slope passes."""

    @staticmethod
    def forward(_ctx, x):
        return (x > 0).float()

    @staticmethod
    def backward(_ctx, slope):
        return slope


@pytest.mark.parametrize("round_", [1, 3])
def test_spafl_a_client_trains_weights_and_thresholds(folder, round_):
    """main/fmnist/client/Client_Class.py, local_training, and model/binarization.py, MaskedMLP.

    Two steps of SGD with momentum on all rows; the penalty rises by 1/(1 + exp(5 - 10 round)), rounds from 0. Layers
    have biases here, which the published ones lack: they are trained as weights are.
    """
    training = {"epochs": 2, "batch_size": 1000, "lr": 0.05, "momentum": 0.9}
    state, view = lab(folder, small("spafl", "penalty=0.5", training=training, rounds=9))
    method, client = SpaFL(penalty=0.5), view(0)
    tau = {n: torch.rand(t.shape, generator=draws(n)) * 0.3 for n, t in state.memory["threshold"].items()}
    message = {f"threshold.{n}": t for n, t in tau.items()} | {
        f"change.{n}": torch.zeros_like(t) for n, t in tau.items()
    }
    ask = method.plan(state)
    reply = method.respond(type(ask)("train", round_, (0,), Message(message), ask.expects), client)

    names = [f"fc{i}" for i in (1, 2, 3)]
    held = {
        f"{n}.{part}": nn.Parameter(client.initial[f"{n}.{part}"].clone()) for n in names for part in ("weight", "bias")
    }
    held |= {f"{n}.tau": nn.Parameter(tau[f"{n}.weight"].clone()) for n in names}
    optimiser = torch.optim.SGD(held.values(), lr=0.05, momentum=0.9)
    x, y = client.data.batch(slice(None))
    gone = 0
    for _ in range(2):
        h = x.flatten(1)
        for n in names:
            w = held[f"{n}.weight"]
            above = (w.abs().mean(1).view(-1, 1) - held[f"{n}.tau"].view(-1, 1)).repeat(1, w.shape[1])
            mask = Step.apply(above)
            gone += int((mask == 0).sum())
            h = nn.functional.linear(torch.relu(h) if n != "fc1" else h, w * mask, held[f"{n}.bias"])
        loss = nn.functional.cross_entropy(h, y)
        for n in names:
            loss = loss + 0.5 / (1 + math.exp(5 - 10 * (round_ - 1))) * torch.exp(-held[f"{n}.tau"]).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert gone  # else thresholds were not tried
    for n in names:
        torch.testing.assert_close(reply.tensors[f"threshold.{n}.weight"], held[f"{n}.tau"].data, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(client.memory[f"{n}.weight"], held[f"{n}.weight"].data, atol=1e-5, rtol=1e-4)


# ---- FedPM: BerivanIsik/sparse-random-networks


def test_fedpm_frozen_weights(folder):
    """src/fedssm/models/masked_layers.py, ME_init: plus or minus e sqrt(1/in), of convolutions e sqrt(1/(k^2 in))."""
    for model in ({"name": "mlp", "options": {"hidden": (12, 8)}}, {"name": "smallcnn"}):
        state, _ = lab(folder, small("fedpm", model=model))
        for name in state.setting.layout.names("weight"):
            weight = state.weights[name]
            inputs = weight.shape[1] * (weight.shape[2] ** 2 if weight.dim() == 4 else 1)
            np.testing.assert_allclose(weight.abs().numpy(), np.e * np.sqrt(1 / inputs), rtol=1e-6)
            assert 0.2 < float((weight > 0).float().mean()) < 0.8


def test_fedpm_first_scores_are_normal(folder):
    """src/fedssm/models/masked_layers.py: scores are drawn from N(0, 1), so chances are their sigmoids."""
    state, _ = lab(folder, small("fedpm", model={"name": "mlp", "options": {"hidden": (256, 64)}}))
    scores = torch.logit(state.memory["chance"]["fc1.weight"])
    assert abs(float(scores.mean())) < 0.02  # 65,536 draws: standard deviations of 0.004 and 0.003
    assert abs(float(scores.std()) - 1) < 0.02


@pytest.mark.parametrize("clients", [1, 3, 5])
def test_fedpm_the_mode_of_the_posterior(folder, clients):
    """src/fedssm/client.py, upload_mask, and server.py, sample_mask_aggregation: bits of 0.01 and 0.99, Beta(1, 1)."""
    state, _ = lab(folder, small("fedpm"))
    method, name = FedPM(), "fc2.weight"
    shapes = {n: t.shape for n, t in state.memory["chance"].items()}
    replies = []
    for k in range(clients):
        mask = {n: torch.rand(shape, generator=draws(k, n)) < 0.5 for n, shape in shapes.items()}
        replies.append((k, told({n: torch.zeros(shape) for n, shape in shapes.items()}, mask)))
    alpha, beta = np.ones(shapes[name]), np.ones(shapes[name])
    for _, message in replies:
        bit = np.where(message.mask[name].numpy(), 1 - 0.01, 0.01)
        alpha, beta = alpha + bit, beta + (1 - bit)
    after = method.absorb(state, reduce(method.plan(state), state, replies))
    np.testing.assert_allclose(after.memory["chance"][name].numpy(), (alpha - 1) / (alpha + beta - 2), rtol=1e-5)


def test_fedpm_the_slope_of_a_draw(folder):
    """src/fedssm/utils/random.py, Bern: the gradient by a probability is the drawn bit's times the probability."""
    state, view = lab(folder, small("fedpm"))
    method = FedPM()
    ask = method.plan(state)
    weights, scores, effective = captured(method, ask, view(1))
    slope = {n: torch.randn(s.shape, generator=draws(n)) for n, s in scores.items()}
    draw = stream(0, "bernoulli", 1, 1)
    made, found = slopes(effective, scores, slope)
    for name, score in scores.items():
        chance = ask.message.tensors[name].double()
        bits = torch.rand(score.shape, generator=draw) < chance.float()
        assert torch.equal(made[name] != 0, bits)
        by_chance = slope[name].double() * weights[name].double() * chance
        torch.testing.assert_close(found[name].double(), by_chance * chance * (1 - chance), rtol=1e-4, atol=1e-6)


# ---- FRL: SPIN-UMass/FRL


def test_frl_frozen_weights_at_the_published_density(folder):
    """models/init.py, signed_constant: the sign of a weight times torch's gain for ReLU over the root of the fan-in."""
    for model in ({"name": "mlp", "options": {"hidden": (12, 8)}}, {"name": "smallcnn"}):
        study = small("frl", model=model)
        state, view = lab(folder, study)
        for name in state.setting.layout.names("weight"):
            theta = view(0).initial[name]
            size = nn.init.calculate_gain("relu") / math.sqrt(nn.init._calculate_correct_fan(theta, "fan_in"))
            torch.testing.assert_close(state.weights[name], theta.sign() * size)


def test_frl_first_scores(folder):
    """models/module_util.py, mask_init: torch's Kaiming uniform with a = sqrt 5, whose own draws are the measure."""
    state, _ = lab(folder, small("frl", model={"name": "mlp", "options": {"hidden": (256, 64)}}))
    found = initial_scores(state.setting, "fc1.weight")
    torch.manual_seed(0)
    published = nn.init.kaiming_uniform_(torch.empty(found.shape), a=math.sqrt(5))
    ours, theirs = np.sort(found.numpy(), axis=None), np.sort(published.numpy(), axis=None)
    assert np.abs(ours - theirs).max() < 0.01 * (theirs[-1] - theirs[0])  # two samples of 65,536


@pytest.mark.parametrize("clients", [1, 4])
def test_frl_the_vote_and_the_subnetwork(folder, clients):
    """utils.py, Find_rank and FRL_Vote, and models/module_util.py, GetSubnet (k = 0.5).

    A client sends the edges in ascending order of its scores; their places are summed; the edges in the order of the
    sums are dealt the sorted first scores; the half with the largest sizes takes part.
    """
    state, view = lab(folder, small("frl", model={"name": "mlp", "options": {"hidden": (13, 7)}}))
    method = FRL()
    names = list(state.memory["rank"])
    scores = [
        {n: torch.randn(state.setting.specs[n].shape, generator=draws(k, n)) for n in names} for k in range(clients)
    ]
    client, replies = view(0), []
    for k, own in enumerate(scores):
        client.learn = lambda *_, own=own, **__: (own, type("Fit", (), {"samples": 1, "processed": 0, "loss": 0.0}))
        replies.append((k, method.respond(method.plan(state), client)))
    after = method.absorb(state, reduce(method.plan(state), state, replies))
    for n in names:
        orders = np.stack([own[n].numpy().ravel().argsort(kind="stable") for own in scores])
        sums = orders.argsort(1, kind="stable").sum(0)
        expected = np.empty(sums.size, np.float32)
        expected[sums.argsort(kind="stable")] = np.sort(initial_scores(state.setting, n).numpy(), axis=None)
        np.testing.assert_array_equal(scores_by_rank(state.setting, after.memory["rank"])[n].numpy().ravel(), expected)
        subnet = np.ones(sums.size, bool)
        subnet[np.abs(expected).argsort(kind="stable")[: int(0.5 * sums.size)]] = False
        np.testing.assert_array_equal(after.mask[n].numpy().ravel(), subnet)


def test_frl_the_slope_of_a_score(folder):
    """models/modules.py, MaskConv: the weight times a mask of |s|, which passes the slope on to every edge's |s|."""
    state, view = lab(folder, small("frl"))
    method = FRL()
    ranks = {n: ranked(torch.rand(r.shape, generator=draws(n))) for n, r in state.memory["rank"].items()}
    ask = method.plan(state)
    ask.message.tensors.update(packed(ranks))
    weights, scores, effective = captured(method, ask, view(0))
    slope = {n: torch.randn(s.shape, generator=draws("slope", n)) for n, s in scores.items()}
    _, found = slopes(effective, scores, slope)
    for name, score in scores.items():
        torch.testing.assert_close(found[name], slope[name] * weights[name] * score.sign())
