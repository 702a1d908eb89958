"""Clients trained together: the algorithm of the local loop, the place of each client, and what is refused."""

import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import INLINE, play, small, tiny_shards
from secateur import models
from secateur.errors import ConfigError, ModelError
from secateur.learning import batched
from secateur.learning.batched import Compute, answers
from secateur.learning.loop import Effort, fit
from secateur.learning.optimiser import Training
from secateur.learning.resident import enforce, load, tensors_of
from secateur.learning.task import Data
from secateur.methods.kit.hooks import Fading, Feedback, Narrow, PrunedActivations
from secateur.streams import Turn
from secateur.study.runtime import Runtime

MOST = Compute(together=99)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("stacked") / "shards")


def rows(count, seed=0, shape=(1, 8, 8)):
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand((count, *shape), generator=draw, dtype=torch.float64)
    return Data(x, torch.randint(0, 10, (count,), generator=draw), kind="tabular")


def make(name="smallcnn", shape=(1, 8, 8), **options):
    """Return a network in double precision, in which a difference is a fault and no rounding."""
    return models.build(name, input_shape=shape, outputs=10, init="torch", seed=1, options=options).double()


def mask_of(model, seed):
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=draw) < 0.5 for n, p in model.named_parameters() if p.dim() > 1}


def alone(model, jobs, how):
    """Each client by itself, with the local loop."""
    found = []
    for client, (data, own) in enumerate(jobs):
        net = copy.deepcopy(model)
        enforce(net, own.get("mask"))
        done = fit(net, data, how, Turn(5, 2, client), **own)
        found.append((tensors_of(net), done))
    return found


def together(model, jobs, how, compute=MOST):
    """All clients, from one resident model as in a worker."""
    resident, start, found = copy.deepcopy(model), tensors_of(model), {}

    def task(client, data, own, fit, clock):
        load(resident, start)
        enforce(resident, own.get("mask"))
        done = fit(resident, data, how, Turn(5, 2, client), **own)
        found[client] = tensors_of(resident), done
        return b"", str(clock()).encode()

    said = answers([partial(task, client, *job) for client, job in enumerate(jobs)], compute)
    assert not [answer for answer in said if isinstance(answer, Exception)], said
    return [found[client] for client in range(len(jobs))]


def agree(found, wanted):
    for (tensors, done), (expected, told) in zip(found, wanted, strict=True):
        for name, tensor in expected.items():
            torch.testing.assert_close(tensors[name], tensor, atol=1e-7, rtol=1e-7)
        assert (done.samples, done.processed, done.steps, done.epochs) == (
            told.samples, told.processed, told.steps, told.epochs,
        )  # fmt: skip
        assert done.loss == pytest.approx(told.loss, abs=1e-9)


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    how=st.builds(
        Training,
        epochs=st.integers(1, 3),
        batch_size=st.integers(1, 17),
        optimiser=st.sampled_from(["sgd", "adam", "adamw"]),
        lr=st.just(0.01),
        momentum=st.sampled_from([0.0, 0.9]),
        weight_decay=st.sampled_from([0.0, 0.01]),
        prox=st.sampled_from([0.0, 0.5]),
        clip=st.sampled_from([0.0, 0.1]),
    ),
    masked=st.booleans(),
)
def test_trained_together_is_trained_alone_but_for_rounding(sizes, how, masked):
    model = make("mlp", hidden=(12,))
    jobs = [(rows(n, n), {"mask": mask_of(model, n)} if masked and n % 3 else {}) for n in sizes]
    agree(together(model, jobs, how), alone(model, jobs, how))


@pytest.mark.parametrize("name", ["smallcnn", "twocnn", "resnet20", "mlp"])
def test_networks_of_images_train_together(name):
    shape = (3, 32, 32) if name == "resnet20" else (1, 8, 8)
    model = make(name, shape)
    jobs = [(rows(n, n, shape), {"mask": mask_of(model, n)}) for n in (5, 9, 7)]
    how = Training(epochs=2, batch_size=4, lr=0.01)
    agree(together(model, jobs, how), alone(model, jobs, how))


