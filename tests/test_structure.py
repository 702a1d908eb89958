"""Structure in a run: clients that train the slim model, settings that choose how units are found, refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import secateur.learning.work
from helpers import model_of, play, rows_of, same, small, tiny_shards
from secateur import cost
from secateur.contract.client import Client
from secateur.data.shards import make_shards, open_shards
from secateur.data.sources import Source
from secateur.errors import ModelError
from secateur.export.export import export, read
from secateur.federation import client, server
from secateur.learning.resident import tensors_of
from secateur.methods.kit.hooks import Feedback
from secateur.pruning.structure import plan, sizes, slice_of
from secateur.study.runtime import Runtime

CNN = {"name": "smallcnn", "options": {"width": 6, "features": 10}}
CHANNELS = ("granularity=channel", "schedule.sparsity=0.5", "schedule.start=0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"), size=8)


def lab(folder, study):
    shards = open_shards(folder)
    model = client.make_model(study, shards)
    setting = client.make_setting(study, model, shards.clients, client.example(shards))
    view = Client(0, setting, model, client.wrap(shards, *shards.train(0)), study.training)
    return view, tensors_of(model)


@pytest.mark.parametrize(
    "settings", [{}, {"optimiser": "adam", "lr": 0.01}, {"momentum": 0.9, "prox": 0.1, "clip": 1.0}]
)
@pytest.mark.parametrize("model", [CNN, {"name": "resnet20", "options": {"width": 4}}])
def test_a_slim_client_trains_to_the_weights_of_a_masked_one(folder, settings, model):
    study = small("fedavg", model=model, training={"epochs": 2, "batch_size": 8, "lr": 0.05, **settings})
    view, tensors = lab(folder, study)
    keep = {g.name: torch.arange(g.units) % 3 != 1 for g in view.setting.layout.of("channel")}
    shapes = {name: spec.shape for name, spec in view.setting.specs.items()}
    mask = slice_of(view.setting.layout.groups, shapes, keep)
    slim, one = view.train(tensors, mask, round_=1)
    whole = replace(view.setting, layout=replace(view.setting.layout, groups=()))
    masked, two = replace(view, setting=whole).train(tensors, mask, round_=1)
    assert (one.processed, one.steps) == (two.processed, two.steps)
    assert one.loss == pytest.approx(two.loss, abs=1e-5)
    assert list(slim) == list(masked)
    for name, tensor in slim.items():
        assert torch.allclose(tensor, masked[name], atol=2e-5), name
        assert not tensor[~mask[name]].any() if name in mask else True


def test_weights_that_only_dead_units_read_come_back_as_they_were_sent(folder):
    view, tensors = lab(folder, small("fedavg", model=CNN))
    mask = {n: torch.ones_like(t, dtype=torch.bool) for n, t in tensors.items()}
    for name in ("conv1.weight", "conv1.bias"):
        mask[name][2] = False
    trained, _ = view.train(tensors, mask, round_=1)
    assert torch.equal(trained["conv2.weight"][:, 2], tensors["conv2.weight"][:, 2])
    assert not torch.equal(trained["conv2.weight"][:, 1], tensors["conv2.weight"][:, 1])
    assert not trained["conv1.weight"][2].any()


def test_with_feedback_nothing_is_cut(folder, monkeypatch):
    view, tensors = lab(folder, small("fedavg", model=CNN))
    monkeypatch.setattr(secateur.learning.work, "shrink", None)
    mask = {n: torch.ones_like(t, dtype=torch.bool) for n, t in tensors.items()}
    for name in ("conv1.weight", "conv1.bias"):
        mask[name][2] = False
    view.train(tensors, mask, round_=1, hooks=[Feedback()])
    with pytest.raises(TypeError):
        view.train(tensors, mask, round_=1)


def test_what_clients_computed_is_counted_on_the_cut_models(folder, tmp_path):
    study = small("fedsparsify", *CHANNELS, model=CNN)
    play(study, tmp_path / "run", folder)
    rows = rows_of(tmp_path / "run")
    view, tensors = lab(folder, study)
    uses = cost.uses(view.model, client.example(open_shards(folder)))
    dense = cost.macs(uses, tensors, None)
    assert rows[0]["train_macs"] == rows[0]["train_macs_physical"] == 3 * rows[0]["processed"] * dense
    physical = [row["train_macs_physical"] / row["processed"] for row in rows]
    assert physical == sorted(physical, reverse=True)
    assert physical[-1] < 0.7 * physical[0]
    final = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert final["phases"]["train"]["train_macs_physical"] == sum(row["train_macs_physical"] for row in rows)
    shipped = model_of(tmp_path / "run")
    mask = {n.removeprefix("mask/"): t.bool() for n, t in shipped.items() if n.startswith("mask/")}
    shapes = {name: spec.shape for name, spec in view.setting.specs.items()}
    left = sizes(shapes, plan(mask, view.setting.layout.groups))
    assert cost.physical(uses, left) == final["final"]["macs_physical"]  # counted by the plan, and on the cut model


@pytest.mark.parametrize("model", [CNN, {"name": "resnet20", "options": {"width": 4}}])
def test_slim_clients_give_the_same_bits_whatever_the_workers(folder, tmp_path, model):
    study = small("fedsparsify", *CHANNELS, rounds=3, model=model)
    play(study, tmp_path / "inline", folder)
    play(study, tmp_path / "two", folder, runtime=Runtime(workers=2))
    assert same(model_of(tmp_path / "inline"), model_of(tmp_path / "two"))


def test_where_nothing_may_be_cut_the_model_keeps_its_shape(folder, tmp_path):
    pruned = ("granularity=hybrid", "granularity.rho=0.9", "schedule.sparsity=0.8", "schedule.start=0")
    kept = play(small("fedsparsify", *pruned, "model.structure=none", model=CNN), tmp_path / "none", folder)
    cut = play(small("fedsparsify", *pruned, model=CNN), tmp_path / "trace", folder)
    assert kept["final"]["parameters_physical"] == kept["final"]["parameters_dense"]
    assert cut["final"]["parameters_physical"] < cut["final"]["parameters_dense"]


class Viewing(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, width, 3, padding=1), nn.Linear(width * 64, 3)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        return self.out(x.view(x.size(0), -1))


def viewing(shape, outputs):
    return Viewing(6)


def test_a_model_that_flattens_images_with_view_runs_and_is_shipped(folder, tmp_path):
    study = small("fedsparsify", *CHANNELS, model={"name": "test_structure:viewing"})
    final = play(study, tmp_path / "inline", folder)["final"]
    play(study, tmp_path / "two", folder, runtime=Runtime(workers=2))
    assert same(model_of(tmp_path / "inline"), model_of(tmp_path / "two"))
    assert final["parameters_physical"] < final["parameters_dense"]
    export(tmp_path / "inline", "torch")  # compares its outputs with those of the masked model


class InTraining(nn.Module):
    """A layer that only training uses, beside one that is used at any time."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(64, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = torch.relu(self.a(x.flatten(1)))
        return self.out(torch.relu(self.b(x)) if self.training else x)


