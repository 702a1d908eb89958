"""Tied weights are one parameter: one mask, counted and sent once, and one tensor in every file."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from everything import Everything
from helpers import lab, model_of, play, rows_of, small, tiny_shards
from secateur import cost
from secateur.export.export import export, load, read
from secateur.federation import prepare
from secateur.learning.loop import fit
from secateur.learning.optimiser import Training
from secateur.learning.resident import load as load_tensors
from secateur.learning.resident import tensors_of
from secateur.learning.task import Data
from secateur.methods.kit.similarity import last_layer_inputs, last_layer_width
from secateur.pruning.discovery import layout
from secateur.streams import Turn
from secateur.wire.message import specs_of

WIDTH = 12


class Language(nn.Module):
    """The next character from the mean of those before; the output layer is the embedding."""

    def __init__(self, shape, outputs, first="embedding"):
        super().__init__()
        del shape
        parts = {"embedding": nn.Embedding(outputs, WIDTH), "head": nn.Linear(WIDTH, outputs, bias=False)}
        for name in sorted(parts, key=lambda name: name != first):
            self.add_module(name, parts[name])
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.relu(self.middle(self.embedding(x).mean(1))))


def text_study(folder, method, *settings, **top):
    file = folder / "text.txt"
    file.write_text("the shears are sharp, and the hedge is long. " * 60)
    data = {"source": f"text:{file}", "clients": 3, "partition": "iid", "test_fraction": 0.2}
    model = {"name": "test_ties:Language", "options": top.pop("options", {})}
    return small(method, *settings, rounds=2, participation=1.0, data=data, model=model, **top)


@pytest.mark.parametrize("first", ["embedding", "head"])
@pytest.mark.parametrize("method", ["fedsparsify", "random"])
def test_one_mask_of_exact_size_that_both_uses_have(method, first, tmp_path):
    study = text_study(tmp_path, method, "schedule.sparsity=0.5", options={"first": first})
    with prepare.federation(study) as folder:
        summary = play(study, tmp_path / "run", folder)
    tensors, name = model_of(tmp_path / "run"), f"{first}.weight"
    letters = tensors[name].shape[0]
    weights = letters * WIDTH + WIDTH * WIDTH
    assert set(tensors) == {name, f"mask/{name}", "middle.weight", "mask/middle.weight", "middle.bias"}
    kept = sum(int(t.sum()) for n, t in tensors.items() if n.startswith("mask/"))
    assert kept == weights - weights // 2
    assert (tensors[name][~tensors[f"mask/{name}"].bool()] == 0).all()
    assert summary["final"]["parameters_dense"] == weights + WIDTH
    assert rows_of(tmp_path / "run")[-1]["kept"] == kept + WIDTH
    uses = letters * WIDTH + WIDTH * WIDTH  # the look-up is free, the head and the middle are used once
    assert summary["final"]["macs_dense"] == uses
    model = load(tmp_path / "run")
    x = torch.randint(0, letters, (5, *read(tmp_path / "run").shape.input_shape))
    used = tensors[name]
    by_hand = torch.relu(functional.linear(used[x].mean(1), tensors["middle.weight"], tensors["middle.bias"])) @ used.T
    assert torch.allclose(model(x), by_hand, atol=1e-6)


def test_a_dense_model_is_sent_once(tmp_path):
    study = text_study(tmp_path, "fedavg")
    with prepare.federation(study) as folder:
        play(study, tmp_path / "run", folder)
    row, tensors = rows_of(tmp_path / "run")[0], model_of(tmp_path / "run")
    entries = sum(t.numel() for t in tensors.values())
    assert row["down"]["values"] <= 3 * (4 * entries + 64)


@pytest.mark.parametrize("to", ["safetensors", "onnx", "torch"])
def test_exports_hold_it_once_and_predict_alike(to, tmp_path):
    if to == "onnx":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(module, reason="pip install '.[export]' in a clone of secateur")
    study = text_study(tmp_path, "fedsparsify", "schedule.sparsity=0.5")
    with prepare.federation(study) as folder:
        play(study, tmp_path / "run", folder)
    card = export(tmp_path / "run", to)
    assert card.checked["deviation"] < 1e-6
    assert card.checked["differ"] == 0
    letters = model_of(tmp_path / "run")["embedding.weight"].shape[0]
    once = 4 * (letters * WIDTH + WIDTH * WIDTH + WIDTH)
    assert (tmp_path / "run" / "export" / card.file).stat().st_size < once + (4000 if to == "safetensors" else 40000)


def test_training_keeps_the_mask_on_both_uses():
    torch.manual_seed(0)
    model = Everything((1, 4, 4), 3)
    mask = {"mix.weight": torch.rand(8, 8) < 0.5}
    data = Data(torch.rand(24, 1, 4, 4), torch.arange(24) % 3, "tabular")
    fit(model, data, Training(2, 8, lr=0.1, momentum=0.9), Turn(0, 1, 0), mask=mask)
    assert model.again.weight is model.mix.weight
    assert (model.again.weight[~mask["mix.weight"]] == 0).all()
    assert (model.again.weight[mask["mix.weight"]] != 0).all()


class Twin(nn.Module):
    """Two residual blocks that share a convolution, and one of its own."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.own = (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False)) for _ in range(3))
        self.two[0].weight = self.one[0].weight
        self.blocks = nn.ModuleList(Residual(layer) for layer in (self.one, self.two, self.own))
        self.stem, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.more = layer, nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x):
        return torch.relu(x + self.more(torch.relu(self.layer(x))))


