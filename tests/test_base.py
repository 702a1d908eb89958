"""Tensors that training leaves alone: frozen layers and constant buffers never travel, and are shipped."""

import json
import math

import pytest
import torch
from torch import nn

from helpers import Wrapped, model_of, play, rows_of, same, small, tiny_shards
from secateur import models
from secateur.data.shards import open_shards
from secateur.engines import Failure
from secateur.errors import ModelError, NobodyTrainedError
from secateur.export.export import load
from secateur.federation import client
from secateur.federation.checkpoint import shipped
from secateur.learning.gradients import gradient_statistic
from secateur.learning.optimiser import Training
from secateur.learning.resident import base_of, tensors_of
from secateur.learning.task import Data
from secateur.pruning.discovery import layout
from secateur.pruning.roles import roles
from secateur.report.outcomes import outcome
from secateur.streams import Turn
from secateur.study.runtime import Runtime
from secateur.wire.known import digest


class Frozen(nn.Module):
    """A frozen first layer, as a pretrained one would be."""

    def __init__(self, inputs, outputs, scale=1.0):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(inputs), 12), nn.ReLU())
        self.middle, self.head = nn.Linear(12, 10), nn.Linear(10, outputs)
        draw = torch.Generator().manual_seed(11)
        with torch.no_grad():
            self.body[1].weight.copy_(scale * torch.randn(self.body[1].weight.shape, generator=draw))
        self.body.requires_grad_(False)

    def forward(self, x):
        return self.head(torch.relu(self.middle(self.body(x))))


class Causal(nn.Module):
    """Rows of an image in turn, each looking back only: a mask of minus infinity in a buffer."""

    def __init__(self, inputs, outputs):
        super().__init__()
        rows, width = inputs[-2], inputs[-1]
        self.query, self.key, self.value = (nn.Linear(width, 8) for _ in range(3))
        self.head = nn.Linear(8, outputs)
        self.register_buffer("past", torch.full((rows, rows), -math.inf).triu(1))

    def forward(self, x):
        x = x.flatten(1, 2)
        scores = self.query(x) @ self.key(x).transpose(1, 2) + self.past
        return self.head((scores.softmax(-1) @ self.value(x)).mean(1))


