"""Every method with a model that has all at once what is easily handled wrongly: right, or refused before training."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from everything import Everything
from helpers import Wrapped, model_of, play, resumed, rows_of, same, small, stop_after_each, tiny_shards
from secateur import methods
from secateur.export.export import read
from secateur.federation import client, server
from secateur.pruning.discovery import layout
from secateur.streams import drawn_so_far
from secateur.study.runtime import Runtime

METHODS = [*methods.names(), "toy_method"]
FROZEN = {"body.weight", "body.bias"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def study_of(name):
    return small(name, rounds=3, model={"name": "everything:Everything"})


class EachItsOwn:
    """Serves every client with a participant of its own, as if there were as many workers as clients."""

    def __init__(self, make):
        self._make, self._made = make, {}

    def __call__(self, who, request, state):
        if who not in self._made:
            self._made[who] = self._make()
        return self._made[who](who, request, state)


class Apart(Wrapped):
    """The local engine with a participant for each client; replies arrive backwards."""

    @classmethod
    def open(cls, make, *rest, **more):
        return cls(server.open_local(lambda: EachItsOwn(make), *rest, **more))

    def exchange(self, requests, deadline=None):
        yield from reversed(list(self.inner.exchange(requests, deadline)))


def stop_elsewhere(event):
    """End a process after every exchange; global generators of another process would begin elsewhere."""
    if event["event"] == "row":
        random.seed(None)
        np.random.seed(None)  # noqa: NPY002 -- the global one, which models draw from
        torch.seed()
    stop_after_each(event)


def bare(folder):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows_of(folder)]


@pytest.mark.parametrize("name", METHODS)
def test_ties_frozen_parts_counters_draws_and_a_causal_mask_are_right_for_every_method(name, tmp_path, shards):
    study = study_of(name)
    summary = play(study, tmp_path / "one", shards)
    assert not any(row["left_out"] for row in rows_of(tmp_path / "one"))
    resumed(study, tmp_path / "other", shards, watch=stop_elsewhere, open_engine=Apart.open)
    assert same(model_of(tmp_path / "one"), model_of(tmp_path / "other"))
    assert bare(tmp_path / "one") == bare(tmp_path / "other")
    check_shipped(tmp_path / "one", study, summary)


def check_shipped(folder, study, summary):
    tensors = load_file(folder / "model.safetensors")
    masks = {n.removeprefix("mask/"): t.bool() for n, t in tensors.items() if n.startswith("mask/")}
    held = {n: t for n, t in tensors.items() if not n.startswith("mask/")}
    fresh = client.make_model(study, client.Shape((1, 4, 4), 3, "images", 255, "classification"))
    expected = {n for n, t in fresh.state_dict().items() if t.is_floating_point()} - {"again.weight"}
    assert set(held) == expected
    for n in FROZEN | {"past"}:
        assert torch.equal(held[n], fresh.state_dict()[n])
    weights = set(layout(fresh).names("weight"))
    assert weights == {f"{n}.weight" for n in ("query", "key", "value", "mix", "hidden", "head", "spare")}
    assert not set(masks) & (FROZEN | {"again.weight", "past", "token", "norm.running_mean"})
    assert all((held[n][~mask] == 0).all() for n, mask in masks.items())
    whole = sum(p.numel() for p in fresh.parameters())
    assert summary["final"]["parameters_dense"] == whole
    if masks:
        used = read(folder).masked
        assert used.again.weight is used.mix.weight
        assert torch.equal(used.mix.weight, held["mix.weight"])


def test_a_run_leaves_the_generators_of_its_process_alone(tmp_path, shards):
    before = drawn_so_far()
    play(study_of("fedavg"), tmp_path, shards)
    assert drawn_so_far() == before


@pytest.mark.parametrize("name", ["fedsparsify", "feddst"])
def test_worker_processes_give_the_same_bits(name, tmp_path, shards):
    study = study_of(name)
    for workers in (0, 2):
        play(study, tmp_path / str(workers), shards, runtime=Runtime(workers=workers))
    assert same(model_of(tmp_path / "0"), model_of(tmp_path / "2"))
    assert bare(tmp_path / "0") == bare(tmp_path / "2")


def test_a_model_counts_and_draws_as_the_test_believes():
    """Were the counters and draws without effect, the tests above could not fail."""
    torch.manual_seed(0)
    model, x = Everything((1, 4, 4), 3).train(), torch.randn(4, 1, 4, 4)
    one, two = model(x), model(x)
    assert not torch.allclose(one, two)
    assert (model.steps, int(model.seen), len(model.history)) == (2, 2, 2)
    before = drawn_so_far()
    model.eval()(x)
    assert drawn_so_far() == before
    model.train()(x)
    assert drawn_so_far() != before
