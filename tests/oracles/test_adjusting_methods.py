"""Methods that change their masks while they train, and scores at the start: against what published code does.

Each function with an underscore is one step of that code in other words: weights and masks in, weights and masks out.
"""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from helpers import lab as helpers_lab
from helpers import same, small, tiny_shards
from secateur.contract.client import Client
from secateur.contract.reducer import reduce
from secateur.contract.state import State
from secateur.learning.gradients import gradient_statistic
from secateur.learning.loop import Effort, Fit, orders
from secateur.learning.optimiser import Training
from secateur.learning.resident import load
from secateur.learning.task import Data
from secateur.methods.feddip import FedDIP
from secateur.methods.feddst import FedDST
from secateur.methods.fedmef import FedMef
from secateur.methods.kit import mask_selection as selection
from secateur.methods.kit.criteria.measured import SNIP, Grasp, Synflow
from secateur.methods.prunefl import PruneFL
from secateur.pruning import mask as masks
from secateur.pruning.allocation import Global, erk
from secateur.streams import Turn
from secateur.wire.message import Message

WIDE = {"name": "mlp", "options": {"hidden": (40, 30)}}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return partial(helpers_lab, tiny_shards(tmp_path_factory.mktemp("shards"), size=8))


def told(tensors, mask=None, samples=1):
    return Message(tensors, mask, {"samples": samples, "processed": 0, "loss": 0.0})


def noise(like, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=generator) for name, t in like.items()}


def _densities(shapes, density):
    """FedPruning/FedPruning, api/pruning/init_scheme.py, get_erdos_renyi_dist: ERK, one full layer after the other."""
    full = set()
    while True:
        room = sum(
            -int(math.prod(s) * (1 - density)) if n in full else int(math.prod(s) * density) for n, s in shapes.items()
        )
        raw = {n: sum(s) / math.prod(s) for n, s in shapes.items() if n not in full}
        epsilon = room / sum(raw[n] * math.prod(shapes[n]) for n in raw)
        if max(raw.values()) * epsilon <= 1:
            return {n: 1.0 if n in full else epsilon * raw[n] for n in shapes}
        full |= {n for n, p in raw.items() if p == max(raw.values())}


def _by_magnitude(weight, count):
    """FedPruning/FedPruning, api/pruning/init_scheme.py, magnitude_prune: the first ones in descending order of |w|."""
    found = torch.zeros(weight.numel(), dtype=torch.bool)
    found[weight.flatten().abs().sort(descending=True).indices[:count]] = True
    return found.view_as(weight)


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95, 0.98])
@pytest.mark.parametrize("shapes", [
    {"fc1": (128, 784), "fc2": (128, 128), "fc3": (10, 128)},
    {"conv1": (32, 3, 3, 3), "conv2": (64, 32, 3, 3), "fc": (128, 4096), "out": (10, 128)},
])  # fmt: skip
def test_erk_is_the_published_one(shapes, sparsity):
    """FedPruning/FedPruning, api/pruning/init_scheme.py; it rounds down for every tensor: a few are missing."""
    ours, theirs = erk(shapes, sparsity), _densities(shapes, 1 - sparsity)
    for name, count in ours.items():
        assert count == pytest.approx(math.prod(shapes[name]) * theirs[name], abs=4)