def test_a_block_that_shares_a_weight_stays_whole():
    found = layout(Twin(), example=torch.zeros(1, 1, 6, 6))
    names = {g.name for g in found.groups if g.kind == "block"}
    assert not names & {"blocks.0", "blocks.1"}
    assert "is shared with another layer" in found.whole["blocks.0"]


def test_a_shared_layer_counts_its_uses_and_is_one_weight():
    model = Everything((1, 4, 4), 3)
    uses = cost.uses(model, torch.zeros(1, 1, 4, 4))
    assert uses["mix.weight"] == 2
    assert uses["query.weight"] == 4  # rows
    assert "again.weight" not in uses
    tensors = tensors_of(model)
    assert cost.macs({"mix.weight": 2}, tensors, {"mix.weight": torch.eye(8).bool()}) == 2 * 8


def test_the_layer_that_runs_last_is_found_whatever_its_place(tmp_path):
    state, view = lab(tiny_shards(tmp_path), small("fedavg", model={"name": "everything:Everything"}))
    assert last_layer_width(state.setting) == 8  # the one that is named last, spare, is never run
    frozen = Language(None, 20)
    frozen.head.requires_grad_(False)  # and with it the embedding: no weight that is trained says the width
    assert layout(frozen).features == WIDTH
    assert layout(nn.Conv1d(1, 1, 1)).features == 0
    client = view(0)
    load_tensors(client.model, state.weights)
    assert last_layer_inputs(state.weights, client, torch.rand(5, 1, 4, 4)).shape == (5, 8)


def test_the_specs_of_a_federation_have_each_tensor_once(tmp_path):
    state, _ = lab(tiny_shards(tmp_path), small("fedavg", model={"name": "everything:Everything"}))
    assert specs_of(state.weights) == dict(state.setting.specs)
    assert "again.weight" not in state.setting.specs


# ---- running statistics without momentum


class Normed(nn.Module):
    """A norm of the inputs, whose statistics do not depend on any weight, with momentum None: a plain mean."""

    def __init__(self, shape, outputs):
        super().__init__()
        del shape
        self.norm, self.head = nn.BatchNorm1d(16, momentum=None), nn.Linear(16, outputs)

    def forward(self, x):
        return self.head(self.norm(x.flatten(1)))


def test_statistics_without_momentum_are_the_mean_over_a_rounds_own_batches(tmp_path):
    study = small("fedavg", "training.batch_size=8", rounds=3, participation=1.0, model={"name": "test_ties:Normed"})
    shards = tiny_shards(tmp_path / "shards", rows=128)
    summary = play(study, tmp_path / "run", shards)
    _, view = lab(shards, study)
    means, rows = [], []
    for k in range(4):
        x, _ = view(k).data.batch(slice(None))
        assert len(x) % 8 == 0  # batches of one size
        means.append(x.flatten(1).double().mean(0))
        rows.append(len(x))
    expected = sum(n * m for n, m in zip(rows, means, strict=True)) / sum(rows)
    assert torch.allclose(model_of(tmp_path / "run")["norm.running_mean"].double(), expected, atol=1e-6)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["final"] == summary["final"]
