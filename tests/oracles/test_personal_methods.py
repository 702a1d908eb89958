"""Methods whose code was published, against what that code does in a round: written anew, weights and masks in and out.

Training itself is ours on both sides where a rule around it is tested; where training is the rule, it is torch's own.
All clients of these shards hold as many rows, so a mean over clients is a mean by rows.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from helpers import lab, small, tiny_shards
from secateur.contract.reducer import reduce
from secateur.learning.loop import Effort
from secateur.methods.dispfl import DisPFL
from secateur.methods.fedlex import FedLEx
from secateur.methods.fedpub import FedPUB
from secateur.methods.kit.personal import store_own
from secateur.methods.kit.similarity import random_inputs
from secateur.streams import stream
from secateur.wire.message import Message


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def begun(folder, method, *settings, **training):
    """Return a state before round 1, the views of its four clients, all of them in each round, and the method."""
    training = {"epochs": 2, "batch_size": 8, "lr": 0.2} | training
    study = small(method, *settings, participation=1.0, rounds=6, training=training)
    state, view = lab(folder, study)
    return state, [view(k) for k in range(4)], study.build_method()


def played(method, state, views):
    """Return the state after one round of a method, and its replies."""
    ask = method.plan(state)
    replies = {}
    for k, view in enumerate(views):
        mask = ask.slices[k] if ask.slices else ask.message.mask
        tensors = ask.tensors(k)
        sent = {n: t.masked_fill(~mask[n], 0.0) if mask and n in mask else t for n, t in tensors.items()}
        replies[k] = method.respond(replace(ask, message=replace(ask.message, tensors=sent, mask=mask)), view)
    return method.absorb(state, reduce(ask, state, list(replies.items()))), replies


def weighty(tensors):
    return [n for n in tensors if n.endswith("weight")]


def arrays(tensors):
    return {n: t.numpy().copy() for n, t in tensors.items()}


def tensors(held):
    return {n: torch.from_numpy(np.asarray(a)) for n, a in held.items()}


def close(ours, theirs, tolerance=1e-6):
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name].numpy(), array, rtol=0, atol=tolerance, err_msg=name)


# ---- Complement Sparsification


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_complement_sparsification(folder, sparsity):
    """XJ8/complement-sparsification-FL, fem_sim.py (fit, aggregate_fit) and flip_prune.py (flip_prune, dataless_prune).

    A client that got a tensor with zeros sends what it trained at the zeros. From round 2 on the server adds 1.5 times
    their mean to what it sent; then it keeps of each tensor round((1 - s) n) of largest magnitude. Of round 1 it takes
    the mean as it is.
    """
    state, views, method = begun(folder, "complement", f"sparsity={sparsity}")
    held, sparse = arrays(state.weights), False
    for round_ in range(1, 4):
        answers = []
        for view in views:
            trained = arrays(view.train(tensors(held), None, round_=round_)[0])
            answers.append({n: a * (held[n] == 0) if sparse and n in weighty(held) else a for n, a in trained.items()})
        mean = {n: np.mean([a[n] for a in answers], axis=0) for n in held}
        for name in weighty(held):
            merged = held[name] + 1.5 * mean[name] if sparse else mean[name]
            bar = np.sort(np.abs(merged), axis=None)[::-1][round((1 - sparsity) * merged.size) - 1]
            mean[name] = np.where(np.abs(merged) >= bar, merged, 0)
        held, sparse = {n: a.astype(np.float32) for n, a in mean.items()}, True
        state, _ = played(method, state, views)
        close(state.weights, held)
        assert all(np.array_equal(state.mask[n].numpy(), held[n] != 0) for n in weighty(held))


# ---- masks of clients


def below_percentile(array, mask, percent):
    """Return a mask without what lies strictly below a percentile of its nonzero magnitudes; of one tensor."""
    bar = np.percentile(np.abs(array[(array * mask) != 0]), percent)
    return np.where(np.abs(array) < bar, 0, mask)


def overlapping(held, answers, kept):
    """Return sums over counts where somebody kept a weight, what was held elsewhere; plain means of the rest."""
    merged = {}
    for name, before in held.items():
        total = np.sum([a[name] for a in answers], axis=0)
        count = np.sum([m[name] for m in kept], axis=0) if name in kept[0] else np.full(before.shape, len(answers))
        merged[name] = np.where(count > 0, total / np.maximum(count, 1), before).astype(np.float32)
    return merged


def ones_of(held):
    return {n: np.ones_like(held[n]) for n in weighty(held)}


def test_lotteryfl(folder):
    """charleslipku/LotteryFL, lotteryFL.py, utils.py (prune_by_percentile, mask_model, average_weights_with_masks).

    Every gate is open by accuracy here: A = 0. A step of 50 % twice is the target of 75 % to the weight.
    """
    state, views, method = begun(folder, "lotteryfl", "target=0.75", "share=0.5", "accuracy=0")
    first = arrays(state.weights)
    held, kept, rate = dict(first), [ones_of(first) for _ in views], [1.0] * 4
    for round_ in range(1, 5):
        answers = []
        for k, view in enumerate(views):
            start = {n: a * kept[k].get(n, 1) for n, a in held.items()}
            if rate[k] > 0.25:
                kept[k] = {n: below_percentile(start[n], m, 50) for n, m in kept[k].items()}
                rate[k] *= 0.5
                start = {n: a * kept[k].get(n, 1) for n, a in first.items()}
            mask = {n: torch.from_numpy(m > 0) for n, m in kept[k].items()}
            answers.append(arrays(view.train(tensors(start), mask, round_=round_)[0]))
        held = overlapping(held, answers, kept)
        state, replies = played(method, state, views)
        for k in range(4):
            assert all(np.array_equal(replies[k].mask[n].numpy(), m > 0) for n, m in kept[k].items())
        close(state.weights, held)
    assert rate == [0.25] * 4


@pytest.mark.parametrize("bar", [0.0, 0.75])
def test_sub_fedavg(folder, bar):
    """MMorafah/Sub-FedAvg, client_u.py (train), unstructured.py (fake_prune, dist_masks), sub_fedavg_u.py.

    The accuracy is of the model under the new mask. With a bar of 0.75 some gates are shut at first.
    """
    state, views, method = begun(
        folder, "subfedavg", "target=0.9", "share=0.2", "distance=0.01", f"accuracy={bar}", epochs=5
    )
    held, kept, shut = arrays(state.weights), [ones_of(state.weights) for _ in views], 0
    for round_ in range(1, 4):
        answers = []
        for k, view in enumerate(views):
            mask = {n: torch.from_numpy(m > 0) for n, m in kept[k].items()}
            sent = tensors({n: a * kept[k].get(n, 1) for n, a in held.items()})
            early, _ = view.train(sent, mask, round_=round_, effort=Effort(1))
            late = arrays(view.train(early, mask, round_=round_, effort=Effort(4))[0])
            one, two = ({n: below_percentile(w[n], m, 20) for n, m in kept[k].items()} for w in (arrays(early), late))
            apart = np.mean([np.mean(one[n] != two[n]) for n in one])
            pruned = {n: a * two.get(n, 1) for n, a in late.items()}
            if apart > 0.01 and right(view, pruned) > bar:
                kept[k], late = two, pruned
            else:
                shut += 1
            answers.append(late)
        held = overlapping(held, answers, kept)
        state, replies = played(method, state, views)
        for k in range(4):
            assert all(np.array_equal(replies[k].mask[n].numpy(), m > 0) for n, m in kept[k].items())
        close(state.weights, held)
    assert 0 < shut < 12 or not bar


def right(view, held):
    """Return the share of a client's rows that a model of some weights classifies rightly."""
    x, y = view.data.batch(slice(0, len(view.data)))
    with torch.no_grad():
        return float((torch.func.functional_call(view.model, tensors(held), (x,)).argmax(1) == y).double().mean())


