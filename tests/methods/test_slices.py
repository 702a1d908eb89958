"""Federated Dropout, HeteroFL, Independent Subnetwork Training: who holds what, how it is merged, what it costs."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from helpers import Wrapped, model_of, play, rows_of, same, small, tiny_shards
from secateur import cost
from secateur.contract.client import Client
from secateur.contract.reducer import reduce
from secateur.data.shards import open_shards
from secateur.engines import Failure
from secateur.errors import ModelError
from secateur.federation import client, prepare
from secateur.learning.evaluate import evaluate
from secateur.learning.resident import load, tensors_of
from secateur.methods.federated_dropout import FederatedDropout
from secateur.methods.fjord import FjORD
from secateur.methods.heterofl import HeteroFL
from secateur.methods.ist import IndependentSubnetworks
from secateur.methods.kit.rounds import train_ask
from secateur.pruning.structure import plan, slim
from secateur.pruning.surgery import shrink
from secateur.streams import derive
from secateur.wire.codec import part_sizes
from secateur.wire.message import Message

METHODS = ["federated_dropout", "fjord", "heterofl", "ist"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def start(folder):
    def of(study):
        shards = open_shards(folder)
        model = client.make_model(study, shards)
        setting = client.make_setting(study, model, shards.clients, client.example(shards))
        return study.build_method().start(setting, tensors_of(model), {}), model

    return of


def reply(tensors, mask, samples):
    return Message(tensors, mask, {"samples": samples, "processed": 0, "loss": 0.0})


def units(mask, layer):
    """Return which units of a hidden layer a slice holds, by its weights."""
    return mask[f"{layer}.weight"].any(1)


def test_heterofl_gives_leading_units_by_the_clients_number(start):
    state, _ = start(small("heterofl", participation=1.0))
    slices = HeteroFL(levels=3).plan(state).slices
    held = {k: (int(units(m, "fc1").sum()), int(units(m, "fc2").sum())) for k, m in slices.items()}
    assert held == {0: (12, 8), 1: (6, 4), 2: (3, 2), 3: (12, 8)}
    assert units(slices[1], "fc1").tolist() == [True] * 6 + [False] * 6
    mask = slices[1]
    assert mask["fc2.weight"].tolist() == [[n < 4 and i < 6 for i in range(12)] for n in range(8)]
    assert mask["fc1.bias"].tolist() == [True] * 6 + [False] * 6
    assert mask["fc3.weight"].tolist() == [[i < 4 for i in range(8)]] * 3
    assert "fc3.bias" not in mask


def test_dropout_draws_anew_for_each_client_and_round(start):
    state, _ = start(small("federated_dropout", participation=1.0))
    method = FederatedDropout(rate=0.3)
    first = method.plan(state)
    assert {int(units(m, "fc1").sum()) for m in first.slices.values()} == {12 - 3}
    assert {int(units(m, "fc2").sum()) for m in first.slices.values()} == {8 - 2}
    drawn = {tuple(units(m, "fc1").tolist()) for m in first.slices.values()}
    later = method.plan(method.absorb(state, reduce(first, state, [])))
    drawn |= {tuple(units(m, "fc1").tolist()) for m in later.slices.values()}
    assert len(drawn) > 4
    again = method.plan(state)
    assert all(same(again.slices[k], m) for k, m in first.slices.items())
    nearly_all = FederatedDropout(rate=0.99).plan(state).slices[0]
    assert int(units(nearly_all, "fc2").sum()) == 1


def test_subnetworks_share_no_unit_and_leave_none_out(start):
    state, _ = start(small("ist", participation=1.0))
    slices = IndependentSubnetworks().plan(state).slices
    for layer in ("fc1", "fc2"):
        assert (sum(units(m, layer).int() for m in slices.values()) == 1).all()
    two = IndependentSubnetworks(parts=2).plan(state).slices
    assert torch.equal(units(two[0], "fc1"), units(two[2], "fc1"))
    assert torch.equal(units(two[0], "fc1"), ~units(two[1], "fc1"))
    more = IndependentSubnetworks(parts=11).plan(state).slices
    assert all(units(m, "fc2").any() for m in more.values())


def test_a_weight_is_the_mean_over_its_holders_and_stays_where_nobody_held_it(start):
    study = small("heterofl", participation=1.0)
    state, _ = start(study)
    method = HeteroFL(levels=3)
    ask = method.plan(state)
    told = []
    for k, value, rows in ((1, 2.0, 30), (2, 5.0, 10)):  # widths 1/2 and 1/4; nobody holds the other half
        mask = ask.slices[k]
        full = {n: torch.full_like(t, value) for n, t in state.weights.items()}
        tensors = {n: t.masked_fill(~mask[n], 0.0) if n in mask else t for n, t in full.items()}
        told.append((k, reply(tensors, mask, rows)))
    after = method.absorb(state, reduce(ask, state, told))
    weight = after.weights["fc1.weight"]
    assert torch.allclose(weight[:3], torch.tensor((2.0 * 30 + 5.0 * 10) / 40))
    assert torch.allclose(weight[3:6], torch.tensor(2.0))
    assert torch.equal(weight[6:], state.weights["fc1.weight"][6:])
    assert torch.allclose(after.weights["fc3.bias"], torch.tensor(2.75))
    assert after.mask is None


@pytest.mark.parametrize("name", METHODS)
def test_a_slice_is_a_narrower_model(name, start):
    """What a client trains under its mask is what a model computes from which those units were cut."""
    state, model = start(small(name, participation=1.0))
    x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for mask in small(name, participation=1.0).build_method().plan(state).slices.values():
        load(model, {n: t.masked_fill(~mask[n], 0.0) if n in mask else t for n, t in state.weights.items()})
        narrow = shrink(model, plan(mask, state.setting.layout.groups))
        assert sum(p.numel() for p in narrow.parameters()) <= sum(p.numel() for p in model.parameters())
        torch.testing.assert_close(narrow(x), model(x))


class Watched(Wrapped):
    """Keep what was carried, by client."""

    log = ()

    def exchange(self, requests, deadline=None):
        def seen():
            for who, request in requests:
                self.log.append(("down", who, request))
                yield who, request

        for who, answer in self.inner.exchange(seen(), deadline):
            self.log.append(("up", who, answer))
            yield who, answer


def test_narrow_clients_get_and_send_less(folder, tmp_path):
    watched = type("Here", (Watched,), {"log": []})
    study = small("heterofl", participation=1.0, rounds=2)
    play(study, tmp_path / "run", folder, open_engine=watched.open)
    sizes = {}
    for way, who, data in watched.log[: 2 * 4 * 2]:
        sizes.setdefault((way, who), []).append(part_sizes(data))
    kept = {
        0: 12 * 16 + 12 + 8 * 12 + 8 + 3 * 8 + 3,
        1: 6 * 16 + 6 + 4 * 6 + 4 + 3 * 4 + 3,
        2: 3 * 16 + 3 + 6 + 2 + 6 + 3,
    }
    for way in ("down", "up"):
        for who, count in kept.items():
            assert all(part["values"] <= 4 * count + 8 for part in sizes[way, who])
    # the slice is told once, as units; after that both ends know it
    assert all(part["mask"] == 16 for part in sizes["up", 2])
    assert sizes["down", 2][0]["mask"] < 60
    assert sizes["down", 2][1]["mask"] == 16


def test_training_is_counted_by_what_each_client_held(folder, tmp_path, start):
    study = small("heterofl", participation=1.0, rounds=1)
    play(study, tmp_path / "run", folder)
    state, model = start(study)
    shards = open_shards(folder)
    uses = cost.uses(model, client.example(shards))
    slices = HeteroFL().plan(state).slices
    expected = sum(3 * len(shards.train(k)[1]) * cost.macs(uses, state.weights, m) for k, m in slices.items())
    row = rows_of(tmp_path / "run")[0]
    assert row["train_macs"] == row["train_macs_physical"] == expected  # a slice has no holes


def test_ordered_dropout_trains_a_width_drawn_at_each_step(folder, start):
    study = small("fjord", "levels=2", training={"epochs": 1, "batch_size": 64, "lr": 0.1})  # one step a round
    state, model = start(study)
    shards = open_shards(folder)
    view = Client(1, state.setting, model, client.wrap(shards, *shards.train(1)), study.training)
    method = FjORD(levels=2)
    half = method.widths(state)["1/2"]
    assert {n: int(m.sum()) for n, m in half.items() if "bias" in n} == {"fc1.bias": 6, "fc2.bias": 4}
    seen = set()
    for round_ in range(1, 9):
        draw = torch.Generator().manual_seed(derive(study.seed, "narrow", round_, 1))
        width = half if int(torch.randint(2, (1,), generator=draw)) == 0 else None
        ask = train_ask(state, round_, None)
        reply = method.respond(replace(ask, message=replace(ask.message, mask=method.mask(state.setting, {}))), view)
        expected, _ = view.train(state.weights, width, round_=round_)
        for name, tensor in reply.tensors.items():
            keep = width[name] if width and name in width else torch.ones_like(tensor, dtype=torch.bool)
            assert torch.allclose(tensor[keep], expected[name][keep], atol=1e-6)
            assert torch.equal(tensor[~keep], state.weights[name][~keep])  # what was not drawn did not move
        seen.add(width is None)
    assert seen == {True, False}


def test_a_weak_device_is_sent_no_more_than_it_can_carry(start):
    state, _ = start(small("fjord", "levels=2", participation=1.0))
    slices = FjORD(levels=2).plan(state).slices
    assert [int(units(slices[k], "fc1").sum()) if "fc1.weight" in slices[k] else 12 for k in range(4)] == [6, 12, 6, 12]


def test_every_width_of_the_shipped_model_is_scored(folder, tmp_path, start):
    summary = play(small("heterofl", rounds=3), tmp_path / "run", folder)
    state, model = start(small("heterofl"))
    shards = open_shards(folder)
    shipped = replace(state, weights=model_of(tmp_path / "run"))
    widths = HeteroFL().widths(shipped)
    assert list(widths) == list(summary["final"]["widths"]) == ["1/2", "1/4"]
    for name, mask in widths.items():
        narrow = shrink(model, plan(mask, state.setting.layout.groups))
        narrow.load_state_dict(slim(shipped.weights, plan(mask, state.setting.layout.groups)), strict=False)
        score = evaluate(narrow, client.wrap(shards, *shards.server_test()))
        assert summary["final"]["widths"][name]["accuracy"] == score.metric
        macs = cost.macs(cost.uses(narrow, client.example(shards)), narrow.state_dict(), None)
        assert summary["final"]["widths"][name]["macs_physical"] == macs


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "settings", [("wire.values=bf16",), ("wire.values=int8",), ("wire.replies=updates",), ("wire.replies=topk",)]
)
def test_every_way_to_travel_goes_with_slices(name, settings, folder, tmp_path):
    summary = play(small(name, *settings, rounds=3), tmp_path / "run", folder)
    assert summary["left_out"] == {}
    assert all(torch.isfinite(t).all() for t in model_of(tmp_path / "run").values())


def test_updates_come_to_the_same_model_as_weights(folder, tmp_path):
    play(small("heterofl", rounds=3), tmp_path / "weights", folder)
    play(small("heterofl", "wire.replies=updates", rounds=3), tmp_path / "updates", folder)
    one, other = model_of(tmp_path / "weights"), model_of(tmp_path / "updates")
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_client_that_answers_with_anothers_slice_loses_its_place(folder, tmp_path):
    class Swapped(Wrapped):
        def exchange(self, requests, deadline=None):
            answers = dict(self.inner.exchange(requests, deadline))
            if len(answers) == 4 and not any(isinstance(a, Failure) for a in answers.values()):
                answers[2] = answers[1]
            yield from answers.items()

    play(small("heterofl", participation=1.0, rounds=2), tmp_path / "run", folder, open_engine=Swapped.open)
    for row in rows_of(tmp_path / "run"):
        assert [o["client"] for o in row["left_out"]] == [2]


def test_a_device_that_lost_its_slice_is_served_at_once(folder, tmp_path):
    class Forgetful(Wrapped):
        @classmethod
        def open(cls, *args):
            engine = super().open(*args)
            read = engine.states.get
            engine.states.get = lambda who: None if who == 1 else read(who)
            return engine

    study = small("heterofl", participation=1.0, rounds=4)
    play(study, tmp_path / "run", folder, open_engine=Forgetful.open)
    play(study, tmp_path / "whole", folder)
    assert same(model_of(tmp_path / "run"), model_of(tmp_path / "whole"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["left_out"] == {}


def test_bounds_are_told():
    for make, words in (
        (lambda: FederatedDropout(rate=1.0), r"rate = 1\.0 must be in \[0, 1\)"),
        (lambda: HeteroFL(levels=0), "levels = 0 must be 1 to 16"),
        (lambda: IndependentSubnetworks(parts=-1), "parts = -1 must be 0 or more"),
    ):
        with pytest.raises(Exception, match=words):
            make()
    assert math.ceil(2.0**-2 * 12) == 3


class Normed(nn.Module):
    """A model whose only hidden layer enters a layer norm."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 6), nn.LayerNorm(6), nn.Linear(6, outputs))

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("method", ["heterofl", "fjord", "federated_dropout", "ist", "fedconv"])
def test_a_model_without_a_layer_that_can_be_narrower_is_refused(method, tmp_path):
    shards = tiny_shards(tmp_path / "rows")
    study = small(method, model={"name": "mlp", "structure": "none"})
    with pytest.raises(ModelError, match=r"no layer of this model can be narrower \(model.structure = none\)"):
        play(study, tmp_path / "run", shards)
    with pytest.raises(ModelError, match=r"body.1: 'body.2' \(LayerNorm\) mixes its channels"):
        play(small(method, model={"name": f"{__name__}:Normed"}), tmp_path / "normed", shards)