def test_pruned_weights_are_plus_zero():
    model = make("mlp", hidden=(12,))
    mask = mask_of(model, 0)
    (found, _), _ = together(model, [(rows(9), {"mask": mask})] * 2, Training(epochs=1, batch_size=4, momentum=0.9))
    for name, keep in mask.items():
        assert (found[name][~keep].view(torch.int64) == 0).all()
        assert (found[name][keep] != 0).any()


def test_patience_and_shares_stop_each_client_where_it_would_stop_alone():
    model = make("mlp", hidden=(12,))
    how = Training(batch_size=8, lr=0.3)
    jobs = [(rows(n, n), {"effort": Effort(12, patience=1, share=0.7)}) for n in (30, 6, 17, 23)]
    wanted = alone(model, jobs, how)
    assert len({done.epochs for _, done in wanted}) > 1, "the case must have clients that stop at different epochs"
    agree(together(model, jobs, how), wanted)


def test_what_cannot_be_stacked_is_trained_alone_with_the_same_bits():
    model = make("mlp", hidden=(12,))
    jobs = [
        (rows(9, 1), {"mask": mask_of(model, 1), "hooks": [Feedback()]}),
        (rows(8, 2), {"hooks": [Narrow((mask_of(model, 2), mask_of(model, 3)))]}),
        (rows(7, 3), {"hooks": [Fading(mask_of(model, 4), 0.1)]}),
        (rows(6, 4), {"hooks": [PrunedActivations(0.5)]}),
    ]
    how = Training(epochs=2, batch_size=4)
    for (found, _), (expected, _) in zip(together(model, jobs, how), alone(model, jobs, how), strict=True):
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


def test_what_cannot_be_stacked_is_said_once(caplog):
    batched._warn_once.cache_clear()
    model = make("mlp", hidden=(12,))
    together(model, [(rows(9, k), {"hooks": [Feedback()]}) for k in range(3)], Training(epochs=1, batch_size=4))
    told = [record.message for record in caplog.records if record.name == batched.__name__]
    assert told == ["Feedback acts on single clients' steps: clients that train with it go one by one"]


def test_a_model_whose_buffers_training_changes_is_refused():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 10)
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x):
            if self.training:
                self.seen += len(x)
            return self.fc(x)

    with pytest.raises(ModelError, match="Counting '' cannot be trained for several clients at once"):
        MOST.check(Counting(), torch.zeros(1, 4))


def test_models_of_different_shapes_go_in_groups():
    slim, wide, how, found = make("mlp", hidden=(5,)), make("mlp", hidden=(9,)), Training(epochs=1, batch_size=4), {}

    def task(client, model, fit, _clock):
        own = copy.deepcopy(model)
        found[client] = fit(own, rows(9, client), how, Turn(0, 1, client)), tensors_of(own)
        return b"", None

    nets = [slim, wide, slim]
    answers([partial(task, k, net) for k, net in enumerate(nets)], MOST)
    for k, net in enumerate(nets):
        own = copy.deepcopy(net)
        fit(own, rows(9, k), how, Turn(0, 1, k))
        for name, tensor in tensors_of(own).items():
            torch.testing.assert_close(found[k][1][name], tensor)


def test_a_task_that_raises_costs_itself_alone_and_clocks_share_the_time():
    model, how, told = make("mlp", hidden=(12,)), Training(epochs=3, batch_size=2), {}

    def task(client, fit, clock):
        if client == 1:
            raise ValueError("mine alone")
        fit(copy.deepcopy(model), rows(10 * client + 10, client), how, Turn(0, 1, client))
        if client == 2:
            fit(copy.deepcopy(model), rows(5), how, Turn(0, 1, client))
            raise RuntimeError("later")
        told[client] = clock()
        return b"%d" % client, None

    said = answers([partial(task, k) for k in range(4)], MOST)
    assert said[0] == (b"0", None)
    assert said[3] == (b"3", None)
    assert [type(said[k]) for k in (1, 2)] == [ValueError, RuntimeError]
    assert 0 < told[0] < told[3]