# ---- DisPFL


@pytest.mark.parametrize("round_idx", [0, 3])
def test_dispfl_drops_and_grows(folder, round_idx):
    """rong-dai/DisPFL, standalone/DisPFL/client.py (fire_mask, regrow_mask): rounds there begin with 0."""
    state, views, method = begun(folder, "dispfl", "target=0.5", "alpha=0.5")
    state = replace(state, round=round_idx)
    ask = method.plan(state)
    mask = ask.slices[0]
    sent = {n: t.masked_fill(~mask[n], 0.0) if n in mask else t for n, t in ask.tensors(0).items()}
    reply = method.respond(replace(ask, message=Message(sent, mask)), views[0])
    trained, _ = views[0].train(sent, mask, round_=round_idx + 1)
    slopes, _ = views[0].gradient_statistic("gradient", trained, mask, round_=round_idx + 1)
    ratio = 0.5 / 2 * (1 + np.cos(round_idx * np.pi / 6))
    for name, kept in mask.items():
        found, w, g = kept.numpy().flatten(), trained[name].numpy().flatten(), slopes[name].numpy().flatten()
        count = int(np.ceil(ratio * found.sum()))
        found[np.argsort(np.where(found, np.abs(w), 1e5))[:count]] = False
        found[np.argsort(np.where(found, 1e5, -np.abs(g)))[:count]] = True
        assert np.array_equal(reply.mask[name].numpy().flatten(), found), name


