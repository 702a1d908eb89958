"""Methods that merge, and the rules of allocation, against what published code computes.

Each test has a few lines in our own words of what a repository's file does, and no more than that: weights and masks
in, weights and masks out. What cannot be had is not here: Federated Dropout's authors published no code.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from helpers import lab, small, tiny_shards
from secateur.contract.reducer import reduce
from secateur.contract.state import Setting, State
from secateur.methods.autoflip import AutoFLIP
from secateur.methods.dpf import DPF
from secateur.methods.fedsparsify import FedSparsify
from secateur.methods.fedsparsify_local import FedSparsifyLocal
from secateur.methods.fjord import FjORD
from secateur.methods.heterofl import HeteroFL
from secateur.methods.kit.consensus import Majority
from secateur.methods.kit.learned_resize import compressed, dilated, identity
from secateur.methods.kit.schedule import Cubic, EveryRound, PQIndex
from secateur.methods.kit.similarity import effective_rank
from secateur.methods.salientgrads import SalientGrads
from secateur.pruning.allocation import LAMP, Global, erk
from secateur.pruning.granularity import Hybrid, Weight
from secateur.pruning.structure import Layout
from secateur.wire.message import Message, Spec

SHAPES = {"a.weight": (6, 5), "a.bias": (6,), "b.weight": (3, 6), "b.bias": (3,)}
ROLES = {n: n.rpartition(".")[2] for n in SHAPES}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def setting(rounds=10, clients=4):
    return Setting(0, rounds, clients, 1.0, Layout(ROLES), {n: Spec(shape) for n, shape in SHAPES.items()})


def drawn(seed, shapes=None):
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=draw) for n, shape in (shapes or SHAPES).items()}


def told(tensors, rows, mask=None):
    return Message(tensors, mask, {"samples": rows, "processed": rows, "loss": 0.0})


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], torch.as_tensor(tensor, dtype=torch.float32), msg=name)


# ---- FedSparsify


def purge(weights, sparsity):
    """Keep |w| >= the floor(s N)-th of all sizes in ascending order, biases among them."""
    sizes = np.sort(np.concatenate([np.abs(w.numpy()).ravel() for w in weights.values()]))
    return {n: w.abs() >= float(sizes[int(sparsity * len(sizes))]) for n, w in weights.items()}


@pytest.mark.parametrize("done", [1, 2, 5, 9, 10])
def test_fedsparsify_merges_then_purges(done):
    """dstripelis/FedSparsify: utils/model_merge.py (weighted average), utils/model_purge.py (gradual, global)."""
    method = FedSparsify(
        schedule=Cubic(sparsity=0.9), allocation=Global(guard=False), granularity=Weight(biases=True, norms=True)
    )
    state = State(setting(), done - 1, drawn(0))
    clients, rows = [drawn(k + 1) for k in range(4)], [3, 1, 5, 2]
    after = method.absorb(state, reduce(method.plan(state), state, [(k, told(clients[k], rows[k])) for k in range(4)]))
    merged = {n: sum(n_k / 11 * w[n] for n_k, w in zip(rows, clients, strict=True)) for n in SHAPES}
    level = 0.9 + (0.0 - 0.9) * (1 - (done - 1) / (10 - 1)) ** 3
    mask = purge(merged, level) if level > 0 else {n: torch.ones_like(w, dtype=torch.bool) for n, w in merged.items()}
    assert_close(after.weights, {n: w * mask[n] for n, w in merged.items()})
    if level > 0:
        assert all(torch.equal(after.mask[n], m) for n, m in mask.items())


@pytest.mark.parametrize("voters", [2, 3, 4])
def test_fedsparsify_local_votes(voters):
    """dstripelis/FedSparsify, utils/model_merge.py: v >= floor(K/2); zeros of who dropped a weight enter the mean.

    With one voter the published threshold is 0 votes and everything comes back; ours asks for one (``half``).
    """
    method = FedSparsifyLocal(schedule=Cubic(sparsity=0.5, start=0), consensus=Majority("half"))
    state = State(setting(clients=voters), 0, drawn(0))
    rows = [3, 1, 5, 2][:voters]
    trained = [drawn(k + 1) for k in range(voters)]
    own = [{n: w.abs() > 0.7 for n, w in t.items() if n.endswith("weight")} for t in trained]
    sent = [{n: w * m[n] if n in m else w for n, w in t.items()} for t, m in zip(trained, own, strict=True)]
    replies = [(k, told(sent[k], rows[k], own[k])) for k in range(voters)]
    after = method.absorb(state, reduce(method.plan(state), state, replies))
    expected = {}
    for name, shape in SHAPES.items():
        mean = sum(n_k * w[name] for n_k, w in zip(rows, sent, strict=True)) / sum(rows)
        votes = sum(m[name].int() for m in own) if name in own[0] else torch.full(shape, voters)
        expected[name] = mean * (votes >= np.floor(voters / 2))
    assert_close(after.weights, expected)


# ---- AutoFLIP


@pytest.mark.parametrize("level", [0.1, 0.3, 0.5])
def test_autoflip_masks_by_the_quantile_of_guidance(level):
    """ChristianInterno/AutoFLIP: src/GTL_utils.py (learning spread), src/server/Autoflipserver_Exploration.py.

    Mean over scouts of (scout - base)^2, min-max in each tensor, one quantile over all, strictly above it.
    """
    method = AutoFLIP(schedule=EveryRound(sparsity=level), granularity=Hybrid(rho=0.0))
    base, scouts = drawn(0), [drawn(k + 1) for k in range(4)]
    archive = {f"deviation/{k}": {n: (base[n] - s[n]).square() for n in base} for k, s in enumerate(scouts)}
    state = State(setting(), 0, base, notes={"explore": 1}, archive=archive)
    spread = {n: torch.stack([(s[n] - base[n]) ** 2 for s in scouts]).mean(0) for n in base}
    guide = {n: (g - g.min()) / (g.max() - g.min()) for n, g in spread.items()}
    threshold = torch.quantile(torch.cat([g.flatten() for g in guide.values()]), level)
    mask = method.plan(state).message.mask
    assert all(torch.equal(mask[n], g > threshold) for n, g in guide.items())


# ---- SalientGrads


def test_salientgrads_scores_and_mask(shards):
    """riohib/SalientGrads, fedml_api/standalone/sailentgrads/snip.py.

    A score is the size of the gradient at a mask of ones that multiplies the weight; clients count alike; the
    int(keep N) best stay, biases are not masked.
    """
    state, view = lab(shards, small("salientgrads", training={"batch_size": 1000}))
    method = SalientGrads(sparsity=0.5, allocation=Global(guard=False))
    ask = method.plan(state)
    replies = [(k, method.respond(ask, view(k))) for k in ask.clients]
    total: dict[str, torch.Tensor] = {}
    for k, message in replies:
        client = view(k)
        ones = {n: torch.ones_like(state.weights[n], requires_grad=True) for n in message.tensors}
        made = {n: t * ones[n] if n in ones else t for n, t in state.weights.items()}
        x, y = client.data.batch(slice(None))
        loss = nn.functional.cross_entropy(torch.func.functional_call(client.model, made, (x,)), y)
        for n, g in zip(ones, torch.autograd.grad(loss, list(ones.values())), strict=True):
            torch.testing.assert_close(message.tensors[n], g.abs())
            total[n] = total.get(n, 0) + message.tensors[n] / len(replies)
    flat = torch.cat([t.flatten() for t in total.values()])
    least = flat.topk(int(len(flat) * 0.5)).values[-1]
    mask = method.absorb(state, reduce(ask, state, replies)).mask
    assert all(torch.equal(mask[n], t >= least) for n, t in total.items())


# ---- models of several widths


def nested(weights, width):
    """Return which rows and columns of an MLP a width holds: ceil(width u) leading outputs, all of the last layer's."""
    index, inputs = {}, None
    matrices = [n for n in weights if n.endswith("weight")]
    for name in matrices:
        outputs, columns = weights[name].shape
        inputs = torch.arange(columns) if inputs is None else inputs
        held = torch.arange(outputs if name == matrices[-1] else int(np.ceil(outputs * width)))
        index[name] = (held[:, None], inputs[None])
        index[name.replace("weight", "bias")] = (held,)
        inputs = held
    return index


