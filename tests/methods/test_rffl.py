"""RFFL: hand cases, one round against the published loop in numpy, and its claims on digits: fairness, free-riders."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import lab, play, rows_of, small, tiny_shards
from secateur.contract.reducer import reduce
from secateur.data.formats import digits
from secateur.data.shards import make_shards, open_shards
from secateur.errors import ConfigError
from secateur.federation.client import wrap
from secateur.learning.evaluate import evaluate
from secateur.learning.resident import load
from secateur.methods.kit.reputation import cosine, largest, reputations, shortening
from secateur.methods.rffl import RFFL
from secateur.study.study import parse_study
from secateur.wire.message import Message

EVERYBODY = torch.tensor([True, True])


def updates(*rows):
    return [{"w": torch.tensor(row)} for row in rows]


def test_reputations_by_hand():
    """Two clients at right angles have cos .7071 with a = (.5, .5), and stay at .5 each; opposite ones sum to a = 0,
    where the cosine is 0: both fall to .475 and are divided by .95."""
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    one, other = updates([1.0, 0.0], [0.0, 1.0])
    total = {"w": (one["w"] + other["w"]) / 2}
    likeness = {0: cosine(one, total), 1: cosine(other, total)}
    assert likeness == {0: pytest.approx(math.sqrt(0.5)), 1: pytest.approx(math.sqrt(0.5))}
    assert reputations(half, likeness, EVERYBODY, 0.95).tolist() == pytest.approx([0.5, 0.5])
    nothing = {"w": torch.zeros(2)}
    assert cosine(one, nothing) == 0.0
    assert reputations(half, {0: 0.0, 1: 0.0}, EVERYBODY, 0.95).tolist() == pytest.approx([0.5, 0.5])


def test_a_reputation_moves_by_a_twentieth():
    """.95 * .5 + .05 * (1, -1) = (.525, .425), divided by .95; a client that was removed has none."""
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    found = reputations(half, {0: 1.0, 1: -1.0}, EVERYBODY, 0.95)
    assert found.tolist() == pytest.approx([0.525 / 0.95, 0.425 / 0.95])
    alone = reputations(half, {0: 1.0, 1: 1.0}, torch.tensor([True, False]), 0.95)
    assert alone.tolist() == [1.0, 0.0]
    sunk = reputations(half, {0: -20.0, 1: -20.0}, EVERYBODY, 0.95)
    assert sunk.tolist() == [0.5, 0.5]  # they add up to nothing, and stay


def test_an_update_is_made_no_longer():
    assert shortening({"w": torch.tensor([3.0, 4.0])}, 0.5) == pytest.approx(0.1)
    assert shortening({"w": torch.tensor([0.3]), "v": torch.tensor([0.4])}, 0.5) == pytest.approx(1.0)


def test_a_reward_has_the_largest_of_each_tensor():
    found = largest({"w": torch.tensor([[0.1, -3.0], [2.0, 0.5]]), "b": torch.tensor([1.0])}, 0.5)
    assert found["w"].tolist() == [[False, True], [True, False]]
    assert found["b"].tolist() == [True]
    assert not any(bool(part.any()) for part in largest({"w": torch.ones(4)}, 0.0).values())


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def play_by_hand(folder, study, rounds, lie=lambda who, update: update):
    """Play rounds without an engine; return the last state and the clients' views, whose memory holds their models."""
    (state, view), method = lab(folder, study), study.build_method()
    clients = {k: view(k) for k in range(state.setting.clients)}
    for _ in range(rounds):
        ask = method.plan(state)
        replies = []
        for who, client in clients.items():
            tensors, mask = ask.request(who)
            reply = method.respond(replace(ask, message=Message(tensors, mask), slices=None), client)
            replies.append((who, replace(reply, tensors=lie(who, reply.tensors))))
        state = method.absorb(state, reduce(ask, state, replies))
    return method, state, clients


def test_rounds_are_those_of_the_published_loop(shards):
    """Three rounds with numpy: clip, weigh by reputation, cosine, divide, share of the largest, own models."""
    study = small("rffl", "norm=0.2", participation=1.0)
    (first, view), rounds = lab(shards, study), 3
    _, state, clients = play_by_hand(shards, study, rounds)
    names = list(first.weights)
    start = {n: t.numpy().astype(np.float64) for n, t in first.weights.items()}
    models, r, total = [dict(start) for _ in range(4)], np.full(4, 0.25), dict(start)
    reward = [{n: np.zeros_like(start[n]) for n in names} for _ in range(4)]
    for round_ in range(1, rounds + 1):
        sent = []
        for k in range(4):
            before = {n: models[k][n] + reward[k][n] for n in names}
            trained, _ = view(k).train({n: torch.tensor(t).float() for n, t in before.items()}, None, round_=round_)
            change = {n: trained[n].numpy() - before[n].astype(np.float32) for n in names}
            length = math.sqrt(sum((c.astype(np.float64) ** 2).sum() for c in change.values()))
            sent.append({n: c * min(1.0, 0.2 / length) for n, c in change.items()})
            models[k] = {n: before[n] + sent[k][n] for n in names}
        whole = {n: sum(r[k] * sent[k][n] for k in range(4)) for n in names}
        flat = np.concatenate([whole[n].ravel() for n in names])
        likeness = []
        for k in range(4):
            own = np.concatenate([sent[k][n].ravel() for n in names])
            likeness.append(own @ flat / np.linalg.norm(own) / np.linalg.norm(flat))
        r = 0.95 * r + 0.05 * np.array(likeness)
        r /= r.sum()
        total = {n: total[n] + whole[n] for n in names}
        for k in range(4):
            for n in names:
                order = np.argsort(-np.abs(whole[n]).ravel(), kind="stable")
                kept = order[: math.ceil(r[k] / r.max() * whole[n].size - 1e-9)]
                reward[k][n] = np.zeros_like(whole[n])
                reward[k][n].ravel()[kept] = whole[n].ravel()[kept]
    found = state.memory["standing"]["reputation"].numpy()
    np.testing.assert_allclose(found, r, rtol=1e-4)
    assert found.max() > found.min()
    for n in names:
        np.testing.assert_allclose(state.weights[n].numpy(), total[n], rtol=1e-3, atol=1e-5)
        for k in range(4):
            np.testing.assert_allclose(clients[k].memory[n].numpy(), models[k][n], rtol=1e-3, atol=1e-4)