def test_dispfl_mixes_what_was_trained(folder):
    """rong-dai/DisPFL, standalone/DisPFL/dispfl_api.py (train, _aggregate_func).

    A neighbour's weights count under the mask that it trained with; the mean is cut by the client's new mask. What a
    neighbour dropped after training is not passed on by us, a departure: it is left out on both sides.
    """
    state, _, _ = begun(folder, "dispfl")
    draw, method = np.random.default_rng(0), DisPFL(target=0.5, neighbours=2)
    held, old, new = [], [], []
    for k in range(4):
        shapes = {n: t.shape for n, t in state.weights.items()}
        old.append({n: draw.random(shapes[n]) < 0.5 for n in weighty(shapes)})
        new.append({n: np.where(draw.random(m.shape) < 0.2, draw.random(m.shape) < 0.5, m) for n, m in old[k].items()})
        trained = {n: draw.normal(size=s).astype(np.float32) for n, s in shapes.items()}
        held.append({n: a * (old[k][n] & new[k][n]) if n in old[k] else a for n, a in trained.items()})
        store_own(state, "weights", [(k, tensors(held[k]))])
        store_own(state, "mask", [(k, tensors(new[k]))])
    state = replace(state, round=1)
    order = torch.randperm(4, generator=stream(state.setting.seed, "neighbours", 2, 1)).tolist()
    around = sorted([1, *[k for k in order if k != 1][:2]])
    mixed = method.mixture(state, 1, 2)
    for name, first in held[0].items():
        there = [old[j][name] & new[j][name] if name in old[j] else np.ones(first.shape) for j in around]
        count = np.sum(there, axis=0)
        part = np.divide(1, count, out=np.zeros(first.shape), where=count != 0)
        mean = np.sum([part * held[j][name] for j in around], axis=0)
        cut = new[1].get(name, True)
        np.testing.assert_allclose(np.where(cut, mixed[name].numpy(), 0), np.where(cut, mean, 0), atol=1e-6)


# ---- IST


def test_independent_subnet_training(folder):
    """BinhangYuan/IST_Release, distributed_3layer_..._gloo.py and ist_utilis.py (partition_..., update_tensor_...).

    A hand's model is made of rows of the first layer, rows and columns of the second, columns of the last; it takes
    steps of plain SGD, and its tensors are written back to where they came from. Ours has biases; the last belongs to
    all hands and is averaged.
    """
    state, views, method = begun(folder, "ist", epochs=1, batch_size=64)  # all rows of a client are one step
    slices = method.plan(state).slices
    after, _ = played(method, state, views)
    held, last = arrays(state.weights), []
    places = [[np.flatnonzero(slices[k][f"{n}.bias"].numpy()) for n in ("fc1", "fc2")] for k in range(4)]
    assert [len(one) for one, _ in places] == [3] * 4  # 12 and 8 units, dealt to four
    assert sorted(np.concatenate([two for _, two in places]).tolist()) == list(range(8))
    for (one, two), view in zip(places, views, strict=True):
        part = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3))
        parts = (
            held["fc1.weight"][one], held["fc1.bias"][one], held["fc2.weight"][np.ix_(two, one)], held["fc2.bias"][two],
            held["fc3.weight"][:, two], state.weights["fc3.bias"].numpy(),
        )  # fmt: skip
        with torch.no_grad():
            for parameter, value in zip(part.parameters(), parts, strict=True):
                parameter.copy_(torch.from_numpy(value))
        x, y = view.data.batch(slice(0, len(view.data)))
        nn.functional.cross_entropy(part(x), y).backward()
        with torch.no_grad():
            moved = [(p - 0.2 * p.grad).numpy() for p in part.parameters()]
        held["fc1.weight"][one], held["fc1.bias"][one] = moved[0], moved[1]
        held["fc2.weight"][np.ix_(two, one)], held["fc2.bias"][two] = moved[2], moved[3]
        held["fc3.weight"][:, two] = moved[4]
        last.append(moved[5])
    held["fc3.bias"] = np.mean(last, axis=0)
    close(after.weights, held)


# ---- FED-PUB


def test_fed_pub_server(folder):
    """JinheonBaek/FED-PUB, fedpub/server.py (update): cosines, exp of their multiple, rows that add up to 1."""
    state, _, method = begun(folder, "fedpub", "tau=3")
    draw = np.random.default_rng(0)
    held = [{n: draw.normal(size=t.shape).astype(np.float32) for n, t in state.weights.items()} for _ in range(4)]
    seen = draw.random((4, 8)).astype(np.float32)
    told = [
        (k, Message(tensors({**held[k], "embedding": seen[k]}), None, {"samples": 5, "processed": 0, "loss": 0.0}))
        for k in range(4)
    ]
    after = method.absorb(state, reduce(method.plan(state), state, told))
    alike = np.array([[a @ b / np.sqrt(a @ a) / np.sqrt(b @ b) for b in seen] for a in seen])
    shares = np.exp(3 * alike) / np.exp(3 * alike).sum(1, keepdims=True)
    sent = method.plan(after).own
    for k in range(4):
        close(sent[k], {n: sum(s * w[n] for s, w in zip(shares[k], held, strict=True)) for n in held[0]}, 1e-5)
    close(after.weights, {n: np.mean([w[n] for w in held], axis=0) for n in held[0]})


