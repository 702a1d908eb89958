"""FedSparsify, global and local, random and one-shot: exact counts, the vote, nested masks."""

import math

import pytest
import torch

from helpers import model_of, play, rows_of, same, small, tiny_shards
from secateur.contract.reducer import reduce
from secateur.contract.reduction import Sum, masks_of
from secateur.contract.state import Setting, State
from secateur.errors import ConfigError
from secateur.methods.fedsparsify import FedSparsify
from secateur.methods.fedsparsify_local import FedSparsifyLocal
from secateur.methods.kit.consensus import Consensus, Majority
from secateur.methods.kit.schedule import Cubic
from secateur.methods.oneshot import OneShotMagnitude
from secateur.methods.random import RandomPruning
from secateur.pruning.allocation import Global
from secateur.pruning.structure import Layout
from secateur.wire.message import Message, Spec


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("sparsity", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("every", [1, 3])
def test_sparsity_after_each_round_equals_the_formula_to_one_weight(tmp_path, shards, sparsity, every):
    rounds = 10
    study = small("fedsparsify", f"schedule.sparsity={sparsity}", f"schedule.every={every}", rounds=rounds)
    play(study, tmp_path / "run", shards)
    total = 16 * 12 + 12 * 8 + 8 * 3
    level = 0.0
    for row in rows_of(tmp_path / "run"):
        t = row["round"]
        if t > 1 and (t % every == 0 or t == rounds):
            level = sparsity - sparsity * (1 - (t - 1) / (rounds - 1)) ** 3
        assert round(row["sparsity"] * total) == math.floor(level * total + 1e-6)


def test_traffic_follows_the_schedule_as_published():
    """(down + up) / dense over T = 200 rounds at S_T = .95, from the formula alone: .293 is published, .291 was run."""
    levels, level = [], 0.0
    for t in range(1, 201):
        levels.append(level)  # what goes down in round t is what was left after round t - 1
        level = Cubic(sparsity=0.95).after(t, 200) or level
    assert sum(1 - s for s in levels) / 200 == pytest.approx(0.293, abs=0.004)


def setting(rounds=2):
    layout = Layout({"w": "weight"})
    return Setting(0, rounds, 3, 1.0, layout, {"w": Spec((8,))})


W = torch.tensor([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
KEPT = torch.tensor([[1, 1, 1, 0, 1, 0, 0, 0], [1, 1, 0, 0, 1, 1, 0, 0], [1, 0, 1, 0, 0, 0, 1, 0]], dtype=torch.bool)


def test_majority_vote_by_hand_three_clients_by_eight_weights():
    """votes 3 2 2 0 2 1 1 0; kept where > 1.5; the zeros of who dropped a weight enter the mean (n = 1, 1, 2)."""
    method = FedSparsifyLocal(schedule=Cubic(sparsity=0.5, start=0), allocation=Global(guard=False))
    state = State(setting(), 1, {"w": W})
    ask = method.plan(state)
    assert ask.expects.mask == "required"
    messages = [
        Message({"w": torch.where(m, W + k, 0.0)}, {"w": m}, {"samples": n, "processed": n, "loss": 0.0})
        for k, (m, n) in enumerate(zip(KEPT, (1, 1, 2), strict=True))
    ]
    after = method.absorb(state, reduce(ask, state, list(enumerate(messages))))
    assert after.mask["w"].int().tolist() == [1, 1, 1, 0, 1, 0, 0, 0]
    # weight 0: (8 + 9 + 2 * 10) / 4; weight 1: (7 + 8) / 4; weight 2: (6 + 2 * 8) / 4; weight 4: (4 + 5) / 4
    assert after.weights["w"].tolist() == [9.25, 3.75, 5.5, 0.0, 2.25, 0.0, 0.0, 0.0]
    assert after.round == 2


def test_coverage_average_counts_only_who_kept_it():
    from secateur.aggregation.steps import Mean

    method = FedSparsifyLocal(schedule=Cubic(sparsity=0.5, start=0), aggregator=Mean(coverage=True))
    state = State(setting(), 1, {"w": W})
    ask = method.plan(state)
    messages = [(k, Message({"w": torch.where(m, W, 0.0)}, {"w": m}, {"samples": 1})) for k, m in enumerate(KEPT)]
    after = method.absorb(state, reduce(ask, state, messages))
    assert after.weights["w"].tolist() == [8.0, 7.0, 6.0, 0.0, 4.0, 0.0, 0.0, 0.0]


def test_local_with_identical_clients_equals_global():
    cubic = Cubic(sparsity=0.5, start=0)
    reply = Message({"w": W}, None, {"samples": 1, "processed": 1, "loss": 0.0})
    state = State(setting(), 1, {"w": W})
    whole = FedSparsify(schedule=cubic)
    merged = whole.absorb(state, reduce(whole.plan(state), state, [(k, reply) for k in range(3)]))
    local = FedSparsifyLocal(schedule=cubic)
    own = local._mask(setting(), {"w": W}, (), 0.5, held=None)
    voted = Message({"w": torch.where(own["w"], W, 0.0)}, own, reply.scalars)
    after = local.absorb(state, reduce(local.plan(state), state, [(k, voted) for k in range(3)]))
    assert same(after.weights, merged.weights)
    assert same(after.mask, merged.mask)


def test_one_silent_round_of_votes_keeps_the_mask():
    method = FedSparsifyLocal(schedule=Cubic(sparsity=0.5, start=0))
    held = {"w": torch.tensor([True] * 6 + [False] * 2)}
    state = State(setting(), 1, {"w": W}, held)
    after = method.absorb(state, reduce(method.plan(state), state, []))
    assert same(after.mask, held)
    assert same(after.weights, state.weights)


def test_masks_are_nested_even_where_a_vote_overshot():
    method = FedSparsify()
    held = {"w": torch.tensor([True, False] * 4)}
    tighter = method._mask(setting(), {"w": W}, (), 0.25, held=held)
    assert same(tighter, held)  # half is pruned already, a quarter asks for no more
    assert method._mask(setting(), {"w": W}, (), 0.0, held=held) is held


@pytest.mark.parametrize("rule", ["majority", "half", "union", "intersection"])
@pytest.mark.parametrize("voters", [1, 2, 3])
def test_no_vote_brings_back_what_is_pruned(rule, voters):
    """Voters who also keep weights 4 to 7, which the held mask has not: nobody gets them back."""
    method = FedSparsifyLocal(schedule=Cubic(sparsity=0.5, start=0), consensus=Majority(rule))
    held = {"w": torch.tensor([True] * 4 + [False] * 4)}
    state = State(setting(), 1, {"w": W}, held)
    own = {"w": torch.tensor([True, True, False, False, True, True, True, True])}
    reply = Message({"w": torch.where(own["w"], W, 0.0)}, own, {"samples": 1, "processed": 1, "loss": 0.0})
    after = method.absorb(state, reduce(method.plan(state), state, [(k, reply) for k in range(voters)]))
    assert after.mask["w"].int().tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


def test_a_consensus_without_a_vote_says_so():
    class Strange(Consensus):
        ballot = {"votes": Sum(masks_of)}  # noqa: RUF012 -- a property of its base

    with pytest.raises(ConfigError, match="consensus Strange has a ballot, and lacks 'vote' of Consensus"):
        FedSparsify(consensus=Strange()).check(setting())

    class Taken(Majority):
        ballot = {"mean": Sum(masks_of)}  # noqa: RUF012 -- a property of its base

    with pytest.raises(ConfigError, match="consensus Taken has a reduction called 'mean' in its ballot"):
        FedSparsify(consensus=Taken()).check(setting())


def test_random_mask_is_persistent_exact_and_ignores_the_weights(tmp_path, shards):
    play(small("random", "schedule.sparsity=0.75"), tmp_path / "a", shards)
    play(small("random", "schedule.sparsity=0.75", "training.lr=0.01"), tmp_path / "b", shards)
    masks = [{n: t for n, t in model_of(tmp_path / x).items() if n.startswith("mask/")} for x in "ab"]
    assert same(*masks)
    assert {row["sparsity"] for row in rows_of(tmp_path / "a")} == {0.75}
    total = sum(m.numel() for m in masks[0].values())
    assert sum(int(m.sum()) for m in masks[0].values()) == total - math.floor(0.75 * total)


def test_oneshot_is_dense_until_the_cut(tmp_path, shards):
    play(small("oneshot", "schedule.at=-2", "schedule.sparsity=0.5"), tmp_path / "run", shards)
    assert [row["sparsity"] for row in rows_of(tmp_path / "run")] == [0.0, 0.5, 0.5, 0.5]


def test_defaults_are_the_papers():
    schedule = FedSparsify().schedule
    assert (schedule.initial, schedule.start, schedule.every, schedule.exponent) == (0.0, 1, 1, 3.0)
    assert FedSparsifyLocal().consensus == Majority("majority")
    assert OneShotMagnitude().schedule.at == -10
    assert RandomPruning().schedule.at == 0