# ---- FedTiny and FedMef


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("method", ["fedtiny", "fedmef"])
def test_the_first_mask_of_fedtiny_and_fedmef_is_the_published_one(lab, method, sparsity):
    """FedPruning/FedPruning, api/pruning/model_pruning.py (SparseModel, ERK_magnitude), as main_fedmef.py calls it."""
    state, _ = lab(small(method, f"sparsity={sparsity}", "candidates=1", model=WIDE))
    found = state.mask or selection.candidate(state, 0, sparsity)
    shapes = {n: tuple(state.weights[n].shape) for n in state.setting.layout.names("weight")}
    for name, density in _densities(shapes, 1 - sparsity).items():
        count = int(found[name].sum())
        assert count == pytest.approx(density * math.prod(shapes[name]), abs=4)
        assert torch.equal(found[name], _by_magnitude(state.weights[name], count))


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.95, 0.98])
def test_every_candidate_leaves_every_layer_near_its_share(lab, sparsity):
    """What the pool is for: masks that differ between layers, none of which strangles one.

    A layer's share is ERK's times a factor in [1/2, 3/2]; what the factors take from or give to all is shared out, and
    a layer that would be fuller than full leaves the rest to the others: between a third of ERK's and three times it.
    """
    wide = {"name": "mlp", "options": {"hidden": (128, 128)}}
    state, _ = lab(small("fedtiny", model=wide))
    shapes = {n: tuple(state.weights[n].shape) for n in state.setting.layout.names("weight")}
    usual, pool = erk(shapes, sparsity), [selection.candidate(state, number, sparsity) for number in range(8)]
    for mask in pool:
        kept = {n: int(part.sum()) for n, part in mask.items()}
        assert sum(kept.values()) == sum(usual.values())
        for name, count in usual.items():
            assert count / 3 - 1 <= kept[name] <= 3 * count + 1
            assert torch.equal(mask[name], _by_magnitude(state.weights[name], kept[name]))
    assert len({tuple(int(part.sum()) for part in mask.values()) for mask in pool}) > 4  # full layers take no more


def _adjusted(weights, mask, gradients, rows, share):
    """FedPruning/FedPruning, FedTinyServerManager (get_topk_gradients) and init_scheme.py (sparse_update_step).

    Of each client's gradient the k largest among pruned entries; their mean by rows; k smallest kept weights go, then
    of what is not kept k of largest mean come, those that just went included, whose mean is 0.
    """
    found = {}
    for name, kept in mask.items():
        k = int(share * int(kept.sum()))
        mean = torch.zeros(kept.numel())
        for gradient, count in zip(gradients, rows, strict=True):
            idle = (~kept).flatten().nonzero().squeeze(1)
            top = idle[gradient[name].abs().flatten()[idle].topk(min(k, len(idle))).indices]
            mean[top] += gradient[name].flatten()[top] * count / sum(rows)
        flat = kept.flatten().clone()
        active = flat.nonzero().squeeze(1)
        flat[active[weights[name].flatten()[active].abs().topk(k, largest=False).indices]] = False
        idle = (~flat).nonzero().squeeze(1)
        flat[idle[mean.abs()[idle].topk(k).indices]] = True
        found[name] = flat.view_as(kept)
    return found


@pytest.mark.parametrize("method", ["fedtiny", "fedmef"])
def test_an_adjustment_of_fedtiny_is_the_published_one(lab, method, monkeypatch):
    """FedPruning/FedPruning, api/distributed/fedtiny and fedmef: there all layers at once, here blocks = 1."""
    study = small(
        method, "candidates=1", "every=2", "blocks=1", "alpha=0.5", "until=1.0", "sparsity=0.8", rounds=8, model=WIDE
    )
    state, view = lab(study)
    rule = study.build_method()
    mask = selection.candidate(state, 0, 0.8)
    state = replace(state, round=2, mask=mask, weights=masks.apply(noise(state.weights, 1), mask))
    ask = rule.plan(state)
    assert ask.phase == "score"
    gradients = [noise(state.weights, 2), noise(state.weights, 3)]
    replies, rows = [], (1, 3)
    for k, gradient in enumerate(gradients):
        monkeypatch.setattr(Client, "gradient_statistic", lambda *_, g=gradient, **__: (g, Fit(1, 0, 0, 0, 0.0)))
        reply = rule.respond(ask, view(k))
        replies.append((k, told(reply.tensors, reply.mask, rows[k])))
    after = rule.absorb(state, reduce(ask, state, replies))
    share = 0.5 / 2 * (1 + math.cos(2 * math.pi / 8))
    assert same(after.mask, _adjusted(state.weights, mask, gradients, rows, share))