def test_a_training_that_fails_costs_those_alone_who_are_in_it():
    model, how, slim = make("mlp", hidden=(12,)), Training(epochs=1, batch_size=4), make("mlp", hidden=(5,))
    wrong = Data(rows(4).x, torch.full((4,), 99), kind="tabular")  # no such class
    jobs = [(model, rows(9), {}), (slim, wrong, {}), (model, wrong, {"hooks": [Feedback()]}), (model, rows(5), {})]

    def task(client, net, data, own, fit, _clock):
        fit(copy.deepcopy(net), data, how, Turn(0, 1, client), **own)
        return b"", None

    said = answers([partial(task, k, *job) for k, job in enumerate(jobs)], MOST)
    assert [isinstance(answer, Exception) for answer in said] == [False, True, True, False]


def test_a_frozen_layer_stays_for_all_clients():
    model = make("mlp", hidden=(12,))
    model.fc1.weight.requires_grad_(False)
    resident, how, found = copy.deepcopy(model), Training(epochs=2, batch_size=4), {}

    def task(client, fit, _clock):
        load(resident, tensors_of(model))
        fit(resident, rows(7, client), how, Turn(0, 1, client))
        found[client] = tensors_of(resident)
        return b"", None

    answers([partial(task, k) for k in range(3)], MOST)
    for client, tensors in found.items():
        own = copy.deepcopy(model)
        fit(own, rows(7, client), how, Turn(0, 1, client))
        for name, tensor in tensors_of(own).items():
            torch.testing.assert_close(tensors[name], tensor)
    assert torch.equal(resident.fc1.weight, model.fc1.weight)


NORMED = """
from torch import nn

def net(shape, outputs):
    first, second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    return nn.Sequential(first, nn.GroupNorm(2, 8), nn.ReLU(), second, nn.GroupNorm(4, 8), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs))
"""


@pytest.mark.parametrize("method", ["federated_dropout", "heterofl", "oneshot"])
def test_slim_group_norms_train_together_whichever_channels_they_lack(method, tmp_path, monkeypatch, shards):
    """Federated Dropout's clients lack as many channels, and others each."""
    (tmp_path / "their_normed.py").write_text(NORMED)
    monkeypatch.syspath_prepend(tmp_path)
    settings = ("granularity=channel", "schedule.at=1", "schedule.sparsity=0.5") if method == "oneshot" else ()
    loss = {}
    for name, compute in (("plain", Compute()), ("stacked", MOST)):
        study = small(method, *settings, compute=compute, model={"name": "their_normed:net"}, rounds=2)
        summary = play(study, tmp_path / name, shards)
        assert summary["left_out"] == {}
        loss[name] = summary["final"]["loss"]
    assert loss["stacked"] == pytest.approx(loss["plain"], rel=1e-4)


@pytest.mark.parametrize("layer", [nn.Dropout(0.2), nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False)])
def test_layers_that_draw_or_keep_statistics_are_refused(layer):
    model = nn.Sequential(nn.Linear(3, 4), layer)
    Compute().check(model, torch.zeros(1, 3))
    with pytest.raises(ModelError, match=r"'1' cannot be trained .* set compute.together = 1"):
        MOST.check(model, torch.zeros(1, 3))


class Own(nn.Module):
    """A linear layer, and something that a training step does besides."""

    def __init__(self, also):
        super().__init__()
        self.layer, self.also, self.steps, self.seen = nn.Linear(3, 2), also, 0, []

    def forward(self, x):
        return self.layer(x) + self.also(self)