def test_layers_that_stay_whole_are_recorded(tmp_path, capsys):
    text = tmp_path / "play.txt"
    text.write_text("A:\n" + "to be or not to be " * 60 + "\n\nB:\n" + "that is the question " * 60)
    study = small(
        "heterofl", rounds=1, data={"source": f"text:{text}", "clients": 2, "partition": "iid"},
        model={"name": "chartransformer", "options": {"width": 8, "heads": 2, "depth": 1}},
    )  # fmt: skip
    with prepare.federation(study) as folder:
        summary = play(study, tmp_path / "run", folder)
    # MACs of one character: 8 x 8 for each of query, key, value and out, 8 x 256 for fc1 and for fc2: of these out and
    # fc2 write to the residual stream, (64 + 2048) / (256 + 4096); the output layer reads the last character only
    assert summary["remarks"] == [
        (
            "layers with 48% of the MACs keep all their units (embedding, blocks.0.attention.out, blocks.0.fc2: "
            "'blocks.0.norm1' (LayerNorm) mixes its channels)"
        )
    ]
    assert summary["remarks"][0] in (tmp_path / "run" / "run.log").read_text()
    capsys.readouterr()


def test_a_narrow_run_is_a_run_of_the_narrow_model(tmp_path):
    """The shipped model has ceil(w u) units of each layer, and messages are as small."""
    shards = tiny_shards(tmp_path / "rows")
    whole = play(small("fedavg"), tmp_path / "whole", shards)["final"]
    half = play(small("narrow", "width=0.5"), tmp_path / "half", shards)["final"]
    assert half["parameters_physical"] == 16 * 6 + 6 + 6 * 4 + 4 + 4 * 3 + 3  # 12 and 8 hidden units are 6 and 4
    assert half["macs_physical"] == half["macs"] < whole["macs"]
    rows = [rows_of(tmp_path / name)[-1]["up"]["values"] for name in ("half", "whole")]
    assert rows[0] < 0.6 * rows[1]


def test_heterofl_whose_clients_are_all_narrow_is_narrow(tmp_path):
    """Client 1 of every two has width 1/2: alone in the federation it trains what ``narrow`` trains."""
    shards = tiny_shards(tmp_path / "rows")
    hetero = small("heterofl", "levels=2", rounds=1, participation=1.0)
    narrow = small("narrow", "width=0.5", rounds=1, participation=1.0)
    views = {s.method: client.Participant(s, open_shards(shards)) for s in (hetero, narrow)}
    states = {n: v.method.start(v.setting, tensors_of(v.model), {}) for n, v in views.items()}
    asks = {n: views[n].method.plan(state) for n, state in states.items()}
    assert same(asks["heterofl"].slices[1], asks["narrow"].message.mask)