def test_the_pull_of_fedmef_is_the_published_one(lab):
    """FedPruning/FedPruning, fedmef/my_model_trainer_classification.py: loss + sum over tensors of |w[lowest k]|_2.

    Its lowest k are of all entries, which at this density are pruned ones; here of those that are kept.
    """
    method = FedMef(sparsity=0.5, every=2, until=1.0, alpha=0.5, gamma=0.0, blocks=1)
    study = small("fedmef", "sparsity=0.5", rounds=8, training={"epochs": 1, "batch_size": 1000, "lr": 0.1}, model=WIDE)
    state, view = lab(study)
    ask = replace(method.plan(replace(state, round=1)), round=2)
    found = method.respond(ask, view(0)).tensors
    sent = {n: t.clone().requires_grad_() for n, t in ask.message.tensors.items()}
    x, y = view(0).data.batch(slice(None))
    loss = nn.functional.cross_entropy(torch.func.functional_call(view(0).model, sent, (x,)), y)
    share = 0.5 / 2 * (1 + math.cos(2 * math.pi / 8))
    for name, kept in state.mask.items():
        active = kept.flatten().nonzero().squeeze(1)
        count = min(int(share * len(active)), kept.numel() - len(active))  # where nothing can come, nothing will go
        low = active[sent[name].detach().flatten()[active].abs().topk(count, largest=False).indices]
        loss = loss + sent[name].flatten()[low].norm(2)
    slopes = torch.autograd.grad(loss, list(sent.values()))
    for (name, before), slope in zip(sent.items(), slopes, strict=True):
        after = before.detach() - 0.1 * slope
        after = after * state.mask[name] if name in state.mask else after
        torch.testing.assert_close(found[name], after, rtol=1e-5, atol=1e-6)


# ---- FedDST


@pytest.mark.parametrize("every", [1, 2, 5, 15])
@pytest.mark.parametrize("rounds", [7, 30, 400])
def test_feddst_adjusts_in_the_published_rounds(every, rounds, lab):
    """bibikar/feddst, dst.py: rounds from 0, (round - 1) mod R = 0, while the decayed ratio is above 0."""
    end, method = rounds // 2, FedDST(every=every)
    theirs = [t for t in range(rounds) if (t - 1) % every == 0 and t < end]
    setting = replace(lab(small("feddst"))[0].setting, rounds=2 * end)
    assert [r - 1 for r in range(1, rounds + 1) if method.share(setting, r)] == theirs


def _pruned_to(weight, mask, count):
    """bibikar/feddst, models.py, layer_prune: the n - count smallest |w| of all entries of a layer go."""
    flat = mask.flatten().clone()
    flat[weight.flatten().abs().topk(weight.numel() - count, largest=False).indices] = False
    return flat.view_as(mask)


def _grown_to(gradient, mask, count):
    """bibikar/feddst, models.py, layer_grow: the largest |g|, as many as are missing; there also among kept ones."""
    flat = mask.flatten().clone()
    worth = torch.where(flat, -1.0, gradient.abs().flatten())
    flat[worth.topk(count - int(flat.sum())).indices] = True
    return flat.view_as(mask)


def test_a_client_of_feddst_prunes_and_grows_after_it_trained(lab):
    """bibikar/feddst, dst.py, Client.train: after its last epoch, by the gradient of a batch at what it trained.

    How many of each layer stay is taken from here: the code shares sparsities, not densities, between layers.
    """
    study = small("feddst", "every=1", "sparsity=0.8", "alpha=0.5", "until=1.0", model=WIDE)
    state, view = lab(study)
    method, usual = study.build_method(), {n: int(m.sum()) for n, m in state.mask.items()}
    for name, part in state.mask.items():  # the start: layer_prune of theta_0
        assert torch.equal(part, _pruned_to(state.weights[name], torch.ones_like(part), usual[name]))
    ask = replace(method.plan(state), round=2)
    reply = method.respond(ask, view(0))
    trained, _ = view(0).train(ask.message.tensors, state.mask, round_=2)
    gradient, _ = view(0).gradient_statistic("gradient", trained, state.mask, round_=2)
    share = 0.5 / 2 * (1 + math.cos(math.pi / 4))
    for name, held in state.mask.items():
        less = usual[name] - min(int(share * usual[name]), int((~held).sum()))
        fewer = _pruned_to(trained[name], held, less)
        idle = torch.where(held & ~fewer, 0.0, gradient[name])  # what just went comes back last
        expected = _grown_to(idle, fewer, usual[name])
        assert torch.equal(reply.mask[name], expected)
        torch.testing.assert_close(reply.tensors[name], trained[name] * fewer)  # newcomers start at 0


