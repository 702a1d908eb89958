"""Sub-FedAvg and LotteryFL: gates and steps by hand, rewinding, personal masks, personal scores."""

import math
from dataclasses import replace

import pytest
import torch

from helpers import lab as helpers_lab
from helpers import play, rows_of, same, small, tiny_shards
from secateur.contract.reducer import reduce
from secateur.methods.kit.personal import reached, thinner
from secateur.methods.lotteryfl import LotteryFL
from secateur.methods.subfedavg import SubFedAvg
from secateur.wire.message import Message


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def lab(folder):
    training = {"epochs": 3, "batch_size": 8, "lr": 0.1}
    return helpers_lab(folder, small("subfedavg", participation=1.0, training=training))


def test_a_step_takes_a_share_of_what_is_left_of_each_tensor_and_stops_at_the_target():
    weights = {"a": torch.tensor([[5.0, -1.0, 0.5, 3.0, 2.0]]), "b": torch.tensor([[0.1, 0.4, -0.6, 0.7, 0.8]])}
    full = {n: torch.ones_like(t, dtype=torch.bool) for n, t in weights.items()}
    told = {"share": 0.25, "target": 0.45}
    first = thinner(weights, full, **told)  # the quarter quantile of five values is the second: one lies below it
    assert first["a"].int().tolist() == [[1, 1, 0, 1, 1]]
    assert first["b"].int().tolist() == [[0, 1, 1, 1, 1]]
    second = thinner(weights, first, **told)  # of four it lies between the first and the second; 0.45 * 5 allows two
    assert second["a"].int().tolist() == [[1, 0, 0, 1, 1]]
    assert second["b"].int().tolist() == [[0, 0, 1, 1, 1]]
    assert reached(second, 0.45)
    third = thinner(weights, second, **told)
    assert all(torch.equal(third[n], second[n]) for n in third)


def test_two_steps_to_98_percent_leave_every_tensor_its_share():
    """784-128-10 by Xavier: weights of the first layer are smaller, and one threshold for all would take them all."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"fc1": (128, 784), "fc2": (128, 128), "fc3": (10, 128)}
    weights = {n: torch.randn(s, generator=draw) * (2 / sum(s)) ** 0.5 for n, s in shapes.items()}
    mask = {n: torch.ones_like(t, dtype=torch.bool) for n, t in weights.items()}
    for _ in range(2):
        mask = thinner(weights, mask, share=0.86, target=0.98)
    assert all(float(m.float().mean()) == pytest.approx(0.02, abs=0.001) for m in mask.values())
    everything = {n: torch.ones_like(t, dtype=torch.bool) for n, t in weights.items()}
    assert all(int(m.sum()) >= 1 for m in thinner(weights, everything, share=0.9999999).values())


def asked(state, method, k):
    ask = method.plan(state)
    mask = ask.slices[k]
    return replace(ask, message=replace(ask.message, mask=mask))


@pytest.mark.parametrize(
    ("options", "prunes"),
    [({}, True), ({"accuracy": 1.0}, False), ({"distance": 1.0}, False)],
)
def test_the_gate(lab, options, prunes):
    state, view = lab
    method = SubFedAvg(target=0.5, share=0.2, **({"accuracy": 0.1} | options))
    reply = method.respond(asked(state, method, 0), view(0))
    total = sum(m.numel() for m in reply.mask.values())
    kept = sum(int(m.sum()) for m in reply.mask.values())
    step = sum(math.ceil(0.2 * (m.numel() - 1)) for m in reply.mask.values())  # what lies below the quantile
    assert kept == (total - step if prunes else total)
    for name, mask in reply.mask.items():
        assert not reply.tensors[name][~mask].any()
    data = view(0).data
    assert reply.scalars["processed"] == 3 * len(data) + len(data) // 3


@pytest.mark.parametrize(("accuracy", "prunes"), [(0.0, True), (1.0, False)])
def test_a_ticket_is_pruned_before_training_and_rewound(lab, accuracy, prunes):
    state, view = lab
    method = LotteryFL(target=0.5, share=0.2, accuracy=accuracy)
    moved = replace(
        state, weights={n: t + 0.01 * torch.arange(t.numel()).view(t.shape) for n, t in state.weights.items()}
    )
    ask = asked(moved, method, 0)
    reply = method.respond(ask, view(0))
    mask = thinner(moved.weights, ask.message.mask, share=0.2, target=0.5) if prunes else ask.message.mask
    begun = state.weights if prunes else moved.weights  # theta_0, or what arrived
    expected, done = view(0).train(begun, mask, round_=1)
    assert same(reply.mask, mask)
    assert same(reply.tensors, expected)
    assert reply.scalars["processed"] == done.processed + len(view(0).data) // 3


def test_a_ticket_at_its_target_is_left_alone_and_costs_no_scoring(lab):
    state, view = lab
    method = LotteryFL(target=0.2, share=0.2, accuracy=0.0)
    ask = asked(state, method, 0)
    thin = thinner(state.weights, ask.message.mask, share=0.2, target=0.2)
    reply = method.respond(replace(ask, message=replace(ask.message, mask=thin)), view(0))
    assert same(reply.mask, thin)
    assert reply.scalars["processed"] == 3 * len(view(0).data)


def test_masks_are_personal_and_weights_average_over_who_kept_them(lab):
    state, _ = lab
    method = SubFedAvg()
    ask = method.plan(state)
    told = []
    for k, value in ((0, 2.0), (1, 6.0)):
        mask = {n: torch.ones_like(m) for n, m in ask.slices[k].items()}
        mask["fc1.weight"][k] = False
        tensors = {n: torch.full_like(t, value) for n, t in state.weights.items()}
        tensors = {n: t.masked_fill(~mask[n], 0.0) if n in mask else t for n, t in tensors.items()}
        told.append((k, Message(tensors, mask, {"samples": 10, "processed": 0, "loss": 0.0})))
    after = method.absorb(state, reduce(ask, state, told))
    weight = after.weights["fc1.weight"]
    assert torch.allclose(weight[0], torch.tensor(6.0))
    assert torch.allclose(weight[1], torch.tensor(2.0))
    assert torch.allclose(weight[2:], torch.tensor(4.0))
    slices = method.examine(after).slices
    assert not slices[0]["fc1.weight"][0].any()
    assert slices[0]["fc1.weight"][1:].all()
    assert slices[2]["fc1.weight"].all()  # not heard from yet


def test_clients_are_scored_with_their_own_part(folder, tmp_path):
    study = small(
        "subfedavg", "accuracy=0.2", "share=0.3", participation=1.0, rounds=6,
        training={"epochs": 2, "batch_size": 8, "lr": 0.1},
    )  # fmt: skip
    summary = play(study, tmp_path / "run", folder)
    rows = rows_of(tmp_path / "run")
    assert len(summary["final"]["local"]) == 4
    assert rows[-1]["up"]["values"] < 0.75 * rows[0]["up"]["values"]
    assert rows[-1]["down"]["values"] < 0.75 * rows[0]["down"]["values"]
    dense = play(small("fedavg", participation=1.0, rounds=1), tmp_path / "dense", folder)
    assert summary["final"]["evaluate_bytes"] < dense["final"]["evaluate_bytes"]