def test_heterofl_counts_holders(shards):
    """diaoenmao/HeteroFL-..., src/fed.py: each weight's sum over its holders, by how many they are.

    Clients of equal rows: the published code counts them alike, ours by rows. Its mask of labels that a client lacks
    is not transcribed.
    """
    state, _ = lab(shards, small("heterofl", participation=1.0))
    method = HeteroFL(levels=3)
    ask = method.plan(state)
    shapes = {n: t.shape for n, t in state.weights.items()}
    index = {k: nested(state.weights, 2.0 ** -(k % 3)) for k in (1, 2)}  # nobody holds the whole
    trained, sums = {}, {n: torch.zeros(s) for n, s in shapes.items()}
    count = {n: torch.zeros(s) for n, s in shapes.items()}
    for k, held in index.items():
        full = drawn(k, shapes)
        trained[k] = {n: torch.zeros(shapes[n]) for n in shapes}
        for n, at in held.items():
            trained[k][n][at] = full[n][at]
            sums[n][at] += full[n][at]
            count[n][at] += 1
    replies = [(k, told(tensors, 7, ask.slices[k])) for k, tensors in trained.items()]
    found = method.absorb(state, reduce(ask, state, replies)).weights
    means = {n: torch.where(count[n] > 0, sums[n] / count[n].clamp(min=1), state.weights[n]) for n in shapes}
    assert_close(found, means)