def test_the_server_of_feddst_divides_by_who_kept_and_prunes_the_union(lab):
    """bibikar/feddst, dst.py, main loop: sums over masks, nan to 0, layer_prune where the union is above the budget."""
    study = small("feddst", "every=1", "sparsity=0.8", "until=1.0", model=WIDE)
    state, _ = lab(study)
    method, usual = study.build_method(), {n: int(m.sum()) for n, m in state.mask.items()}
    ask, replies, sums, shares = method.plan(state), [], {}, {}
    for k, rows in enumerate((2, 5, 1)):
        drawn, tensors = noise(state.weights, 10 + k), noise(state.weights, 20 + k)
        mask = {n: _by_magnitude(drawn[n], usual[n]) for n in state.mask}
        tensors = masks.apply(tensors, mask)
        replies.append((k, told(tensors, mask, rows)))
        for name, part in mask.items():
            sums[name] = sums.get(name, 0) + rows * tensors[name]
            shares[name] = shares.get(name, 0) + rows * part.float()
    after = method.absorb(state, reduce(ask, state, replies))
    for name, total in sums.items():
        mean, union = torch.nan_to_num(total / shares[name], nan=0.0), shares[name] > 0
        expected = _pruned_to(mean, union, usual[name])
        assert torch.equal(after.mask[name], expected)
        torch.testing.assert_close(after.weights[name], mean * expected)


# ---- FedDIP


def _lambdas(largest, epochs, segments=20):
    """EricLoong/feddip, client.py, lambda_shrink_cur: 0, then from 5e-4 in steps; the last segment takes the rest."""
    step, length, found = (largest - 5e-4) / (segments - 1), epochs // segments, []
    for i in range(segments):
        found += [0.0 if i == 0 else 5e-4 + step * (i - 1)] * (length + (epochs % segments if i == segments - 1 else 0))
    return found


@pytest.mark.parametrize("rounds", [4, 20, 30, 47, 1000])
@pytest.mark.parametrize("largest", [1e-3, 5e-3])
def test_the_regularisation_of_feddip_grows_in_the_published_steps(rounds, largest):
    """EricLoong/feddip, client.py, lambda_shrink_cur; lambda_shrink = 1e-3 in exp_args.py."""
    assert FedDIP().regularisation == 1e-3
    found = [FedDIP(regularisation=largest).strength(t, rounds) for t in range(rounds)]
    assert found == pytest.approx(_lambdas(largest, rounds))


def test_a_client_of_feddip_steps_dense_weights_by_the_masked_models_slope_and_its_norms(lab):
    """EricLoong/feddip, client.py, train_model: the loss of w * M and lambda_t sum |w * M|_2 give the slope for w."""
    study = small(
        "feddip", "regularisation=0.3", rounds=40, training={"epochs": 2, "batch_size": 8, "lr": 0.1}, model=WIDE
    )
    state, view = lab(study)
    method, one = study.build_method(), view(0)
    ask = replace(method.plan(replace(state, round=20)), round=21)
    found = method.respond(ask, one).tensors
    weights = {n: t.clone() for n, t in ask.message.tensors.items()}
    for rows in orders(len(one.data), Effort(2), Turn(state.setting.seed, 21, 0)):
        for index in torch.split(rows, 8):
            x, y = one.data.batch(index)
            pruned = {n: (t * state.mask[n] if n in state.mask else t).requires_grad_() for n, t in weights.items()}
            loss = nn.functional.cross_entropy(torch.func.functional_call(one.model, pruned, (x,)), y)
            loss = loss + sum(_lambdas(0.3, 40)[20] * pruned[n].norm(2) for n in state.mask)
            for (n, t), slope in zip(weights.items(), torch.autograd.grad(loss, list(pruned.values())), strict=True):
                weights[n] = (t - 0.1 * slope).detach()
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6)