def test_who_falls_below_a_third_leaves_after_ten_rounds(shards):
    """Client 3 sends the opposite of what it learnt: it is removed in round 11, and sent nothing from then on."""
    study = small("rffl", "alpha=0.8", participation=1.0, rounds=12)

    def lie(who, update):
        return {n: -t for n, t in update.items()} if who == 3 else update

    method, before, _ = play_by_hand(shards, study, 10, lie)
    assert before.memory["standing"]["reputable"].tolist() == [True] * 4
    method, after, _ = play_by_hand(shards, study, 11, lie)
    assert after.memory["standing"]["reputable"].tolist() == [True, True, True, False]
    assert after.memory["standing"]["reputation"][3] == 0
    ask = method.plan(after)
    assert not any(bool(t.any()) for t in ask.request(3)[0].values())
    assert any(bool(t.any()) for t in ask.request(0)[0].values())


def test_a_run_sends_sparse_rewards(tmp_path, shards):
    """Nothing comes down before the first aggregate; then no client gets more than a dense model's bytes."""
    play(small("rffl", participation=1.0), tmp_path, shards)
    rows = rows_of(tmp_path)
    assert rows[0]["down"]["values"] < 100
    carried = [{who: down for who, down, _ in row["each"]} for row in rows[1:]]
    assert all(min(each.values()) < max(each.values()) for each in carried)
    dense = 3 * rows[1]["processed"] * rows[1]["macs"]
    assert all(row["train_macs"] == dense for row in rows)  # a reward's mask is no mask of the training


def digits_of(folder, sizes, liars):
    """Write digits for clients with rows of the given sizes, and as many rows as the first for each liar."""
    source = digits.load("", 0)
    order = np.random.default_rng(0).permutation(len(source.y_train))
    parts, at = [], 0
    for size in [*sizes, *[sizes[0]] * liars]:
        parts.append(order[at : at + size])
        at += size
    folder.mkdir()
    make_shards(source, parts, test_fraction=0.0, seed=0, folder=folder)
    return folder


def test_fairness_and_free_riders_on_digits(tmp_path):
    """Eight clients with 10 to 240 rows, and two free-riders that send random signs.

    Rewards are fair: a client's accuracy with its rewards goes with the one that it reaches alone (correlation above
    0.8; the paper claims above 0.9 for its own data). Everybody gains by it on average, and the free-riders leave.
    """
    sizes = [10, 20, 30, 45, 70, 100, 160, 240]
    folder, rounds = digits_of(tmp_path / "digits", sizes, 2), 14
    values = {
        "method": "rffl", "rounds": rounds, "participation": 1.0, "data": {"clients": 10, "partition": "iid"},
        "model": {"name": "mlp", "options": {"hidden": (32,)}, "init": "kaiming_normal"},
        "training": {"epochs": 2, "batch_size": 16, "lr": 0.1},
    }  # fmt: skip
    study, draw = parse_study(values), torch.Generator().manual_seed(0)

    def lie(who, update):
        if who < len(sizes):
            return update
        return {n: torch.rand(t.shape, generator=draw) * 2 - 1 for n, t in update.items()}

    method, state, clients = play_by_hand(folder, study, rounds, lie)
    reputation = state.memory["standing"]["reputation"].tolist()
    test = wrap(open_shards(folder), *open_shards(folder).server_test())

    def accuracy(tensors):
        load(clients[0].model, tensors)
        return evaluate(clients[0].model, test).metric

    ask, rewarded, alone = method.examine(state), [], []
    for who in range(len(sizes)):
        rewarded.append(accuracy(method.uses(Message(ask.request(who)[0]), clients[who])))
        own = dict(clients[who].initial)
        for round_ in range(1, rounds + 1):
            own, _ = clients[who].train(own, None, round_=round_)
        alone.append(accuracy(own))
    assert np.corrcoef(alone, rewarded)[0, 1] > 0.8
    assert np.mean(rewarded) > np.mean(alone)
    assert max(reputation[len(sizes) :]) < min(reputation[: len(sizes)])
    assert reputation[len(sizes) :] == [0.0, 0.0]


@pytest.mark.parametrize("bad", [{"strength": -1.0}, {"norm": 0.0}, {"alpha": 1.5}, {"threshold": 1.0}])
def test_options_have_bounds(bad):
    with pytest.raises(ConfigError, match=rf"^{next(iter(bad))} = "):
        RFFL(**bad)
