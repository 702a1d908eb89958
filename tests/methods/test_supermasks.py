"""Methods that learn masks over weights that never move: their rules by hand, and what travels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from helpers import lab, model_of, play, rows_of, same, small, tiny_shards
from secateur.contract.reducer import reduce
from secateur.errors import ConfigError
from secateur.learning.optimiser import Training
from secateur.learning.supermask import learn, signed_constants, straight_through
from secateur.learning.task import Data, Regression
from secateur.methods.fedpm import FedPM
from secateur.methods.frl import FRL, initial_scores
from secateur.methods.hidenseek import HideNseek
from secateur.pruning import mask as masks
from secateur.pruning.allocation import Global
from secateur.pruning.ranking import packed, planes, ranked, unpacked
from secateur.streams import Turn, stream
from secateur.wire.codec import encode, part_sizes
from secateur.wire.message import Message


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


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


def test_frozen_weights_are_signs_times_a_gain_over_the_root_of_the_fan_in():
    """A kernel of 2 x 2 positions has a fan-in of 4, whose root is 2."""
    tensors = {"w": torch.tensor([[[[-3.0, 0.0], [1.0, 2.0]]]]), "b": torch.tensor([5.0])}
    found = signed_constants(tensors, ["w"], 3.0)
    assert found["w"].flatten().tolist() == [-1.5, 1.5, 1.5, 1.5]
    assert found["b"].tolist() == [5.0]


def test_scores_move_by_the_gradient_through_the_weights_made_of_them():
    """One step on y = u x with u = 2 s, mean squared error: ds = 2 * mean(2 (u x - y) x)."""
    model = nn.Linear(1, 1, bias=False)
    data = Data(torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 1.0]), kind="tabular", task=Regression())
    before = model.weight.detach().clone()
    found, done = learn(
        model, data, Training(epochs=1, batch_size=2, lr=0.01), {"weight": torch.tensor([[0.5]])},
        lambda scores: {n: 2 * s for n, s in scores.items()}, Turn(0, 1, 0),
    )  # fmt: skip
    # u = 1: residuals 1 and 2, slopes of u: mean(2 * 1 * 1, 2 * 2 * 3) = 7
    assert found["weight"].item() == pytest.approx(0.5 - 0.01 * 2 * 7)
    assert (done.steps, done.processed) == (1, 2)
    assert torch.equal(model.weight, before)


# ---- FedPM


@pytest.mark.parametrize(("prior", "expected"), [(1.0, [0.99, 0.5, 0.01]), (2.0, [0.745, 0.5, 0.255])])
def test_the_posterior_by_hand(folder, prior, expected):
    """Two clients, a bit counts 0.99 or 0.01: votes 1.98, 1 and 0.02; (v + l - 1)/(2 + 2 l - 2)."""
    method = FedPM(prior=prior)
    state, _ = lab(folder, small("fedpm", f"prior={prior}"))
    ask = method.plan(state)
    masks = []
    for k in range(2):
        mask = {n: torch.ones_like(t, dtype=torch.bool) for n, t in ask.message.tensors.items()}
        mask["fc3.weight"][0, 1] = k == 0
        mask["fc3.weight"][0, 2] = False
        masks.append((k, voted(mask, samples=100 if k else 1)))  # one client, one vote
    after = method.absorb(state, reduce(ask, state, masks))
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
    assert values.abs().tolist() == pytest.approx([2.718281828 / 4] * len(values))  # 16 inputs


def test_updates_and_half_precision_leave_masks_alone(folder, tmp_path):
    play(small("fedpm", rounds=2), tmp_path / "plain", folder)
    play(small("fedpm", "wire.replies=updates", rounds=2), tmp_path / "updates", folder)
    assert same(model_of(tmp_path / "plain"), model_of(tmp_path / "updates"))
    summary = play(small("fedpm", "wire.values=bf16", rounds=2), tmp_path / "half", folder)
    assert summary["left_out"] == {}


# ---- FRL


@given(st.integers(1, 400), st.integers(0, 99))
def test_rankings_are_permutations_that_survive_their_bytes(size, seed):
    scores = torch.rand(size, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    rank = ranked(scores)
    assert sorted(rank.tolist()) == list(range(size))
    by_hand = sorted(range(size), key=lambda e: (float(scores[e]), e))
    assert [int(rank[e]) for e in by_hand] == list(range(size))
    shapes = {"w": (size,)}
    written = packed({"w": rank})
    assert {n: tuple(t.shape) for n, t in written.items()} == planes(shapes)
    assert len(written) == (1 if size <= 256 else 2)
    assert torch.equal(unpacked(written, shapes)["w"], rank)


def test_what_is_no_ranking_stays_within_the_tensor():
    hostile = {"w@0": torch.full((300,), 255, dtype=torch.uint8), "w@1": torch.full((300,), 255, dtype=torch.uint8)}
    assert unpacked(hostile, {"w": (300,)})["w"].max() == 299


def test_votes_are_sums_of_ranks_and_every_client_counts_alike(folder):
    state, _ = lab(folder, small("frl"))
    method = FRL()
    ask = method.plan(state)
    shape = state.setting.specs["fc3.weight"].shape
    up, down = (torch.arange(24).view(shape), torch.arange(23, -1, -1).view(shape))
    others = {n: r for n, r in state.memory["rank"].items() if n != "fc3.weight"}
    told = {"samples": 1, "processed": 0, "loss": 0.0}
    replies = [
        (k, Message(packed({**others, "fc3.weight": rank.int()}), None, told | {"samples": 10**k}))
        for k, rank in enumerate((up, up, down))
    ]
    after = method.absorb(state, reduce(ask, state, replies))
    assert torch.equal(after.memory["rank"]["fc3.weight"].long(), up)  # two against one, whatever their rows
    # of the edges in the ranking's order
    sizes = initial_scores(state.setting, "fc3.weight").flatten().sort().values.abs()
    assert set(after.mask["fc3.weight"].flatten().nonzero().flatten().tolist()) == set(sizes.topk(12).indices.tolist())
    assert same(after.weights, state.weights)


def test_first_scores_lie_evenly_on_both_sides_of_zero(folder):
    state, _ = lab(folder, small("frl"))
    scores = initial_scores(state.setting, "fc1.weight") * 4  # 16 inputs
    assert -1 <= scores.min() < -0.9
    assert 0.9 < scores.max() <= 1
    assert abs(float(scores.mean())) < 0.15  # 192 draws: a standard deviation of 0.042


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.98])
def test_a_signal_is_as_strong_at_every_density(sparsity):
    """What (1 - S) n of n inputs add up to has the variance (1 - S) n w^2, whatever S."""
    weights = signed_constants({"w": torch.ones(1, 100)}, ["w"], FRL(sparsity=sparsity).gain)["w"]
    assert (1 - sparsity) * float(weights.square().sum()) == pytest.approx(1)


@pytest.mark.parametrize(("sparsity", "kept"), [(0.5, 4), (0.9, 1), (0.0, 7)])
def test_the_share_that_goes_is_rounded_down(sparsity, kept):
    """Seven edges: 3.5 go, so 3; 6.3, so 6; none."""
    assert int(FRL(sparsity=sparsity).chosen(torch.arange(7.0)).sum()) == kept


def test_with_one_client_the_global_ranking_is_its_own(folder):
    study = small("frl", training={"epochs": 3, "batch_size": 8, "lr": 0.5})
    state, view = lab(folder, study)
    method = FRL()
    ask = method.plan(state)
    reply = method.respond(ask, view(1))
    after = method.absorb(state, reduce(ask, state, [(1, reply)]))
    own = unpacked(reply.tensors, {n: state.setting.specs[n].shape for n in state.memory["rank"]})
    assert same(after.memory["rank"], own)
    assert not same(own, state.memory["rank"])


def test_without_learning_a_client_returns_the_ranking_it_was_sent(folder):
    state, view = lab(folder, small("frl", training={"epochs": 1, "batch_size": 8, "lr": 1e-12}))
    method = FRL()
    ask = method.plan(state)
    assert same(method.respond(ask, view(0)).tensors, ask.message.tensors)


# ---- HideNseek


def test_the_mask_is_synflows_and_asks_no_client(folder):
    study = small("hidenseek", "sparsity=0.75")
    state, view = lab(folder, study)
    method = study.build_method()
    after, processed = method.refine(state, view(0))
    assert processed == 1  # an input of ones
    assert method.refine(after, view(0)) == (after, 0)
    assert method.plan(after).phase == "train"
    flow, _ = view(3).gradient_statistic("flow", state.weights, None, round_=0)  # whoever measures it
    scores = {n: flow[n] for n in after.mask}
    assert same(after.mask, Global().keep(scores, 0.75))
    assert same(after.weights, masks.apply(state.weights, after.mask))


def test_signs_are_voted_by_rows_and_a_tie_keeps_the_old(folder):
    study = small("hidenseek", "sparsity=0")
    state, view = lab(folder, study)
    method = study.build_method()
    state, _ = method.refine(state, view(0))
    ask = method.plan(state)
    plus, minus = ({n: torch.full_like(t, v) for n, t in ask.message.tensors.items()} for v in (1.0, -1.0))

    def told(tensors, samples):
        return Message(tensors, ask.message.mask, {"samples": samples, "processed": 0, "loss": 0.0})

    after = method.absorb(state, reduce(ask, state, [(0, told(plus, 1)), (1, told(minus, 3))]))
    assert torch.equal(after.weights["fc1.weight"], -state.weights["fc1.weight"].abs())
    tied = method.absorb(state, reduce(ask, state, [(0, told(plus, 2)), (1, told(minus, 2))]))
    assert same(tied.weights, state.weights)


def test_only_signs_change_and_they_travel_in_less_than_two_bits(tmp_path):
    shards = tiny_shards(tmp_path / "shards", size=16)
    training = {"epochs": 5, "batch_size": 8, "lr": 0.05, "optimiser": "adam"}
    model = {"name": "mlp", "options": {"hidden": (64, 32)}}
    study = small("hidenseek", participation=1.0, rounds=4, training=training, model=model)
    summary = play(study, tmp_path / "run", shards)
    _, view = lab(shards, study)
    shipped, theta = model_of(tmp_path / "run"), view(0).initial
    for name in ("fc1.weight", "fc2.weight", "fc3.weight"):
        keep = shipped[f"mask/{name}"].bool()
        assert torch.equal(shipped[name].abs(), theta[name].abs() * keep)
    rows = [row for row in rows_of(tmp_path / "run") if row["phase"] == "train"]
    assert rows[-1]["up"]["values"] * 8 < 2 * 4 * rows[-1]["kept"]
    assert summary["final"]["accuracy"] > 0.6


def test_bounds_are_told():
    with pytest.raises(ConfigError, match="prior"):
        FedPM(prior=0.5)
    for method in (FRL, HideNseek):
        with pytest.raises(ConfigError, match="sparsity"):
            method(sparsity=1.0)