def test_fjord_updates_from_the_widest_to_the_narrowest(shards):
    """adap/flower, baselines/fjord/fjord/strategy.py: for each width the mean by rows over who can carry it."""
    state, _ = lab(shards, small("fjord", participation=1.0))
    method = FjORD(levels=4)
    ask = method.plan(state)
    shapes, rows = {n: t.shape for n, t in state.weights.items()}, {0: 5, 1: 2, 2: 9}  # client 3, the widest, is silent
    trained = {k: drawn(k, shapes) for k in rows}
    expected = {n: t.clone() for n, t in state.weights.items()}
    for width in (1.0, 0.75, 0.5, 0.25):
        able = [k for k in rows if (k + 1) / 4 >= width]
        for n, at in nested(state.weights, width).items():
            if able:
                expected[n][at] = (sum(rows[k] * trained[k][n] for k in able) / sum(rows[k] for k in able))[at]
    replies = []
    for k, tensors in trained.items():
        mask = ask.slices[k]
        replies.append((k, told({n: t * mask[n] if n in mask else t for n, t in tensors.items()}, rows[k], mask)))
    assert_close(method.absorb(state, reduce(ask, state, replies)).weights, expected)


# ---- FedConv, FedCompress


def test_fedconv_convolves_each_kernel_position():
    """lemingshen/FedConv, utils/federated_settings.py: Base_Filter, without its residual and activation.

    At each kernel position a convolution (back: a transposed one) as large as what the two sizes differ by, its
    weight normed. Where f stands differs: after the convolution there, within the residual here (see ``fedconv``).
    """
    large, small_ = {"w": (8, 6, 3, 3)}, {"w": (6, 4, 3, 3)}
    learnt = identity(large, small_)
    learnt = {n: t if n.startswith("mix") else torch.rand(t.shape) for n, t in learnt.items()}
    impulse = torch.zeros(3, 3)
    impulse[0, 0] = 1.0
    kernel = impulse + learnt["kernel.w"] / 3
    kernel = (learnt["gain.w"] * kernel / kernel.norm())[None, None]
    big, little = torch.randn(8, 6, 3, 3), torch.randn(6, 4, 3, 3)
    down, up = torch.zeros(6, 4, 3, 3), torch.zeros(8, 6, 3, 3)
    for i in range(3):
        for j in range(3):
            down[:, :, i, j] = nn.functional.conv2d(big[None, None, :, :, i, j], kernel)[0, 0]
            up[:, :, i, j] = nn.functional.conv_transpose2d(little[None, None, :, :, i, j], kernel)[0, 0]
    torch.testing.assert_close(compressed({"w": big}, learnt, small_)["w"], down)
    torch.testing.assert_close(dilated({"w": little}, learnt, large)["w"], up)


