"""Bristle: scores and merges of classes by hand, one round against numpy, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import lab, play, small, tiny_shards
from secateur.contract.ask import SERVER
from secateur.contract.reducer import reduce
from secateur.contract.spool import Spool
from secateur.contract.state import Setting, State
from secateur.errors import ModelError
from secateur.learning.task import find
from secateur.methods.bristle import Bristle
from secateur.methods.kit.classwise import f1, gains, head_of, merge
from secateur.pruning.structure import OUTPUT, Layout
from secateur.wire.message import Spec


def test_f1_by_hand():
    """Targets 0 0 1 1, said 0 1 1 1: class 0 has 2 * 1 / (1 + 2) = 2/3, class 1 has 2 * 2 / (3 + 2) = .8; 2 no rows."""
    said = torch.tensor([0, 1, 1, 1])
    found = f1(torch.nn.functional.one_hot(said, 3).float(), torch.tensor([0, 0, 1, 1]))
    assert found[:2].tolist() == pytest.approx([2 / 3, 0.8])
    assert found[2].isnan()
    always = f1(torch.tensor([[1.0, 0.0]] * 4), torch.tensor([0, 1, 1, 1]))
    assert always.tolist() == pytest.approx([2 / 5, 0.0])  # who always says 0 has it all right, and a low score


def three_classes():
    layout = Layout({"out.weight": "weight", "out.bias": "bias", "n": "buffer"}, whole={"out": OUTPUT})
    specs = {"out.weight": Spec((3, 2)), "out.bias": Spec((3,)), "n": Spec((1,))}
    weights = {"out.weight": torch.zeros(3, 2), "out.bias": torch.zeros(3), "n": torch.zeros(1)}
    return State(Setting(0, 2, 3, 1.0, layout, specs), 1, weights)


def test_classes_are_merged_by_who_is_better_at_them():
    """Class 0: clients 0 and 1 gain .1 and .3, so the row is (1 + 3 * 2) / 4 = 1.75. Class 1: nobody, it stays at 0.
    Class 2 has no public rows: the median of 1, 2 and 9, which is that of the running statistic too."""
    rows = [
        {"out.weight": torch.full((3, 2), value), "out.bias": torch.full((3,), value), "n": torch.tensor([value])}
        for value in (1.0, 2.0, 9.0)
    ]
    before = torch.tensor([0.5, 0.5, torch.nan]).double()
    scores = torch.tensor([[0.6, 0.4, torch.nan], [0.8, 0.5, torch.nan], [0.2, 0.1, torch.nan]]).double()
    found = merge(three_classes(), rows, gains(scores, before))
    assert found["out.bias"].tolist() == pytest.approx([1.75, 0.0, 2.0])
    assert found["out.weight"].tolist() == [pytest.approx([v, v]) for v in (1.75, 0.0, 2.0)]
    assert found["n"].tolist() == [2.0]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def test_only_the_last_layer_moves_and_travels(shards):
    study = small("bristle", participation=1.0)
    (state, view), method = lab(shards, study), study.build_method()
    ask = method.plan(state)
    head = head_of(state.setting)
    assert list(ask.message.tensors) == head
    assert sorted(head) == sorted(list(state.weights)[-2:])  # the MLP's last weight and bias
    replies = [(k, method.respond(ask, view(k))) for k in range(4)]
    assert all(list(message.tensors) == head for _, message in replies)
    with Spool() as spool:
        state = method.absorb(state, reduce(ask, state, replies, spool))
    after, seen = method.refine(state, replace(view(0), id=SERVER))
    assert seen == len(view(0).data) * 5 // 3
    assert not [key for key in after.archive if key.startswith("head/")]
    assert after.round == 1
    for name, tensor in after.weights.items():
        assert torch.equal(tensor, state.weights[name]) is (name not in head)


def test_a_liar_gains_no_class(shards):
    """One of four sends its last layer negated and a hundred times as large: nothing of it is merged."""
    study = small("bristle", participation=1.0, training={"epochs": 8, "batch_size": 8, "lr": 0.3})
    (state, view), method = lab(shards, study), study.build_method()
    ask = method.plan(state)
    replies = [(k, method.respond(ask, view(k))) for k in range(4)]
    liar = replace(replies[3][1], tensors={n: -100 * t for n, t in replies[3][1].tensors.items()})
    found = []
    for last in ([], [(3, liar)]):
        state.archive.clear()
        asked = method.absorb(state, reduce(ask, state, [*replies[:3], *last]))
        found.append(method.refine(asked, replace(view(0), id=SERVER))[0].weights)
    largest = max(float(t.abs().max()) for _, message in replies for t in message.tensors.values())
    assert max(float(t.abs().max()) for t in found[1].values()) <= largest * 1.001
    away = np.concatenate([(found[0][n] - found[1][n]).numpy().ravel() for n in ask.message.tensors])
    assert np.abs(away).max() < 0.5 * largest


def test_what_it_cannot_serve(tmp_path, shards):
    with pytest.raises(ModelError, match="bristle merges the last layer class by class"):
        play(small("bristle", "model.structure=none"), tmp_path / "none", shards)
    (state, view), method = lab(shards, small("bristle")), Bristle()
    numbers = replace(view(0).data, task=find("regression"))
    with pytest.raises(ModelError, match="bristle merges classes, and the targets of these rows are numbers"):
        method.refine(state, replace(view(0), data=numbers))