class Counting(nn.Module):
    """A layer of one's own that keeps a running mean, beside a table that it does not touch."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.fc = nn.Linear(math.prod(inputs), outputs)
        self.norm = nn.BatchNorm1d(outputs)
        self.register_buffer("mean", torch.zeros(outputs))
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x):
        out = self.norm(self.fc(x.flatten(1)))
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * out.detach().mean(0) + 0.01)
        return out - self.mean


def frozen(inputs, outputs):
    return Frozen(inputs, outputs)


def other(inputs, outputs):
    return Frozen(inputs, outputs, scale=2.0)


def causal(inputs, outputs):
    return Causal(inputs, outputs)


def counting(inputs, outputs):
    return Counting(inputs, outputs)


def tied(inputs, outputs):
    made = Causal(inputs, outputs)
    made.constant_buffers = frozenset()  # the module says itself that training changes them all
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("base") / "shards")


def built(name):
    return models.build(f"test_base:{name}", input_shape=(1, 4, 4), outputs=3)


FIXED = {"frozen": {"body.1.weight", "body.1.bias"}, "causal": {"past"}}


def test_roles_tell_what_is_frozen_and_what_a_trial_leaves_alone():
    found = roles(built("frozen"))
    assert {name for name, role in found.items() if role == "frozen"} == FIXED["frozen"]
    assert roles(built("causal"))["past"] == "constant"
    assert roles(built("tied"))["past"] == "buffer"
    found = roles(built("counting"))
    running = {"mean", "norm.running_mean", "norm.running_var"}
    assert {name for name, role in found.items() if role == "buffer"} == running
    assert found["table"] == "constant"


def test_a_trial_draws_nothing_and_leaves_the_model_as_it_was():
    state = torch.random.get_rng_state()
    one, two = built("counting"), built("counting")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same(tensors_of(one), tensors_of(two))
    assert not one.mean.any()
    assert one.norm.running_mean.tolist() == [0.0] * 3
    assert all(p.grad is None for p in one.parameters())


def test_a_frozen_layer_keeps_what_its_model_gave_it():
    given = Frozen((1, 4, 4), 3)
    model = models.build("test_base:frozen", input_shape=(1, 4, 4), outputs=3, init="kaiming_normal")
    assert torch.equal(model.body[1].weight, given.body[1].weight)
    assert not torch.equal(model.middle.weight, given.middle.weight)


def test_units_that_a_frozen_layer_makes_or_reads_stay():
    found = layout(built("frozen"), example=torch.zeros(1, 1, 4, 4))
    assert [group.name for group in found.groups] == ["middle"]
    assert "body.1" in found.whole
    assert "never trained" in found.whole["body.1"]


@pytest.mark.parametrize("name", ["frozen", "causal"])
@pytest.mark.parametrize("method", ["fedavg", "fedsparsify", "prunefl"])
def test_neither_travels_nor_is_pruned_and_both_are_shipped(folder, tmp_path, method, name):
    settings = () if method == "fedavg" else ("sparsity=0.5",) if method == "prunefl" else ("schedule.sparsity=0.5",)
    made = small(method, *settings, rounds=6, model={"name": f"test_base:{name}"}, training={"epochs": 2, "lr": 0.2})
    summary = play(made, tmp_path / "run", folder)
    start, tensors = built(name), model_of(tmp_path / "run")
    base = base_of(start)
    assert set(base) == FIXED[name]
    for tensor, value in base.items():
        assert torch.equal(tensors[tensor], value)
        assert f"mask/{tensor}" not in tensors
    own = tensors_of(start)
    assert not set(own) & FIXED[name]
    assert any(not torch.equal(tensors[n], t) for n, t in own.items())
    assert summary["final"]["loss"] < 1.5
    first = rows_of(tmp_path / "run")[0]
    if method == "fedavg":  # four bytes a value that travels, and a header
        values = 4 * sum(t.numel() for t in own.values()) * len(first["clients"])
        assert values <= first["bytes_up"] < values + 400 * len(first["clients"])
    shown, _, about = shipped(tmp_path / "run")
    assert set(json.loads(about["base"])) == FIXED[name]
    assert set(shown) == {*own, *base}
    assert outcome(tmp_path / "run").size > sum(t.nbytes for t in base.values())
    x = torch.rand(5, 1, 4, 4)
    whole = built(name)
    whole.load_state_dict({n: t for n, t in tensors.items() if not n.startswith("mask/")})
    torch.testing.assert_close(load(tmp_path / "run")(x), whole.eval()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["frozen", "causal"])
def test_workers_and_stacks_train_them_as_one_process_does(folder, tmp_path, name):
    made = small("fedsparsify", "schedule.sparsity=0.5", model={"name": f"test_base:{name}"})
    play(made, tmp_path / "one", folder)
    play(made, tmp_path / "two", folder, runtime=Runtime(workers=2))
    assert same(model_of(tmp_path / "one"), model_of(tmp_path / "two"))
    stacked = small("fedsparsify", "schedule.sparsity=0.5", "compute.together=4", model={"name": f"test_base:{name}"})
    play(stacked, tmp_path / "stack", folder)
    one, other_ = model_of(tmp_path / "one"), model_of(tmp_path / "stack")
    for tensor in FIXED[name]:
        assert torch.equal(one[tensor], other_[tensor])
    assert all(torch.allclose(one[n], other_[n], atol=1e-4) for n in one if n not in FIXED[name])


def test_channels_are_cut_beside_a_frozen_layer(folder, tmp_path):
    made = small(
        "fedsparsify", "granularity=channel", "schedule.sparsity=0.5", "schedule.start=0",
        model={"name": "test_base:frozen"},
    )  # fmt: skip
    final = play(made, tmp_path / "run", folder)["final"]
    assert final["parameters_physical"] < final["parameters_dense"]
    assert final["macs_physical"] < final["macs_dense"]
    assert load(tmp_path / "run").get_submodule("body.1").weight.shape == (12, 16)


def test_a_client_with_another_base_refuses_in_one_line(folder, tmp_path):
    """The server's study names one model, the clients have another whose tensors look alike."""

    class Elsewhere(Wrapped):
        def exchange(self, requests, deadline=None):
            strange = client.Participant(small(model={"name": "test_base:other"}), open_shards(folder))
            for who, request in requests:
                try:
                    strange(who, request, None)
                except ModelError as refused:
                    yield who, Failure(who, str(refused))

    with pytest.raises(NobodyTrainedError, match=r"frozen tensors \w{32}, the model here has \w{32}"):
        play(small(model={"name": "test_base:frozen"}), tmp_path / "run", folder, open_engine=Elsewhere.open)


def test_the_flow_through_a_causal_mask_is_finite():
    """Weights are taken absolute for it; a mask's minus infinity must not be."""
    rows = Data(torch.rand(3, 1, 4, 4), torch.zeros(3, dtype=torch.int64), "tabular")
    found, _ = gradient_statistic(built("causal"), rows, Training(), "flow", Turn(0, 0, 0))
    assert "past" not in found
    assert all(flow.isfinite().all() for flow in found.values())
    assert found["head.weight"].any()


def test_a_digest_names_names_shapes_and_bits():
    one = {"a": torch.tensor([1.0, -math.inf])}
    assert len(digest(one)) == 32
    assert digest({}) == ""
    changed = [{"b": one["a"]}, {"a": one["a"][None]}, {"a": one["a"].double()}, {"a": torch.tensor([1.0, math.inf])}]
    assert len({digest(d) for d in [one, *changed]}) == 5
    assert digest({"a": torch.tensor([0.0])}) != digest({"a": torch.tensor([-0.0])})