def test_fedcompress_scores_features_by_their_singular_values():
    """FederatedML/FedCompress, src/utils.py: exp of the entropy of the singular values' shares, of rows of length 1."""
    features = torch.randn(20, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = features / features.norm(dim=1, keepdim=True)
    sizes = np.linalg.svd(rows.numpy(), compute_uv=False)
    shares = sizes / np.abs(sizes).sum()
    assert effective_rank(rows) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


# ---- allocations and PQ index


def test_lamp_against_its_authors():
    """jaeho-lee/layer-adaptive-sparsity, tools/pruners.py: w^2 by what is left of the sum in ascending order."""
    weights = {n: w for n, w in drawn(3).items() if n.endswith("weight")}
    scores = {}
    for name, w in weights.items():
        ordered, where = (w**2).flatten().sort()
        before = ordered.cumsum(0) - ordered
        scores[name] = torch.zeros(w.numel()).scatter(0, where, ordered / ((w**2).sum() - before)).reshape(w.shape)
    flat = torch.cat([s.flatten() for s in scores.values()])
    for sparsity in (0.25, 0.5, 0.75):
        least = flat.topk(int(np.round(len(flat) * (1 - sparsity)))).values[-1]
        mask = LAMP().keep({n: w.abs() for n, w in weights.items()}, sparsity)
        assert all(torch.equal(mask[n], s >= least) for n, s in scores.items())


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.98])
def test_erk_against_rigl(sparsity):
    """google-research/rigl, rigl/sparse_utils.py: densities by the shapes, dense where they would be above 1.

    There a layer's zeros are floored one by one; our counts differ by what that leaves over, and their sum is exact.
    """
    shapes = {"a": (16, 3, 3, 3), "b": (32, 16, 3, 3), "c": (64, 288), "d": (10, 64)}
    raw = {n: sum(s) / math.prod(s) for n, s in shapes.items()}
    dense: set[str] = set()
    while True:
        zeros = {n: math.floor(sparsity * math.prod(s)) for n, s in shapes.items()}
        rest = {n: math.prod(s) - zeros[n] for n, s in shapes.items() if n not in dense}
        share = (sum(rest.values()) - sum(zeros[n] for n in dense)) / sum(raw[n] * math.prod(shapes[n]) for n in rest)
        highest = max(raw[n] for n in rest)
        if highest * share <= 1:
            break
        dense |= {n for n in rest if raw[n] == highest}
    expected = {n: math.prod(s) * (1.0 if n in dense else share * raw[n]) for n, s in shapes.items()}
    found = erk(shapes, sparsity)
    assert all(abs(found[n] - kept) <= 2 for n, kept in expected.items())
    total = sum(math.prod(s) for s in shapes.values())
    assert sum(found.values()) == total - math.floor(sparsity * total + 1e-6)


@pytest.mark.parametrize(("p", "q", "eta", "gamma"), [(0.5, 1.0, 0.0, 1.0), (1.0, 2.0, 0.1, 0.8), (0.5, 2.0, 0.0, 1.0)])
def test_pq_index_prunes_as_published(p, q, eta, gamma):
    """diaoenmao/Pruning-Deep-Neural-Networks-from-a-Sparsity-Perspective, src/modules: sparsity_index, compression.

    There the bound is rounded up and the count down: ours is larger, by less than two.
    """
    weights = torch.randn(500, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    d, norm = 500.0, torch.linalg.norm
    index = (norm(weights, q) - d ** (1 / q - 1 / p) * norm(weights, p)) / norm(weights, q)
    bound = math.ceil(d * (1 + eta) ** (q / (p - q)) * float(1 - index) ** (q * p / (q - p)))
    pruned = math.floor(d * min(max(gamma * (1 - bound / d), 0), 0.9))
    share = PQIndex(p=p, q=q, eta=eta, gamma=gamma, beta=0.9).goes(weights)
    assert -1e-9 <= share * d - pruned < 2


# ---- DPF


def test_dpf_masks_and_steps_as_an_unofficial_code(shards):
    """INCHEON-CHO/Dynamic_Model_Pruning_with_Feedback (not the authors'): pruning/utils.py, pruning/dpf/mnn.py.

    A weight stays that is strictly above the floor(s N)-th size: one fewer than here. The gradient at w * m is handed
    to w as it is, and the step is taken on dense w. The ramp ends at the second milestone, 225 epochs of 300.
    """
    state, view = lab(shards, small("dpf", rounds=8, training={"batch_size": 1000, "epochs": 1, "lr": 0.1}))
    method = DPF(sparsity=0.9)
    names = state.setting.layout.names("weight")
    sent = {n: t.clone() for n, t in state.weights.items()}
    sizes = np.sort(np.concatenate([sent[n].abs().numpy().ravel() for n in names]))
    for done in (1, 3):
        level = 0.9 - 0.9 * (1 - done / 6) ** 3
        threshold = float(sizes[int(len(sizes) * level)])
        mask = method.mask(state.setting, sent, done)
        if all(bool((sent[n].abs() > threshold).any(1).all()) for n in names):  # else the guard has a say
            assert all(torch.equal(mask[n], sent[n].abs() >= threshold) for n in names)
    client, mask = view(0), method.mask(state.setting, sent, 1)
    parameters = {n: (t * mask[n] if n in mask else t).requires_grad_() for n, t in sent.items()}
    x, y = client.data.batch(slice(None))
    loss = nn.functional.cross_entropy(torch.func.functional_call(client.model, parameters, (x,)), y)
    steps = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    state = State(state.setting, 1, sent, mask)
    found = method.respond(method.plan(state), client).tensors
    for name in names:
        torch.testing.assert_close(found[name], sent[name].detach() - 0.1 * steps[name])
