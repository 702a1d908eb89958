"""Clients trained together: the algorithm of the local loop, the place of each client, and what is refused."""

import copy
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import INLINE, model_of, play, same, small, tiny_shards
from secateur import models
from secateur.data.shards import open_shards
from secateur.errors import ConfigError
from secateur.federation import server
from secateur.federation.client import wrap
from secateur.learning import batched, stacked
from secateur.learning.batched import answers
from secateur.learning.compute import Compute
from secateur.learning.loop import Effort
from secateur.learning.optimiser import Training
from secateur.learning.resident import tensors_of
from secateur.learning.stack import Rows
from secateur.learning.supermask import straight_through
from secateur.learning.task import Data
from secateur.learning.work import Evaluate, Learn, Measure, Train
from secateur.methods.kit.hooks import Fading, Feedback, Narrow, PrunedActivations
from secateur.pruning.discovery import layout
from secateur.pruning.structure import expand, plan, slim_mask
from secateur.streams import Turn, stream
from secateur.study.runtime import Runtime

MOST = Compute(together=99)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("stacked") / "shards")


@pytest.fixture(autouse=True)
def told(monkeypatch):
    """What was said of clients that went one by one: nothing, unless a test takes it out of this list."""
    said = []
    monkeypatch.setattr(batched, "warn_once", said.append)
    yield said
    assert said == []


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


def training(model, client, data, how, own):
    """Return a client's training, from the weights of ``model``."""
    return Train(model, tensors_of(model), data, how, Turn(5, 2, client), **own)


def alone(model, jobs, how):
    """Each client by itself, with the local loop."""
    return [training(copy.deepcopy(model), k, data, how, own).alone(Compute()) for k, (data, own) in enumerate(jobs)]


def together(model, jobs, how, compute=MOST):
    """All clients, from one resident model as in a worker."""
    resident, found = copy.deepcopy(model), {}
    wanted = [training(model, client, data, how, own) for client, (data, own) in enumerate(jobs)]

    def task(client, work, clock):
        found[client] = work(replace(wanted[client], model=resident))
        for name, tensor in found[client][0].items():
            assert torch.equal(resident.state_dict()[name], tensor), "the resident model holds what was trained"
        return b"", str(clock()).encode()

    said = answers([partial(task, client) for client in range(len(jobs))], compute)
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


@pytest.mark.parametrize("how", [Training(epochs=2, batch_size=4), Training(2, batch_size=4, clip=0.1, prox=0.1)])
@pytest.mark.parametrize("kind", ["feedback", "narrow", "fading"])
def test_hooks_act_on_each_client_of_a_stack(kind, how):
    model = make("mlp", hidden=(12,))

    def own(k):
        mask = mask_of(model, k)
        hook = {
            "feedback": Feedback(), "narrow": Narrow((mask, mask_of(model, k + 9))), "fading": Fading(mask, 0.1)
        }[kind]  # fmt: skip
        return {"mask": None if kind == "narrow" else mask, "hooks": (hook,)}

    jobs = [(rows(n, n), own(n)) for n in (9, 5, 14)]
    agree(together(model, jobs, how), alone(model, jobs, how))


def test_what_cannot_be_stacked_is_trained_alone_with_the_same_bits(told):
    model = make("mlp", hidden=(12,))
    jobs = [(rows(9, k), {"hooks": (PrunedActivations(0.5),)}) for k in range(3)]
    how = Training(epochs=2, batch_size=4)
    for (found, _), (expected, _) in zip(together(model, jobs, how), alone(model, jobs, how), strict=True):
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    assert told.pop() == "PrunedActivations acts on single clients' forward passes: such clients go one by one on cpu"


@pytest.mark.parametrize("dropout", [nn.Dropout(0.3), nn.Dropout2d(0.5), nn.Dropout(1.0)])
def test_dropout_draws_for_each_client_what_it_draws_alone(dropout):
    conv = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), dropout, nn.Flatten(), nn.Linear(256, 10))
    model = conv.append(nn.Dropout(0.2)).double()
    jobs = [(rows(n, n), {}) for n in (9, 5, 14)]
    how = Training(epochs=2, batch_size=4)
    agree(together(model, jobs, how), alone(model, jobs, how))


def test_batch_norm_sees_the_rows_of_each_client_alone():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10)).double()
    jobs = [(rows(n, n), {"mask": mask_of(model, n)}) for n in (9, 6, 14)]
    how = Training(epochs=3, batch_size=3)
    found, wanted = together(model, jobs, how), alone(model, jobs, how)
    agree(found, wanted)
    means = [tensors["1.running_mean"] for tensors, _ in found]
    assert not torch.allclose(means[0], means[1])