def test_fed_pub_client(folder):
    """JinheonBaek/FED-PUB, fedpub/client.py (train) and layers.py (MaskedLinear).

    Weights and mask of a linear layer learn together from the loss of their product. Its two penalties are taken of
    tensors without a gradient, so ours are turned down until they vanish.
    """
    state, views, _ = begun(folder, "fedpub", epochs=3, batch_size=64)
    method = FedPUB(l1=1e-12, prox=0)
    reply = method.respond(method.plan(state), views[0])
    learnt = {n: t.clone().requires_grad_() for n, t in state.weights.items()}
    soft = {n: torch.ones_like(learnt[n]).requires_grad_() for n in weighty(learnt)}
    optimiser = torch.optim.SGD([*learnt.values(), *soft.values()], lr=0.2)
    x, y = views[0].data.batch(slice(0, len(views[0].data)))
    for _ in range(3):
        optimiser.zero_grad()
        used = {n: t * soft[n] if n in soft else t for n, t in learnt.items()}
        nn.functional.cross_entropy(torch.func.functional_call(views[0].model, used, (x,)), y).backward()
        optimiser.step()
    close(reply.tensors, arrays({n: t.detach() for n, t in learnt.items()}), 1e-5)
    close(views[0].memory, {f"soft.{n}": t.detach().numpy() for n, t in soft.items()}, 1e-5)


def test_fed_pub_masks_are_cut_when_a_model_is_used(folder):
    """JinheonBaek/FED-PUB, layers.py (prune): out of training a mask's entries below l1 in magnitude are 0.

    So it is when models are embedded (client.py, get_functional_embedding): the model is not in training there.
    """
    state, views, _ = begun(folder, "fedpub")
    method = FedPUB(l1=0.9)  # high: what training moves lies on both sides of it
    reply = method.respond(method.plan(state), views[0])
    soft = {n.removeprefix("soft."): t.numpy() for n, t in views[0].memory.items()}
    firm = {n: np.where(np.abs(m) < 0.9, 0, m) for n, m in soft.items()}
    assert any((m == 0).any() for m in firm.values())
    weights = {n: t.numpy() for n, t in reply.tensors.items() if n != "embedding"}
    used = {n: w * firm.get(n, 1) for n, w in weights.items()}
    close(method.uses(Message(tensors(weights)), views[0]), used)
    x = random_inputs(views[0], method.proxies).flatten(1).numpy()
    for n in ("fc1", "fc2"):
        x = np.maximum(x @ used[f"{n}.weight"].T + used[f"{n}.bias"], 0)
    np.testing.assert_allclose(reply.tensors["embedding"].numpy(), x.mean(0), atol=1e-5)


# ---- FedLEx


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_fedlex(folder, optimiser):
    """ChristianInterno/FedLEx, GTL_utils.py (create_mask) and fedlexclient.py (update).

    The squares of what explorers are away from the base have a mean, which is brought to [0, 1] in each tensor; each
    gradient is multiplied by it before the optimiser's step.
    """
    state, views, _ = begun(folder, "fedlex", epochs=3, batch_size=64, lr=0.05, optimiser=optimiser)
    draw = torch.Generator().manual_seed(0)
    scouts = [{n: t + torch.rand(t.shape, generator=draw) for n, t in state.weights.items()} for _ in range(4)]
    for k, scout in enumerate(scouts):
        state.archive[f"deviation/{k}"] = {n: (state.weights[n] - t).square() for n, t in scout.items()}
    state.notes["explore"] = 1
    method = FedLEx()
    reply = method.respond(method.plan(state), views[0])
    learnt = {n: t.clone().requires_grad_() for n, t in state.weights.items()}
    made = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimiser](learnt.values(), lr=0.05)
    x, y = views[0].data.batch(slice(0, len(views[0].data)))
    for _ in range(3):
        made.zero_grad()
        nn.functional.cross_entropy(torch.func.functional_call(views[0].model, learnt, (x,)), y).backward()
        for name, tensor in learnt.items():
            spread = torch.stack([(s[name] - state.weights[name]) ** 2 for s in scouts]).mean(0)
            tensor.grad *= (spread - spread.min()) / (spread.max() - spread.min())
        made.step()
    close(reply.tensors, arrays({n: t.detach() for n, t in learnt.items()}), 1e-4)
