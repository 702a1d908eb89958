"""DisPFL, SpaFL and FED-PUB: models of single clients, mixed by hand; limits; what stays at a client."""

import math
from dataclasses import replace

import pytest
import torch

from helpers import lab as helpers_lab
from helpers import model_of, play, rows_of, same, small, tiny_shards
from secateur.contract.reducer import reduce
from secateur.errors import ModelError
from secateur.federation import prepare
from secateur.methods.dispfl import DisPFL
from secateur.methods.fedpub import FedPUB, masked
from secateur.methods.kit.personal import load_own, store_own
from secateur.methods.kit.similarity import mixing_shares
from secateur.methods.kit.thresholds import effective, received
from secateur.pruning import mask as masks
from secateur.wire.message import Message


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def lab(folder, name, *settings, **top):
    top = {"participation": 1.0, "training": {"epochs": 2, "batch_size": 8, "lr": 0.1}} | top
    return helpers_lab(folder, small(name, *settings, **top))


def told(tensors, mask=None, samples=10):
    return Message(tensors, mask, {"samples": samples, "processed": 0, "loss": 0.0})


def test_what_is_a_clients_own_is_read_by_client_and_replaced(folder):
    state, _ = lab(folder, "fedavg")
    one, two = ({"w": torch.full((2,), float(v))} for v in (1, 2))
    store_own(state, "weights", [(7, one), (8, two)])
    assert load_own(state, "weights", 7) == one
    assert load_own(state, "mask", 7) is None
    assert load_own(state, "weights", 9) is None
    store_own(state, "weights", [(7, two)])
    assert load_own(state, "weights", 7) == two
    assert len(state.archive) == 2  # as many as clients, however often they answer


# ---- DisPFL


def filled(state, values, missing):
    """Return replies in which client k's weights are values[k], without entry missing[k] of the first row."""
    for k, value in values.items():
        mask = {n: torch.ones(s.shape, dtype=torch.bool) for n, s in state.setting.specs.items() if "weight" in n}
        mask["fc1.weight"][0, missing[k]] = False
        yield k, told(masks.apply({n: torch.full_like(t, value) for n, t in state.weights.items()}, mask), mask)


def test_a_mixture_is_the_mean_over_neighbours_that_kept_a_weight(folder):
    state, _ = lab(folder, "dispfl")
    method = DisPFL(neighbours=3)
    ask = method.plan(state)
    after = method.absorb(
        state, reduce(ask, state, filled(state, {0: 1.0, 1: 2.0, 2: 3.0, 3: 6.0}, {k: k for k in range(4)}))
    )
    mixed = method.mixture(after, 1, 2)["fc1.weight"]
    assert mixed[0, :4].tolist() == pytest.approx([11 / 3, 10 / 3, 3.0, 2.0])
    assert torch.allclose(mixed[1:], torch.tensor(3.0))
    assert torch.allclose(method.mixture(after, 1, 2)["fc1.bias"], torch.tensor(3.0))
    assert not method.mask(after, 1)["fc1.weight"][0, 1]
    alone = DisPFL(neighbours=0)
    assert torch.allclose(alone.mixture(after, 3, 2)["fc1.bias"], torch.tensor(6.0))
    tensors = DisPFL(neighbours=0).examine(after).tensors(2)
    assert torch.allclose(tensors["fc2.weight"], torch.tensor(3.0))


def test_masks_are_personal_from_the_start_and_keep_their_budget(folder):
    state, view = lab(folder, "dispfl", "target=0.5", "alpha=0.4", rounds=6)
    method = DisPFL(target=0.5, alpha=0.4)
    ask = method.plan(state)
    total = masks.size(ask.slices[0])
    assert any((ask.slices[0][n] != ask.slices[1][n]).any() for n in ask.slices[0])
    sent = masks.apply(ask.tensors(0), ask.slices[0])
    reply = method.respond(replace(ask, message=Message(sent, ask.slices[0])), view(0))
    assert masks.kept(reply.mask) == masks.kept(ask.slices[0]) == total - total // 2
    moved = sum(int((reply.mask[n] & ~ask.slices[0][n]).sum()) for n in reply.mask)
    assert moved > 0
    assert all((reply.tensors[n][~m] == 0).all() for n, m in reply.mask.items())


