"""FedTiny: the pool, the clients' judgement, blocks by hand; what it reduces to; models without batch norm."""

import pytest
import torch

from helpers import lab, model_of, play, rows_of, same, small, tiny_shards
from secateur.contract.ask import SCORE
from secateur.contract.reducer import reduce
from secateur.contract.state import State
from secateur.errors import ConfigError
from secateur.learning.evaluate import evaluate
from secateur.learning.resident import load
from secateur.methods.fedtiny import FedTiny
from secateur.methods.kit import mask_selection as selection
from secateur.pruning import mask as masks
from secateur.wire.message import Message

NORMED = {"name": "sparsifycnn", "options": {"dropout": 0.0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"), size=8)


def told(tensors, loss=0.0, samples=1, mask=None):
    return Message(tensors, mask, {"samples": samples, "processed": 0, "loss": loss})


def test_the_pool_has_one_density_and_many_shares(folder):
    state, _ = lab(folder, small("fedtiny"))
    pool = [selection.candidate(state, c, 0.9) for c in range(4)]
    total = masks.size(pool[0])
    assert [masks.size(mask) - masks.kept(mask) for mask in pool] == [int(0.9 * total)] * 4
    assert len({tuple(int(part.sum()) for part in mask.values()) for mask in pool}) == 4
    assert same(pool[1], selection.candidate(state, 1, 0.9))


def test_the_candidate_with_the_least_loss_by_rows_is_taken(folder):
    method = FedTiny(candidates=3)
    state, _ = lab(folder, small("fedtiny", "candidates=3"))
    theta = state.weights
    for a, b in ((1.0, 3.0), (2.0, 0.5), (9.0, 0.5)):  # by rows 1 and 3: 2.5, 0.875, 2.625
        ask = method.plan(state)
        assert ask.phase == "select"
        assert ask.clients == state.setting.cohort(1)
        state = method.absorb(state, reduce(ask, state, [(0, told({}, a, 1)), (1, told({}, b, 3))]))
    assert same(state.mask, selection.candidate(state_of(state, theta), 1, 0.9))
    assert same(state.weights, masks.apply(theta, state.mask))
    assert method.plan(state).phase == "train"


def state_of(state, weights):
    return State(state.setting, 0, weights)


def test_batch_norm_statistics_are_merged_before_candidates_are_judged(folder):
    study = small("fedtiny", "candidates=1", model=NORMED, participation=1.0)
    state, view = lab(folder, study)
    method, theta = study.build_method(), state.weights
    ask = method.plan(state)
    assert set(ask.expects.tensors) == {n for n in theta if "running" in n}
    replies = [(k, method.respond(ask, view(k))) for k in ask.clients]
    # an independent count: the first batch norm's mean input over the client's batches
    one = view(0)
    load(one.model, ask.message.tensors)
    entered = []
    handle = one.model.features[5].register_forward_pre_hook(lambda _, args: entered.append(args[0].mean((0, 2, 3))))
    one.model.train()
    with torch.no_grad():
        for start in range(0, len(one.data), 16):
            one.model(one.data.batch(slice(start, start + 16))[0])
    handle.remove()
    expected = torch.stack(entered).mean(0)
    torch.testing.assert_close(replies[0][1].tensors["features.5.running_mean"], expected)
    state = method.absorb(state, reduce(ask, state, replies))
    judged = method.plan(state)
    mean = sum(m.tensors["features.5.running_mean"] for _, m in replies) / len(replies)  # equal rows
    torch.testing.assert_close(judged.message.tensors["features.5.running_mean"], mean)
    reply = method.respond(judged, view(1))
    load(view(1).model, judged.message.tensors)
    assert reply.scalars["loss"] == pytest.approx(evaluate(view(1).model, view(1).data).loss)
    assert reply.tensors == {}
    state = method.absorb(state, reduce(judged, state, [(1, reply)]))
    torch.testing.assert_close(state.weights["features.5.running_mean"], mean)
    assert set(state.memory) == set()


def test_a_block_is_adjusted_by_the_mean_of_what_clients_chose(folder):
    study = small("fedtiny", "candidates=1", "every=1", "blocks=3", "alpha=0.5", "until=1.0", "sparsity=0.95", rounds=4)
    state, view = lab(folder, study)
    method = study.build_method()
    ask = method.plan(state)
    while ask.phase == "select":
        state = method.absorb(state, reduce(ask, state, [(0, told({}, 1.0))]))
        ask = method.plan(state)
    state = method.absorb(state, reduce(ask, state, [(0, told(dict(ask.message.tensors)))]))
    ask = method.plan(state)
    assert (ask.phase, list(ask.expects.tensors)) == (SCORE, ["fc3.weight"])  # from the outputs on
    reply = method.respond(ask, view(0))
    kept = state.mask["fc3.weight"]
    share = 0.25 * (1 + 2**-0.5)  # cos(pi / 4)
    count = min(int(share * int(kept.sum())), int((~kept).sum()))
    chosen = reply.mask["fc3.weight"]
    assert int(chosen.sum()) == count
    assert not (chosen & kept).any()
    slopes, _ = view(0).gradient_statistic("gradient", ask.message.tensors, ask.message.mask, round_=1)
    assert slopes["fc3.weight"].abs()[chosen].min() >= slopes["fc3.weight"].abs()[~chosen & ~kept].max()
    after = method.absorb(state, reduce(ask, state, [(0, reply)]))
    assert int(after.mask["fc3.weight"].sum()) == int(kept.sum())
    assert after.mask["fc3.weight"][chosen].all()
    gone = kept & ~after.mask["fc3.weight"]
    assert state.weights["fc3.weight"].abs()[gone].max() <= state.weights["fc3.weight"].abs()[kept & ~gone].min()
    assert torch.equal(after.mask["fc1.weight"], state.mask["fc1.weight"])
    assert method.plan(after).phase == "train"


def test_without_selection_and_adjustment_the_mask_is_fixed(folder, tmp_path):
    play(small("fedtiny", "candidates=1", "every=0"), tmp_path / "run", folder)
    rows = rows_of(tmp_path / "run")
    assert [row["phase"] for row in rows] == ["select", *["train"] * 4]
    assert len({row["kept"] for row in rows[1:]}) == 1
    state, _ = lab(folder, small("fedtiny"))
    mask = selection.candidate(state, 0, 0.9)
    shipped = model_of(tmp_path / "run")
    assert all(torch.equal(shipped[f"mask/{n}"].bool(), part) for n, part in mask.items())


def test_adjustments_stop_and_cost_little(folder, tmp_path):
    study = small("fedtiny", "candidates=2", "every=1", "until=0.5", "alpha=0.2", rounds=8)
    summary = play(study, tmp_path / "run", folder)
    scored = [row["round"] for row in rows_of(tmp_path / "run") if row["phase"] == SCORE]
    assert scored == [1, 2, 3]
    assert summary["phases"]["score"]["bytes_up"] < 0.5 * summary["phases"]["train"]["bytes_up"]
    assert summary["left_out"] == {}


@pytest.mark.parametrize("bad", [{"sparsity": 1.0}, {"alpha": 2.0}, {"candidates": 0}, {"blocks": 0}])
def test_bounds_are_told(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        FedTiny(**bad)


def test_a_model_without_batch_norm_is_told_apart_by_its_loss_and_that_is_recorded(tmp_path):
    shards = tiny_shards(tmp_path / "rows")
    summary = play(small("fedtiny"), tmp_path / "run", shards)
    assert summary["remarks"] == ["the model has no batch norm: candidates are told apart by their loss alone"]
    selections = [row for row in rows_of(tmp_path / "run") if row["phase"] == "select"]
    assert len(selections) == 4  # one for each candidate, where batch norm needs two
    assert play(small("fedtiny", "sparsity=0"), tmp_path / "off", shards)["remarks"] == []
