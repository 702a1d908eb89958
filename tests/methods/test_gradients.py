"""SalientGrads, PruneFL, FedDST, Complement Sparsification: their own rules by hand, and what they reduce to."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from helpers import lab as helpers_lab
from helpers import model_of, play, rows_of, same, small, tiny_shards
from secateur.aggregation.weighted import WeightedMean
from secateur.contract.ask import SCORE
from secateur.contract.reducer import reduce
from secateur.contract.state import State
from secateur.errors import ConfigError
from secateur.learning.resident import load, tensors_of
from secateur.methods.complement import ComplementSparsification
from secateur.methods.feddst import FedDST
from secateur.methods.prunefl import PruneFL
from secateur.methods.salientgrads import SalientGrads
from secateur.pruning.allocation import ERK, Global, erk
from secateur.pruning.regrowth import block, cosine, largest_gradients, quota, swap
from secateur.wire.message import Message


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def lab(folder):
    """Return a function from a study to (state, view of a client)."""
    return partial(helpers_lab, folder)


def reply(tensors, mask=None, samples=1):
    return Message(tensors, mask, {"samples": samples, "processed": 0, "loss": 0.0})


def loss_gradient(view, weights, x, y):
    """Return the gradient by plain autograd, a model of its own."""
    load(view.model, weights)
    loss = torch.nn.functional.cross_entropy(view.model(x), y)
    return dict(zip(weights, torch.autograd.grad(loss, list(view.model.parameters())), strict=True))


def test_gradients_are_autograds_over_all_rows(lab):
    study = small("salientgrads", training={"batch_size": 1000})
    state, view = lab(study)
    one = view(0)
    found, done = one.gradient_statistic("gradient", state.weights, None, round_=0)
    x, y = one.data.batch(slice(None))
    expected = loss_gradient(one, state.weights, x, y)
    assert done.processed == len(y)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    squared, _ = one.gradient_statistic("square", state.weights, None, round_=0)
    torch.testing.assert_close(squared["fc1.weight"], expected["fc1.weight"].square())


def test_gradients_average_their_batches_and_leave_the_model_alone(lab):
    state, view = lab(small("salientgrads", training={"batch_size": 8}))
    one = view(1)
    parts = len(torch.split(torch.arange(len(one.data)), 8))
    found, done = one.gradient_statistic("gradient", state.weights, None, round_=3, batches=100)
    assert done.processed == len(one.data)
    # equal batches: the mean over them is the mean over rows
    if len(one.data) % 8 == 0:
        x, y = one.data.batch(slice(None))
        torch.testing.assert_close(found["fc1.weight"], loss_gradient(one, state.weights, x, y)["fc1.weight"])
    few, less = one.gradient_statistic("gradient", state.weights, None, round_=3, batches=1)
    assert (less.processed, parts) == (8, -(-len(one.data) // 8))
    assert not torch.equal(few["fc1.weight"], found["fc1.weight"])
    assert same(tensors_of(one.model), state.weights)


def test_gradients_see_the_masked_model_and_answer_for_pruned_weights_too(lab):
    state, view = lab(small("prunefl", training={"batch_size": 1000}))
    mask = {"fc1.weight": torch.rand(12, 16, generator=torch.Generator().manual_seed(0)) < 0.5}
    one = view(0)
    found, _ = one.gradient_statistic("gradient", state.weights, mask, round_=0)
    pruned = {**state.weights, "fc1.weight": state.weights["fc1.weight"] * mask["fc1.weight"]}
    x, y = one.data.batch(slice(None))
    expected = loss_gradient(one, pruned, x, y)["fc1.weight"]
    torch.testing.assert_close(found["fc1.weight"], expected)
    assert found["fc1.weight"][~mask["fc1.weight"]].any()


# ---- SalientGrads


def test_salientgrads_keeps_the_largest_mean_scores(lab):
    state, _ = lab(small("salientgrads"))
    method = SalientGrads(sparsity=0.5, allocation=Global(guard=False))
    ask = method.plan(state)
    assert (ask.phase, ask.clients) == (SCORE, (0, 1, 2, 3))
    scores = {n: torch.zeros_like(state.weights[n]) for n in state.setting.layout.names("weight")}
    total = sum(s.numel() for s in scores.values())
    one = {n: torch.arange(s.numel(), dtype=torch.float32).reshape(s.shape) for n, s in scores.items()}
    # the second client's rows must not make it count for more: scores are averaged over clients
    after = method.absorb(state, reduce(ask, state, [(0, reply(one)), (1, reply(scores, samples=1000))]))
    assert sum(int(m.sum()) for m in after.mask.values()) == total - total // 2
    flat = torch.cat([one[n].reshape(-1) for n in one])
    least = flat.sort().values[total // 2]
    assert all(bool((one[n][m] >= least).all()) for n, m in after.mask.items())
    assert method.plan(after).phase == "train"


def test_salientgrads_scores_are_snip(lab):
    study = small("salientgrads", training={"batch_size": 1000})
    state, view = lab(study)
    ask = SalientGrads().plan(state)
    told = SalientGrads().respond(ask, view(2))
    x, y = view(2).data.batch(slice(None))
    gradient = loss_gradient(view(2), state.weights, x, y)["fc2.weight"]
    torch.testing.assert_close(told.tensors["fc2.weight"], (gradient * state.weights["fc2.weight"]).abs())


def test_nobody_scored_leaves_it_dense_and_goes_on(lab):
    state, _ = lab(small("salientgrads"))
    method = SalientGrads()
    after = method.absorb(state, reduce(method.plan(state), state, []))
    assert after.mask is None
    assert method.plan(after).phase == "train"


# ---- PruneFL


def test_prunefl_protects_by_magnitude_and_fills_by_importance():
    weights = {"a": torch.tensor([[9.0, -8.0, 0.1, 0.2, 0.3, 0.0, 0.0, 0.0, 0.0, 0.0]])}
    importance = {"a": torch.tensor([[0.0, 0.0, 1.0, 2.0, 3.0, 9.0, 0.5, 8.0, 0.0, 0.0]])}
    # budget 4 of 10; a quarter of it is open: 3 by magnitude (9, -8, 0.3), 1 by importance (index 5)
    mask = PruneFL(sparsity=0.6, delta=0.25).choose(State(None, 0, weights), importance)
    assert mask["a"].int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0, 0, 0]]
    # after one half-life an eighth is open: int(0.5) = none
    later = PruneFL(sparsity=0.6, delta=0.25, half_life=7).choose(State(None, 7, weights), importance)
    assert later["a"].int().tolist() == [[1, 1, 0, 1, 1, 0, 0, 0, 0, 0]]
    everything = PruneFL(sparsity=0.6, delta=1.0).choose(State(None, 0, weights), importance)
    assert everything["a"].int().tolist() == [[0, 0, 0, 1, 1, 1, 0, 1, 0, 0]]


def test_prunefl_asks_when_a_reconfiguration_is_due_and_never_twice(lab):
    study = small("prunefl", "every=2", rounds=5)
    state, _ = lab(study)
    method, seen = study.build_method(), []
    while (ask := method.plan(state)) is not None:
        seen.append((ask.phase, ask.round))
        state = method.absorb(state, reduce(ask, state, []))
    assert seen == [
        ("score", 0), ("train", 1), ("train", 2), ("score", 2), ("train", 3), ("train", 4), ("score", 4), ("train", 5)
    ]  # fmt: skip


def test_prunefl_without_reconfiguration_is_a_fixed_mask(folder, tmp_path):
    play(small("prunefl", "every=0", rounds=5), tmp_path / "run", folder)
    rows = rows_of(tmp_path / "run")
    assert [r["phase"] for r in rows] == ["score"] + ["train"] * 5
    # after the first, a mask that does not change is its hash and nothing more
    assert all(row["down"]["mask"] <= 3 * 16 + 200 for row in rows[2:])
    assert len({row["kept"] for row in rows}) == 1


# ---- FedDST


def test_erk_by_hand():
    # sizes 4 and 64, sums 4 and 16: half of 68 are 34; share 1.7 would give a 6.8 > 4: full, b the other 30
    assert erk({"a": (2, 2), "b": (8, 8)}, 0.5) == {"a": 4, "b": 30}
    # nothing full: 100 and 400 entries, sums 20 and 40, 50 to keep: 16.67 and 33.33
    assert erk({"a": (10, 10), "b": (20, 20)}, 0.9) == {"a": 17, "b": 33}
    assert erk({"a": (3, 3)}, 0.0) == {"a": 9}
    scores = {"a": torch.rand(10, 10), "b": torch.rand(20, 20)}
    kept = ERK().keep(scores, 0.9)
    assert {n: int(m.sum()) for n, m in kept.items()} == {"a": 17, "b": 33}
    assert scores["b"][kept["b"]].min() > scores["b"][~kept["b"]].max()


def test_the_smallest_go_and_the_steepest_come():
    weights = {"a": torch.tensor([[4.0, -3.0, 0.5, 1.0, 0.0, 0.0, 0.0, 0.0]])}
    mask = {"a": torch.tensor([[True, True, True, True, False, False, False, False]])}
    slopes = {"a": torch.tensor([[0.0, 0.0, 99.0, 0.0, 0.1, -5.0, 2.0, 0.3]])}
    share = cosine(1.0, 5, 10)  # at t = T/2 half of alpha: two of four
    assert share == pytest.approx(0.5)
    found = swap(mask, weights, slopes, share)
    assert found["a"].int().tolist() == [[1, 1, 0, 0, 0, 1, 1, 0]]  # a weight that was just dropped does not return
    assert largest_gradients(mask, slopes, share)["a"].int().tolist() == [[0, 0, 0, 0, 0, 1, 1, 0]]
    assert [cosine(1.0, t, 10) for t in (0, 10, 12)] == [1.0, 0.0, 0.0]
    assert swap(mask, weights, slopes, 0.0)["a"].equal(mask["a"])
    assert int(swap(mask, weights, slopes, 1.0)["a"].sum()) == 4
    assert quota(torch.tensor([True, True, True, False]), 0.9) == 1  # no more than are pruned


def test_blocks_take_turns_from_the_outputs_on():
    names = ["a", "b", "c", "d", "e"]
    assert [block(names, 2, turn) for turn in range(3)] == [["e", "d", "c"], ["b", "a"], ["e", "d", "c"]]
    assert [block(names, 9, turn) for turn in (0, 4, 5)] == [["e"], ["a"], ["e"]]


def test_feddst_merges_by_who_kept_a_weight_and_prunes_the_union(lab):
    study = small("feddst", "sparsity=0.5", "every=1")
    state, _ = lab(study)
    method = study.build_method()
    ask = method.plan(state)
    assert ask.expects.mask == "required"
    assert not ask.expects.within
    generator = torch.Generator().manual_seed(0)
    replies, by_hand = [], WeightedMean(coverage=True)
    for k in range(2):
        mask = {n: torch.rand(m.shape, generator=generator) < 0.5 for n, m in state.mask.items()}
        tensors = {n: torch.randn(t.shape, generator=generator) for n, t in state.weights.items()}
        tensors |= {n: tensors[n].masked_fill(~m, 0.0) for n, m in mask.items()}
        replies.append((k, reply(tensors, mask, samples=k + 1)))
        by_hand.add(tensors, k + 1, mask)
    after = method.absorb(state, reduce(ask, state, replies))
    mean = by_hand.mean()
    first, second = (message.mask["fc1.weight"] for _, message in replies)
    both, only = first & second, second & ~first
    torch.testing.assert_close(mean["fc1.weight"][only], replies[1][1].tensors["fc1.weight"][only])
    assert not (after.mask["fc1.weight"] & ~(first | second)).any()
    counts = erk({n: tuple(m.shape) for n, m in state.mask.items()}, 0.5)
    assert {n: int(m.sum()) for n, m in after.mask.items()} == counts
    kept = after.mask["fc1.weight"]
    torch.testing.assert_close(after.weights["fc1.weight"][kept & both], mean["fc1.weight"][kept & both])


def test_feddst_without_adjustment_is_a_fixed_mask(folder, tmp_path):
    play(small("feddst", "every=0", rounds=5), tmp_path / "never", folder)
    play(small("feddst", "every=1", "alpha=0.5", "until=0", rounds=5), tmp_path / "later", folder)
    assert same(model_of(tmp_path / "never"), model_of(tmp_path / "later"))
    masks = {n for n in model_of(tmp_path / "never") if n.startswith("mask/")}
    assert masks == {"mask/fc1.weight", "mask/fc2.weight", "mask/fc3.weight"}


@pytest.mark.parametrize("bad", [{"until": 1.5}, {"alpha": -0.1}])
def test_bounds_of_feddst_are_told(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        FedDST(**bad)


def test_feddst_adjusts_on_clients_and_counts_what_it_costs(folder, tmp_path):
    play(small("feddst", "every=2", "alpha=0.5", rounds=4, participation=1.0), tmp_path / "run", folder)
    play(small("feddst", "every=0", rounds=4, participation=1.0), tmp_path / "fixed", folder)
    rows, fixed = rows_of(tmp_path / "run"), rows_of(tmp_path / "fixed")
    assert rows[0]["processed"] == fixed[0]["processed"]
    assert rows[1]["processed"] > fixed[1]["processed"]
    assert rows[1]["up"]["mask"] > fixed[1]["up"]["mask"]
    assert len({row["kept"] for row in rows}) == 1
    assert not same(model_of(tmp_path / "run"), model_of(tmp_path / "fixed"))


# ---- Complement Sparsification


def after_a_dense_round(method, state):
    """Return the state after round 1, in which a client sent back what it got."""
    ask = method.plan(state)
    assert ask.message.mask is None
    assert same(ask.message.tensors, dict(state.weights))
    return method.absorb(state, reduce(ask, state, [(0, reply(dict(state.weights)))]))


def test_complement_begins_dense_and_prunes_each_tensor(lab):
    state, _ = lab(small("complement"))
    method = ComplementSparsification()
    assert after_a_dense_round(method, state).round == 1
    pruned = after_a_dense_round(method, state)
    for name, mask in pruned.mask.items():
        flat = state.weights[name].abs().flatten()
        assert set(flat[mask.flatten()].tolist()) == set(
            flat.sort(descending=True).values[: flat.numel() // 2].tolist()
        )
    unheard = method.absorb(state, reduce(method.plan(state), state, []))
    assert unheard.mask is None  # nobody answered in round 1: the next is dense as well


def test_complement_adds_what_came_back_to_what_was_sent(lab):
    study = small("complement")
    state, _ = lab(study)
    method = study.build_method()
    state = after_a_dense_round(method, state)
    ask = method.plan(state)
    rest = {n: ~m for n, m in state.mask.items()}
    tensors = {n: torch.ones_like(t) for n, t in state.weights.items()}
    told = [
        (0, reply({n: t.masked_fill(~rest[n], 0.0) if n in rest else t for n, t in tensors.items()}, rest, 3)),
        (1, reply({n: t * 0 for n, t in tensors.items()}, rest, 1)),
    ]
    after = method.absorb(state, reduce(ask, state, told))
    name = "fc1.weight"
    expected = torch.where(rest[name], 1.5 * 0.75, ask.message.tensors[name])
    kept = after.mask[name]
    torch.testing.assert_close(after.weights[name][kept], expected[kept])
    assert all(int(m.sum()) == m.numel() // 2 for m in after.mask.values())
    torch.testing.assert_close(after.weights["fc1.bias"], torch.full((12,), 0.75))


def test_a_client_cannot_write_where_the_server_did_not_ask(lab):
    study = small("complement")
    state, _ = lab(study)
    method = study.build_method()
    state = after_a_dense_round(method, state)
    ask = method.plan(state)
    everything = {n: torch.full_like(t, 7.0) for n, t in state.weights.items()}
    full = {n: torch.ones_like(m) for n, m in state.mask.items()}
    after = method.absorb(state, reduce(ask, state, [(0, reply(everything, full))]))
    sent, kept = state.mask["fc1.weight"], after.mask["fc1.weight"]
    both = sent & kept
    torch.testing.assert_close(after.weights["fc1.weight"][both], state.weights["fc1.weight"][both])


def test_up_and_down_together_are_one_dense_model(folder, tmp_path):
    play(small("complement", rounds=6, participation=1.0), tmp_path / "run", folder)
    play(small("fedavg", rounds=6, participation=1.0), tmp_path / "dense", folder)
    pairs = list(zip(rows_of(tmp_path / "run"), rows_of(tmp_path / "dense"), strict=True))
    assert pairs[0][0]["up"]["values"] == pairs[0][1]["up"]["values"]  # the first round is FedAvg's
    for row, dense in pairs[1:]:
        both = row["down"]["values"] + row["up"]["values"]
        assert both < 0.75 * (dense["down"]["values"] + dense["up"]["values"])  # biases travel twice
        assert row["up"]["mask"] < 4 * 60  # the complement of a mask that both sides know: nearly nothing


@pytest.mark.parametrize("method", ["complement", "feddip"])
def test_dense_training_is_counted_as_dense(method, folder, tmp_path):
    play(small(method, rounds=2), tmp_path / "run", folder)
    play(small("fedavg", rounds=2), tmp_path / "dense", folder)
    macs = [[row["train_macs"] for row in rows_of(tmp_path / name)] for name in ("run", "dense")]
    assert macs[0] == macs[1]


@pytest.mark.parametrize("method", [SalientGrads, PruneFL, FedDST, ComplementSparsification])
def test_bounds_are_told(method):
    with pytest.raises(Exception, match=r"sparsity = 1\.0 must be in \[0, 1\)"):
        replace(method(), sparsity=1.0)