def test_whole_masks_and_all_neighbours_are_fedavg(folder, tmp_path):
    """All clients hold as many rows, so a mean over clients is a mean over rows."""
    top = {"participation": 1.0, "rounds": 3}
    play(small("dispfl", "target=1e-9", "neighbours=3", "alpha=0", **top), tmp_path / "mixed", folder)
    play(small("fedavg", **top), tmp_path / "dense", folder)
    mixed, dense = model_of(tmp_path / "mixed"), model_of(tmp_path / "dense")
    assert all(torch.allclose(mixed[n], dense[n], atol=1e-6) for n in dense)


def test_runs_of_personal_models_are_scored_on_clients_rows(folder, tmp_path):
    summary = play(small("dispfl", "alpha=0", participation=1.0, rounds=3), tmp_path / "run", folder)
    rows = [row for row in rows_of(tmp_path / "run") if "accuracy" in row]
    assert all(row["evaluate_bytes"] > 0 for row in rows)
    assert summary["final"]["local_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert summary["final"]["accuracy"] == pytest.approx(sum(summary["final"]["local"]) / 4)


def test_clients_that_rest_are_remarked(folder):
    for participation, said in ((1.0, 0), (0.5, 1)):
        state, _ = lab(folder, "dispfl", participation=participation)
        assert len(DisPFL().remarks(state.setting)) == said
        assert not DisPFL(target=0).remarks(state.setting)


# ---- SpaFL


def test_units_below_their_threshold_go_and_slopes_pass():
    weight = torch.tensor([[1.0, -3.0], [0.2, 0.2]], requires_grad=True)
    tau = torch.tensor([1.5, 0.3], requires_grad=True)
    made = effective({"w": weight, "threshold.w": tau})["w"]
    assert made.tolist() == [[1.0, -3.0], [0.0, 0.0]]
    (made * torch.tensor([[1.0, 10.0], [100.0, 1000.0]])).sum().backward()
    # d/dm_f = sum of w c: 1 - 30 and 20 + 200; d above/d tau = -1, d above/d w = sign(w)/2
    assert tau.grad.tolist() == pytest.approx([29.0, -220.0])
    assert weight.grad[0].tolist() == pytest.approx([1.0 - 14.5, 10.0 + 14.5])
    assert weight.grad[1].tolist() == pytest.approx([110.0, 110.0])


def test_thresholds_that_moved_push_weights_of_their_unit():
    """A change is spread over a kernel's positions (4), or over the inputs (3); against the sign of the unit's sum."""
    weights = {"c": torch.full((2, 1, 2, 2), -1.0), "f": torch.ones(2, 3), "b": torch.ones(2)}
    message = {"change.c": torch.tensor([0.8, 0.0]), "change.f": torch.tensor([-0.6, 0.0])}
    found = received({**message, "threshold.c": torch.full((2,), 9.0)}, weights)
    assert torch.allclose(found["c"][0], torch.tensor(-1 + 0.8 / 4))
    assert torch.allclose(found["c"][1], torch.tensor(-1.0))
    assert torch.allclose(found["f"], torch.tensor([[1.2], [1.0]]).expand(2, 3))
    assert torch.equal(found["b"], weights["b"])


def test_a_layer_that_thresholds_would_empty_begins_again_from_zero():
    """Of 200 units 2 are a share of 0.01, which is too few; 3 are enough."""
    weight = torch.arange(1.0, 201.0).view(200, 1)
    for kept, expected in ((2, 200), (3, 3)):
        tau = torch.full((200,), 200.5 - kept)
        made = effective({"w": weight, "threshold.w": tau})["w"]
        assert int((made != 0).sum()) == expected
        assert bool((tau == 0).all()) == (expected == 200)


def test_nothing_but_thresholds_travels_and_weights_stay(folder):
    state, view = lab(folder, "spafl")
    method = small("spafl").build_method()
    ask = method.plan(state)
    units = {"fc1.weight": (12,), "fc2.weight": (8,), "fc3.weight": (3,)}
    assert {n: tuple(t.shape) for n, t in ask.message.tensors.items()} == {
        f"{kind}.{n}": shape for kind in ("threshold", "change") for n, shape in units.items()
    }
    client = view(0)
    reply = method.respond(ask, client)
    assert {n: tuple(t.shape) for n, t in reply.tensors.items()} == {f"threshold.{n}": s for n, s in units.items()}
    assert not same({"w": client.memory["fc1.weight"]}, {"w": client.initial["fc1.weight"]})
    after = method.absorb(
        state, reduce(ask, state, [(0, reply), (1, told({n: t + 1 for n, t in reply.tensors.items()}))])
    )
    sent = method.plan(after).message.tensors
    for name, tau in reply.tensors.items():
        assert torch.allclose(sent[name], tau + 0.5)
        assert torch.allclose(sent[name.replace("threshold", "change")], tau + 0.5)  # thresholds were 0
    silent = method.absorb(after, reduce(method.plan(after), state, []))
    assert same(silent.memory["threshold"], after.memory["threshold"])
    assert not any(change.any() for change in silent.memory["change"].values())


def test_a_client_uses_its_weights_under_its_own_thresholds(folder):
    state, view = lab(folder, "spafl")
    method = small("spafl").build_method()
    message = method.examine(state).message
    assert not message.tensors
    client = view(2)
    assert same(method.uses(message, client), client.initial)  # it never took part
    client.memory = {"fc2.weight": torch.ones(8, 12), "threshold.fc2.weight": torch.tensor([2.0] + [0.5] * 7)}
    used = method.uses(message, client)["fc2.weight"]
    assert used[:, 0].tolist() == [0.0] + [1.0] * 7


def test_one_client_alone_has_its_own_thresholds(folder):
    state, view = lab(folder, "spafl")
    method = small("spafl").build_method()
    ask = method.plan(state)
    reply = method.respond(ask, view(0))
    after = method.absorb(state, reduce(ask, state, [(0, reply)])).memory["threshold"]
    assert same({f"threshold.{n}": t for n, t in after.items()}, reply.tensors)


def test_a_heavier_penalty_raises_thresholds(folder):
    state, view = lab(folder, "spafl")
    found = []
    for weight in (0.0, 0.01, 0.1):
        method = small("spafl", f"penalty={weight}", "warmup=0").build_method()
        reply = method.respond(method.plan(state), view(0))
        found.append(sum(float(t.sum()) for t in reply.tensors.values()))
    assert found == sorted(found)
    assert found[2] > found[0]


# ---- FED-PUB


def test_shares_follow_the_cosine():
    h = {3: torch.tensor([2.0, 0.0]), 5: torch.tensor([0.0, 1.0]), 8: torch.tensor([4.0, 0.0])}
    shares = mixing_shares(h, 1.0)
    e = math.e
    assert list(shares[3].values()) == pytest.approx([e / (2 * e + 1), 1 / (2 * e + 1), e / (2 * e + 1)])
    assert list(shares[5].values()) == pytest.approx([1 / (e + 2), e / (e + 2), 1 / (e + 2)])
    assert mixing_shares({}, 1.0) == {}


def test_each_client_gets_the_mean_of_its_like(folder):
    state, _ = lab(folder, "fedpub")
    method = FedPUB(tau=1.0)
    ask = method.plan(state)
    h = {0: [1.0, 0.0], 1: [0.0, 1.0]}
    replies = [
        (k, told({**{n: torch.full_like(t, 1.0 + k) for n, t in state.weights.items()},
                  "embedding": torch.tensor(h[k] + [0.0] * 6)}))
        for k in h
    ]  # fmt: skip
    after = method.absorb(state, reduce(ask, state, replies))
    near = math.e / (math.e + 1)
    models = method.plan(after).own
    assert torch.allclose(models[0]["fc1.bias"], torch.tensor(near + 2 * (1 - near)))
    assert torch.allclose(models[1]["fc1.bias"], torch.tensor(2 * near + (1 - near)))
    assert torch.allclose(models[2]["fc1.bias"], torch.tensor(1.5))  # never heard of: the mean of all


def test_a_little_tau_gives_everyone_the_mean(folder, tmp_path):
    """All clients hold as many rows, so that the mean over clients is FedAvg's."""
    top = {"participation": 1.0, "rounds": 2}
    play(small("fedpub", "tau=1e-9", "l1=0", "prox=0", **top), tmp_path / "like", folder)
    play(small("fedavg", **top), tmp_path / "dense", folder)
    like, dense = model_of(tmp_path / "like"), model_of(tmp_path / "dense")
    assert all(torch.allclose(like[n], dense[n], atol=1e-6) for n in dense)


def test_soft_masks_stay_private_and_prune_what_is_small(folder):
    state, view = lab(folder, "fedpub")
    method = FedPUB(l1=0.5)
    client = view(0)
    reply = method.respond(method.plan(state), client)
    assert set(reply.tensors) == {*state.weights, "embedding"}
    assert set(client.memory) == {f"soft.{n}" for n in state.setting.layout.names("weight")}
    client.memory["soft.fc1.weight"] = torch.linspace(-1, 1, 12 * 16).view(12, 16)
    used = method.uses(Message(dict(state.weights)), client)["fc1.weight"]
    soft = client.memory["soft.fc1.weight"]
    assert torch.equal(used == 0, soft.abs() < 0.5)
    assert torch.equal(used, torch.where(soft.abs() < 0.5, 0.0, soft) * state.weights["fc1.weight"])


@pytest.mark.parametrize("term", ["l1", "prox"])
def test_a_heavier_term_moves_what_it_weighs(folder, term):
    state, view = lab(folder, "fedpub")
    found = []
    for weight in (1e-6, 0.02, 0.2):
        method, client = FedPUB(tau=0.0, **{"l1": 1e-6, "prox": 0.0} | {term: weight}), view(0)
        client.memory = {f"soft.{n}": torch.ones_like(state.weights[n]) for n in state.setting.layout.names("weight")}
        reply = method.respond(method.plan(state), client)
        if term == "l1":
            found.append(sum(float(t.abs().mean()) for t in client.memory.values()))
        else:
            found.append(sum(float((reply.tensors[n] - t).square().sum()) for n, t in state.weights.items()))
    assert found[0] > found[1] > found[2]


def test_masked_touches_nothing_else():
    made = masked({"a": torch.tensor([2.0, 3.0]), "b": torch.tensor([5.0]), "soft.a": torch.tensor([0.5, 0.0])})
    assert {n: t.tolist() for n, t in made.items()} == {"a": [1.0, 0.0], "b": [5.0]}


def test_fedpub_refuses_a_model_without_a_linear_end(folder):
    state, _ = lab(folder, "fedpub")
    specs, untraced = dict(state.setting.specs), replace(state.setting.layout, features=0)
    specs["fc3.weight"] = replace(specs["fc3.weight"], shape=(3, 8, 1))
    with pytest.raises(ModelError, match=r"fc3\.weight is none; set tau = 0"):
        FedPUB().check(replace(state.setting, specs=specs, layout=untraced))


def test_clients_that_are_alike_find_each_other_on_subgraphs(tmp_path):
    """Communities are of two kinds: the shares of one's own kind are above those of the other."""
    study = small(
        "fedpub", participation=1.0, rounds=6,
        data={"source": "communities", "clients": 10, "partition": "natural", "validation_fraction": 0},
        model={"name": "gcn"}, training={"epochs": 2, "batch_size": 16, "optimiser": "adam", "lr": 0.01},
    )  # fmt: skip
    with prepare.federation(study) as folder:
        summary = play(study, tmp_path / "like", folder)
        dense = play(study.dense(), tmp_path / "dense", folder)
        seen = []

        def kept(embeddings, tau):
            seen.append(mixing_shares(embeddings, tau))
            return seen[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("secateur.methods.fedpub.mixing_shares", kept)
            play(study, tmp_path / "again", folder)
    own = [share for i, row in seen[-1].items() for j, share in row.items() if i != j and i % 2 == j % 2]
    other = [share for i, row in seen[-1].items() for j, share in row.items() if i % 2 != j % 2]
    assert sum(own) / len(own) > 1.1 * sum(other) / len(other)
    assert summary["final"]["accuracy"] > 0.5
    assert dense["final"]["local"]