def test_the_server_of_feddip_prunes_as_published(lab):
    """EricLoong/feddip, fl_server.py: zeros by the last mask first, then all tensors together (torch's L1 rule)."""
    rounds, every = 13, 3
    study = small("feddip", f"every={every}", "sparsity=0.9", rounds=rounds, model=WIDE)
    state, _ = lab(study)
    method, held, names = study.build_method(), None, state.setting.layout.names("weight")
    for epoch in range(rounds):
        ask, dense = method.plan(state), noise(state.weights, epoch)
        state = method.absorb(state, reduce(ask, state, [(0, told(dense))]))
        weights = {n: dense[n].masked_fill(~held[n], 0.0) if held else dense[n] for n in names}
        if epoch % every == 0:
            level = 0.9 + (0.5 - 0.9) * (1 - epoch / rounds) ** 3
            level = 0.9 if epoch == rounds - 1 else level  # here the end is what was asked for
            flat = torch.cat([weights[n].flatten().abs() for n in names])
            gone = torch.zeros_like(flat, dtype=torch.bool)
            gone[flat.topk(int(level * len(flat) + 1e-6), largest=False).indices] = True
            parts = torch.split(~gone, [weights[n].numel() for n in names])
            held = {n: part.view_as(weights[n]) for n, part in zip(names, parts, strict=True)}
            weights = {n: weights[n].masked_fill(~held[n], 0.0) for n in names}
        assert same(state.mask, held)
        assert same(state.model(), {**dense, **weights})


# ---- PruneFL


def _reconfigured(weights, held, squares, part, most):
    """jiangyuang/PruneFL, control/algorithm.py: process_layer for each, then architecture_search under max_density.

    Every weight costs the same, and the search is not stopped by its objective but by the budget alone.
    """
    found, queue = {}, []
    for name, mask in held.items():
        active = mask.flatten().nonzero().squeeze(1)
        size = weights[name].flatten().abs()
        least = size[active].sort().values[int(part * len(active))]
        found[name] = (mask.flatten() & (size >= least)).clone()
        queue += [(float(squares[name].flatten()[i]), name, i) for i in (~found[name]).nonzero().squeeze(1).tolist()]
    for _, name, i in sorted(queue, reverse=True)[: most - sum(int(m.sum()) for m in found.values())]:
        found[name][i] = True
    return {name: flat.view_as(held[name]) for name, flat in found.items()}


@pytest.mark.parametrize("round_", [50, 10_000])
def test_a_reconfiguration_of_prunefl_is_the_published_one(round_, lab):
    """jiangyuang/PruneFL, control/algorithm.py; adaptive.py: the open share is 0.3 * 0.5^(round / 10000)."""
    state, _ = lab(small("prunefl", model=WIDE))
    names, method = state.setting.layout.names("weight"), PruneFL(sparsity=0.8)
    importance = {n: t.square() for n, t in noise({n: state.weights[n] for n in names}, 5).items()}
    weights = noise(state.weights, 6)
    total = sum(weights[n].numel() for n in names)
    held = Global(guard=False).keep({n: weights[n].abs() * (i + 1) for i, n in enumerate(names)}, 0.8)  # uneven layers
    weights = masks.apply(weights, held)
    found = method.choose(State(state.setting, round_, weights, held), importance)
    expected = _reconfigured(weights, held, importance, 0.3 * 0.5 ** (round_ / 10_000), total - int(0.8 * total))
    assert same(found, expected)