class ReadTwice(nn.Module):
    """A weight that a call reads besides its layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 12), nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x):
        x = x.flatten(1)
        return self.b(torch.relu(self.a(x))) + self.c(torch.relu(functional.linear(x.flip(1), self.a.weight)))


class Stateless(nn.Module):
    """One pool and one activation for all layers, and a residual block with one activation."""

    def __init__(self):
        super().__init__()
        self.pool, self.act = nn.MaxPool2d(2), nn.ReLU(inplace=True)
        self.a, self.b, self.c = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 6, 1)
        self.norm, self.out = nn.BatchNorm2d(6), nn.Linear(24, 3)

    def forward(self, x):
        x = self.pool(self.act(self.a(x)))
        x = self.act(self.norm(self.c(self.act(self.b(x)))) + x)
        return self.out(self.pool(x).flatten(1))


@pytest.mark.parametrize(("name", "units"), [("InTraining", 6), ("ReadTwice", 6), ("Stateless", 3)])
def test_what_is_shipped_computes_what_was_scored_however_layers_are_used(folder, tmp_path, name, units):
    """Half of the units of each layer are gone, and the slim model is the masked one."""
    model = {"name": "test_structure:made", "options": {"which": name}}
    study = small("fedsparsify", *CHANNELS, "allocation=uniform", model=model, data={"clients": 4})
    summary = play(study, tmp_path / "run", folder)
    shipped = read(tmp_path / "run")
    assert len(shipped.slim.get_parameter("a.weight")) == units
    assert summary["remarks"] == []
    x = torch.rand(5, 1, 8, 8)
    assert torch.allclose(shipped.slim(x), shipped.masked(x), atol=1e-5)


def made(shape, outputs, which):
    return {"InTraining": InTraining, "ReadTwice": ReadTwice, "Stateless": Stateless}[which]()


def test_what_stays_whole_is_said_with_its_share_of_the_macs(folder, tmp_path):
    """64 x 8 inputs enter a layer norm, 8 x 6 do not, and 6 x 3 are the output's."""
    study = small("fedsparsify", *CHANNELS, model={"name": "test_structure:normed"})
    summary = play(study, tmp_path / "run", folder)
    share = round(100 * 64 * 8 / (64 * 8 + 8 * 6 + 6 * 3))
    assert summary["remarks"] == [
        f"layers with {share}% of the MACs keep all their units (1: '2' (LayerNorm) mixes its channels)"
    ]
    assert summary["remarks"][0] in (tmp_path / "run" / "run.log").read_text()
    single = play(small("fedsparsify", model={"name": "test_structure:normed"}), tmp_path / "single", folder)
    assert single["remarks"] == []  # no units are removed anyway