def test_a_client_whose_only_row_batch_norm_refuses_fails_alone():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10)).double()

    def task(client, count, work, _clock):
        work(training(model, client, rows(count, client), Training(epochs=1, batch_size=4), {}))
        return b"", None

    said = answers([partial(task, k, count) for k, count in enumerate((8, 1, 6))], MOST)
    assert [type(answer) for answer in said] == [tuple, ValueError, tuple]


def test_clients_with_and_without_cut_units_train_together():
    model = models.build("resnet20", input_shape=(3, 16, 16), outputs=10, init="torch", seed=1, options={"width": 8})
    groups = layout(model, example=torch.zeros(1, 3, 16, 16)).groups
    model.double()
    how, wanted, jobs = Training(epochs=1, batch_size=4, lr=0.01), [], []
    for k in range(5):
        mask = None
        if k % 2:  # clients 1 and 3 lose channels, not the same ones
            mask = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}
            for group in groups[:4]:
                keep = torch.rand(group.units, generator=stream(k, group.name)) > 0.4
                for slot in group.incoming:
                    mask[slot.tensor] = mask[slot.tensor] & expand(keep, slot, mask[slot.tensor].shape)
        removal = plan(mask or {}, groups if k % 2 else [])
        held = slim_mask(mask, removal) if removal else mask
        data = rows(6 + k, k, (3, 16, 16))
        jobs.append(Train(model, tensors_of(model), data, how, Turn(5, 2, k), held, removal=removal))
        wanted.append(replace(jobs[-1], model=copy.deepcopy(model)).alone(Compute()))
    assert bool(jobs[1].removal)
    found = {}

    def task(client, work, _clock):
        found[client] = work(jobs[client])
        return b"", None

    said = answers([partial(task, client) for client in range(5)], MOST)
    assert said == [(b"", None)] * 5
    agree([found[k] for k in range(5)], wanted)


def test_models_of_different_shapes_go_in_groups():
    slim, wide, how, found = make("mlp", hidden=(5,)), make("mlp", hidden=(9,)), Training(epochs=1, batch_size=4), {}

    def task(client, model, work, _clock):
        found[client] = work(training(copy.deepcopy(model), client, rows(9, client), how, {}))
        return b"", None

    nets = [slim, wide, slim]
    answers([partial(task, k, net) for k, net in enumerate(nets)], MOST)
    agree([found[k] for k in range(3)], [alone(net, [(rows(9, k), {})] * 3, how)[k] for k, net in enumerate(nets)])


def test_a_task_that_raises_costs_itself_alone_and_clocks_share_the_time():
    model, how, told = make("mlp", hidden=(12,)), Training(epochs=3, batch_size=2), {}

    def task(client, work, clock):
        if client == 1:
            raise ValueError("mine alone")
        work(training(model, client, rows(10 * client + 10, client), how, {}))
        if client == 2:
            work(training(model, client, rows(5), how, {}))
            raise RuntimeError("later")
        told[client] = clock()
        return b"%d" % client, None

    said = answers([partial(task, k) for k in range(4)], MOST)
    assert said[0] == (b"0", None)
    assert said[3] == (b"3", None)
    assert [type(said[k]) for k in (1, 2)] == [ValueError, RuntimeError]
    assert 0 < told[0] < told[3]


def test_a_training_that_fails_costs_its_client_alone():
    model, how = make("mlp", hidden=(12,)), Training(epochs=1, batch_size=4)
    wrong = Data(rows(4).x, torch.full((4,), 99), kind="tabular")  # no such class
    jobs = [(rows(9), {}), (wrong, {}), (wrong, {"hooks": (Feedback(),)}), (rows(5), {})]

    def task(client, data, own, work, _clock):
        work(training(model, client, data, how, own))
        return b"", None

    said = answers([partial(task, k, *job) for k, job in enumerate(jobs)], MOST)
    assert [isinstance(answer, Exception) for answer in said] == [False, True, True, False]


def test_a_frozen_layer_stays_for_all_clients():
    model = make("mlp", hidden=(12,))
    model.fc1.weight.requires_grad_(False)
    jobs = [(rows(7, k), {}) for k in range(3)]
    how = Training(epochs=2, batch_size=4)
    found = together(model, jobs, how)
    agree(found, alone(model, jobs, how))
    assert "fc1.weight" not in found[0][0]


def test_a_layer_that_cannot_be_batched_is_named_and_its_clients_go_one_by_one(told):

    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.fc = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 10)

        def forward(self, x):
            return self.fc(self.lstm(x[:, 0])[0][:, -1])

    model, how = Reading().double(), Training(epochs=1, batch_size=4)
    jobs = [(rows(7, k), {}) for k in range(3)]
    agree(together(model, jobs, how), alone(model, jobs, how))
    assert told[0].startswith("LSTM 'lstm' cannot be computed for several clients at once (")
    assert told.pop().endswith("such clients go one by one on cpu")