DOES = {
    "counts": lambda m: setattr(m, "steps", m.steps + 1) or 0,
    "remembers": lambda m: m.seen.append(1) or 0,
    "keeps": lambda m: setattr(m, "fresh", torch.ones(1)) or 0,
    "draws from Python": lambda m: random.random(),
    "draws from numpy": lambda m: np.random.rand(),  # noqa: NPY002 -- as people write it
    "draws from torch": lambda m: torch.rand(1),
}


@pytest.mark.parametrize("does", DOES)
def test_a_model_that_draws_or_changes_what_is_its_own_is_refused(does):
    with pytest.raises(ModelError, match=r"Own cannot be trained for several clients at once.* compute.together = 1"):
        MOST.check(Own(DOES[does]), torch.zeros(1, 3))
    MOST.check(Own(lambda m: m.steps), torch.zeros(1, 3))


def test_tied_weights_train_together_as_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.one, self.two, self.last = nn.Flatten(), nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 10)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.last(torch.tanh(self.two(torch.tanh(self.one(self.first(x))))))

    torch.manual_seed(0)
    model, how = Tied().double(), Training(epochs=2, batch_size=4, lr=0.2, momentum=0.5)
    jobs = [(rows(8 + k, k, (1, 3, 3)), {"mask": mask_of(model, k)}) for k in range(3)]
    assert "two.weight" not in mask_of(model, 0)
    found = together(model, jobs, how)
    agree(found, alone(model, jobs, how))
    assert all((tensors["one.weight"][~own["mask"]["one.weight"]] == 0).all()
               for (tensors, _), (_, own) in zip(found, jobs, strict=True))  # fmt: skip


def test_a_layer_that_cannot_be_batched_over_weights_is_refused():
    with pytest.raises(ModelError, match="compute.together = 1"):
        MOST.check(nn.LSTM(3, 4), torch.zeros(1, 5, 3))


@pytest.mark.parametrize(
    ("setting", "value"), [("together", 0), ("device", "gpu"), ("device", "cpu:1"), ("device", "cuda:x")]
)
def test_a_wrong_setting_is_refused(setting, value):
    with pytest.raises(ConfigError, match=f"compute.{setting}"):
        Compute(**{setting: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused_before_training():
    with pytest.raises(ConfigError, match="no such device"):
        Compute(device="cuda").check(make(), torch.zeros(1, 1, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("method", ["fedavg", "fedsparsify", "autoflip", "fedtiny", "heterofl", "fedpm"])
def test_a_run_of_stacked_clients_is_the_run_but_for_rounding(tmp_path, shards, method):
    plain = play(small(method), tmp_path / "plain", shards)
    stacked = play(small(method, compute=MOST), tmp_path / "stacked", shards)
    assert stacked["final"]["kept"] == plain["final"]["kept"]
    assert stacked["final"]["loss"] == pytest.approx(plain["final"]["loss"], rel=0.02)


def test_who_is_stacked_with_whom_does_not_depend_on_the_workers(tmp_path, shards):
    study = small("fedsparsify", compute=Compute(together=2))
    play(study, tmp_path / "inline", shards, runtime=INLINE)
    play(study, tmp_path / "three", shards, runtime=Runtime(workers=3))
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("inline", "three"))
    assert one == other


def test_bfloat16_is_close_and_not_equal():
    model, how = make("mlp", hidden=(12,)), Training(epochs=1, batch_size=4)
    jobs = [(rows(20, 1), {})] * 2
    exact = together(model, jobs, how)
    for compute in (Compute(together=9, autocast="bf16"), Compute(together=1, autocast="bf16")):
        rough = together(model, jobs, how, compute)
        for (found, _), (expected, _) in zip(rough, exact, strict=True):
            assert any(not torch.equal(found[n], t) for n, t in expected.items())
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name], tensor, atol=2e-2, rtol=0.1)