def normed(shape, outputs):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, outputs)
    )


def test_an_export_as_large_as_the_dense_model_says_so(folder, tmp_path):
    for name, settings in (("single", ()), ("channels", CHANNELS)):
        play(small("fedsparsify", *settings, model=CNN), tmp_path / name, folder)
        export(tmp_path / name, "safetensors")
        text = (tmp_path / name / "export" / "card.md").read_text()
        assert ("it is as large as the dense model" in text) == ("granularity=channel" in text) == (name == "single")
        assert ("this is the physically slim model" in text) == (name == "channels")


def test_units_by_torch_pruning_lead_to_the_same_run(folder, tmp_path):
    pytest.importorskip("torch_pruning", reason="the extra structure is not installed")
    for how in ("trace", "torch_pruning"):
        play(small("fedsparsify", *CHANNELS, f"model.structure={how}", model=CNN), tmp_path / how, folder)
    assert same(model_of(tmp_path / "trace"), model_of(tmp_path / "torch_pruning"))


def test_a_model_without_such_units_is_refused_before_anything_is_written(folder, tmp_path):
    study = small("fedsparsify", "granularity=head", model=CNN)
    with pytest.raises(ModelError, match="granularity head: the model has no removable head"):
        server.Run(study, Runtime(workers=0), tmp_path / "run", folder)
    assert not (tmp_path / "run").exists()
    none = small("fedsparsify", "granularity=channel", "model.structure=none", model=CNN)
    with pytest.raises(ModelError, match="has no removable channel"):
        server.Run(none, Runtime(workers=0), tmp_path / "run", folder)


@pytest.mark.parametrize("granularity", ["head", "block"])
def test_heads_and_blocks_are_pruned_and_shipped(tmp_path, granularity):
    x = np.random.default_rng(0).integers(0, 5, (40, 6)).astype(np.uint8)
    source = Source("made up", x, x[:, -1].astype(np.int64), x[:8], x[:8, -1].astype(np.int64), None, 5, kind="tokens")
    folder = tmp_path / "shards"
    folder.mkdir()
    make_shards(source, [np.arange(k, 40, 4) for k in range(4)], test_fraction=0.2, seed=0, folder=folder)
    model = {"name": "chartransformer", "options": {"width": 8, "heads": 4, "hidden": 8, "depth": 3}}
    study = small("fedsparsify", f"granularity={granularity}", "schedule.sparsity=0.5", "schedule.start=0", model=model)
    summary = play(study, tmp_path / "run", folder)
    assert summary["final"]["parameters_physical"] < summary["final"]["parameters_dense"]
    document = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert bool(document["dropped"]) == (granularity == "block")