def test_measures_scores_and_evaluations_are_those_of_each_client_alone():
    model, how = make("mlp", hidden=(12,)), Training(epochs=2, batch_size=4)
    start, draw = tensors_of(model), torch.Generator().manual_seed(0)
    other = {n: t + torch.randn(t.shape, generator=draw, dtype=t.dtype) for n, t in start.items()}

    def jobs(kind, k):
        data, turn = rows(5 + 4 * k, k), Turn(5, 2, k)
        if kind == "learn":
            scores = {n: t * 2 for n, t in start.items() if n.endswith("weight")}
            return Learn(model, start, data, how, scores, partial(halved, k + 1.0), turn, penalty_of if k else None)
        if kind in {"one", "own"}:
            return Evaluate(model, other if kind == "own" and k else start, data)
        return Measure(model, other if k else start, data, how, kind, turn, 2)

    for kind in ("gradient", "square", "saliency", "curvature", "flow", "learn", "one", "own"):
        wanted = [jobs(kind, k).alone(Compute()) for k in range(3)]
        found = {}

        def task(client, kind, found, work, _clock):
            found[client] = work(jobs(kind, client))
            return b"", None

        said = answers([partial(task, client, kind, found) for client in range(3)], MOST)
        assert said == [(b"", None)] * 3, kind
        if kind not in {"one", "own"}:
            agree([found[k] for k in range(3)], wanted)
            continue
        for k, score in enumerate(wanted):
            assert found[k].samples == score.samples
            assert found[k].metric == score.metric
            assert found[k].loss == pytest.approx(score.loss, abs=1e-12)
            assert found[k].further == pytest.approx(score.further, abs=1e-12)


def halved(factor, scores):
    return {name: straight_through((t / 2).sign() * factor, torch.tanh(t)) for name, t in scores.items()}


def penalty_of(scores):
    return torch.stack([t.square().sum() for t in scores.values()]).sum() * 0.01


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
def test_a_model_that_draws_or_changes_what_is_its_own_goes_one_by_one(does, told):
    model, how = Own(DOES[does]).double(), Training(epochs=1, batch_size=4)
    jobs = [(rows(7, k, (3,)), {}) for k in range(3)]
    jobs = [(replace(data, y=data.y % 2), own) for data, own in jobs]
    together(model, jobs, how)
    assert told.pop().startswith(("this Own draws at random", "this Own changes"))
    steady = Own(lambda m: m.steps).double()
    agree(together(steady, jobs, how), alone(steady, jobs, how))


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


@pytest.mark.parametrize(
    ("setting", "value"), [("together", 0), ("device", "gpu"), ("device", "cpu:1"), ("device", "cuda:x")]
)
def test_a_wrong_setting_is_refused(setting, value):
    with pytest.raises(ConfigError, match=f"compute.{setting}"):
        Compute(**{setting: value})


def test_a_stack_that_does_not_fit_says_which_one_does(monkeypatch):
    model, whole = make("mlp", hidden=(12,)), stacked.together

    def full(jobs, *rest):
        if len(jobs) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(jobs, *rest)

    monkeypatch.setattr(stacked, "together", full)
    with pytest.raises(ConfigError, match="a stack of 9 clients does not fit in the memory of cpu, one of 2 does: set"):
        together(model, [(rows(9, k), {}) for k in range(9)], Training(epochs=1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused_before_training():
    with pytest.raises(ConfigError, match="no such device"):
        Compute(device="cuda").check()


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


def test_a_stopped_run_of_stacks_goes_on_with_the_same_bits(tmp_path, shards):
    study = small("autoflip", compute=Compute(together=3))
    play(study, tmp_path / "whole", shards)

    def stop(event):
        if event["event"] == "reply" and event["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(study, tmp_path / "cut", shards, watch=stop)
    server.resume(tmp_path / "cut", INLINE, shards=shards)
    assert same(model_of(tmp_path / "cut"), model_of(tmp_path / "whole"))


def test_rows_are_not_copied_for_a_stack_on_a_cpu_and_stay_for_the_next(shards):
    held, kept = open_shards(shards), Rows(MOST)
    parts = [wrap(held, *held.train(k)) for k in (2, 0)]
    whole, first = kept.of(parts)
    again, _ = kept.of(parts[:1])
    assert whole.x.data_ptr() == again.x.data_ptr() == held.train(0)[0].data_ptr()
    for part, number in zip(parts, first.tolist(), strict=True):
        assert torch.equal(whole.x[number : number + len(part)], part.x)
        assert torch.equal(whole.y[number : number + len(part)], part.y)
    apart, first = kept.of([rows(3, 1), rows(2, 2)])
    assert (len(apart), first.tolist()) == (5, [0, 3])


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