# ---- scores before training


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    return model, Data(torch.randn(24, 6, dtype=torch.double), torch.arange(24) % 3, kind="tabular")


def _kept(scores, density):
    """ganguli-lab/Synaptic-Flow, Pruners/pruners.py, _global_mask: above the k-th lowest of all."""
    flat = torch.cat([s.flatten() for s in scores.values()])
    least = flat.kthvalue(int((1 - density) * len(flat))).values
    return {n: s > least for n, s in scores.items()}


def test_iterative_synflow_is_the_published_one():
    """ganguli-lab/Synaptic-Flow, prune.py (100 steps, exponential) and Pruners/pruners.py, SynFlow, in float64."""
    model, data = net()
    names = [n for n, p in model.named_parameters() if p.dim() == 2]
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    theirs = ours = {n: torch.ones_like(weights[n], dtype=torch.bool) for n in names}
    for step in range(100):
        left = 0.1 ** ((step + 1) / 100)
        # theirs: weights and masks apart; the mask's product is what the forward pass sees
        size = {n: t.abs().requires_grad_() for n, t in weights.items()}
        seen = {n: t * theirs[n] if n in theirs else t for n, t in size.items()}
        torch.func.functional_call(model, seen, (torch.ones(1, 6, dtype=torch.double),)).sum().backward()
        scores = {n: (size[n].grad * size[n]).detach().abs() for n in names}
        theirs = _kept(scores, left) if int((1 - left) * 164) else theirs
        load(model, masks.apply(weights, ours))
        found, _ = gradient_statistic(model, data, Training(), "flow", Turn(0, 0, 0))
        load(model, weights)
        flow = Synflow().scores({n: weights[n] for n in names}, [{n: found[n] for n in names}], seed=0)
        if step:
            assert all(torch.equal(flow[n] == 0, scores[n] == 0) for n in names)
        ours = Global(guard=False).keep({n: flow[n].masked_fill(~ours[n], -torch.inf) for n in names}, 1 - left)
    assert sum(int(m.sum()) for m in ours.values()) == pytest.approx(16, abs=1)
    assert same(ours, theirs)


def batch_of(model, data):
    x, y = data.batch(slice(None))
    return nn.functional.cross_entropy(model(x), y)


def scores_by(criterion):
    model, data = net()
    found, _ = gradient_statistic(model, data, Training(batch_size=24), criterion.form, Turn(0, 0, 0))
    weights = {n: p.detach() for n, p in model.named_parameters()}
    return criterion.scores(weights, [found], seed=0)


@pytest.mark.parametrize("each", [False, True])
def test_snip_is_the_published_one(each):
    """ganguli-lab/Synaptic-Flow, Pruners/pruners.py, SNIP: the slope by a mask of ones; there over the sum of all."""
    model, data = net()
    weights = {n: p.detach() for n, p in model.named_parameters()}
    ones = {n: torch.ones_like(w).requires_grad_() for n, w in weights.items()}
    x, y = data.batch(slice(None))
    seen = {n: w * ones[n] for n, w in weights.items()}
    nn.functional.cross_entropy(torch.func.functional_call(model, seen, (x,)), y).backward()
    for name, score in scores_by(SNIP(each=each)).items():
        torch.testing.assert_close(score, ones[name].grad.abs())


def test_grasp_is_the_published_one():
    """ganguli-lab/Synaptic-Flow, Pruners/pruners.py, GraSP, at temperature 1: the lowest w (H g) go; there 200."""
    model, data = net()
    parameters = list(model.parameters())
    stopped = torch.cat([g.flatten() for g in torch.autograd.grad(batch_of(model, data), parameters)])
    flowing = torch.cat(
        [g.flatten() for g in torch.autograd.grad(batch_of(model, data), parameters, create_graph=True)]
    )
    (stopped * flowing).sum().backward()
    ours = scores_by(Grasp())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], (parameter.grad * parameter).detach())
    assert np.isfinite(sum(float(s.sum()) for s in ours.values()))
