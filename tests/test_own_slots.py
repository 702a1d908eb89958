"""Slots from outside of the package, ``own_*.py``: each at work at the server, at clients and by cohort."""

import ast
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import own_guard
import secateur
from helpers import lab, model_of, play, rows_of, same, small, tiny_shards
from own_aggregator import HalfWay
from own_reduction import Largest
from secateur.contract.ask import Ask
from secateur.contract.reducer import reduce
from secateur.contract.reduction import Reply, Sent
from secateur.errors import ConfigError, WireError
from secateur.methods.fedavg import FedAvg
from secateur.methods.kit.criteria import Criterion
from secateur.pruning import mask as masks
from secateur.study.options import build, flatten
from secateur.study.runtime import Runtime
from secateur.study.study import parse_study
from secateur.wire.message import Expected, Message

PLACES = {
    "server": ("consensus=pooled",),
    "clients": ("consensus=majority", "consensus.rule=union"),
    "cohort": ("consensus=participants",),
}
ALL = {"participation": 1.0, "training": {"epochs": 3, "batch_size": 16, "lr": 0.3}}
ONCE = ("schedule=one_shot", "schedule.sparsity=0.5", "allocation=global", "allocation.guard=false")
EVERY = ("schedule=every_round", "schedule.sparsity=0.5", "allocation=global", "allocation.guard=false")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Four clients with as many rows each."""
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def shipped(folder, shards, *settings, rounds=1):
    """Run a composition in which all clients take part; return the weights and the mask of its end."""
    play(small("fedavg", *settings, rounds=rounds, **ALL), folder, shards)
    assert not any(row["left_out"] for row in rows_of(folder))
    tensors = model_of(folder)
    mask = {n.removeprefix("mask/"): t.bool() for n, t in tensors.items() if n.startswith("mask/")}
    return {n: t for n, t in tensors.items() if not n.startswith("mask/")}, mask


def trained(shards, sent=None, mask=None, round_=1):
    """Return theta_0, and what each of four clients makes of theta_0 (or of ``sent``) in one round."""
    state, view = lab(shards, small("fedavg", rounds=1, **ALL))
    start = {n: t.clone() for n, t in state.weights.items()}
    return start, [view(k).train(masks.apply(sent or start, mask), mask, round_=round_)[0] for k in range(4)]


def mean(models):
    return {n: torch.stack([m[n].double() for m in models]).mean(0).float() for n in models[0]}


def top_half(scores):
    """Return the mask of the larger half of all weights (not biases) together; there are no ties."""
    weights = {n: s for n, s in scores.items() if n.endswith("weight")}
    limit = torch.cat([s.reshape(-1) for s in weights.values()]).sort().values
    return {n: s > limit[len(limit) // 2 - 1] for n, s in weights.items()}


def union(parts):
    return {n: torch.stack([p[n] for p in parts]).any(0) for n in parts[0]}


def equal(one, other):
    return same(dict(sorted(one.items())), dict(sorted(other.items())))


def close(one, other):
    assert set(one) == set(other)
    for n in one:
        torch.testing.assert_close(one[n], other[n], rtol=1e-5, atol=1e-7)


# ---- a criterion that asks clients, with a reduction of its own


@pytest.mark.parametrize("place", PLACES)
def test_a_criterion_with_a_statistic_of_clients(place, tmp_path, shards):
    criterion = "criterion=own_criterion:Drift"
    if place == "clients":  # each measures its own drift, from what it was trained to
        _, mask = shipped(tmp_path, shards, criterion, *PLACES[place], *ONCE, "schedule.at=1")
        models = trained(shards)[1]
        again = [trained(shards, sent=model)[1][k] for k, model in enumerate(models)]
        expected = union([top_half({n: (b[n] - a[n]).abs() for n in a}) for a, b in zip(models, again, strict=True)])
    else:  # the largest drift of all four from theta_0, before round 1
        schedule = (*ONCE, "schedule.at=0") if place == "server" else EVERY
        _, mask = shipped(tmp_path, shards, criterion, *PLACES[place], *schedule)
        start, models = trained(shards, round_=0)
        drift = {n: torch.stack([(m[n] - start[n]).abs() for m in models]).amax(0) for n in start}
        expected = top_half(drift)
        assert [row["phase"] for row in rows_of(tmp_path)] == ["score", "train"]
    assert equal(mask, expected)


def test_a_reduction_by_hand(shards):
    """The largest of each entry over three replies, in any blocks."""
    state, _ = lab(shards, small())
    ask = Ask("score", 1, (0, 1, 2), Message({}), Expected({}), {"top": Largest()})
    values = ([1.0, -5.0], [0.5, 2.0], [3.0, -7.0])
    replies = [(k, Message({"w": torch.tensor(v)}, None, {"samples": 1})) for k, v in enumerate(values)]
    assert reduce(ask, state, replies)["top"]["w"].tolist() == [3.0, 2.0]
    assert reduce(ask, state, [])["top"] == {}


# ---- allocation, granularity


@pytest.mark.parametrize("place", PLACES)
def test_an_allocation(place, tmp_path, shards):
    schedule = ("schedule=every_round",) if place == "cohort" else ("schedule=one_shot", "schedule.at=1")
    settings = (*PLACES[place], *schedule, "schedule.sparsity=0.5", "criterion=random")
    _, mask = shipped(tmp_path, shards, *settings, "allocation=own_allocation:Ends")
    kept = {n: (int(m.sum()), m.numel()) for n, m in mask.items()}
    assert kept == {"fc1.weight": (192, 192), "fc2.weight": (48, 96), "fc3.weight": (24, 24)}


@pytest.mark.parametrize("place", PLACES)
def test_a_granularity(place, tmp_path, shards):
    schedule = ("schedule=every_round",) if place == "cohort" else ("schedule=one_shot", "schedule.at=1")
    settings = (*PLACES[place], *schedule, "schedule.sparsity=0.5", "criterion=random", "allocation=uniform")
    _, mask = shipped(tmp_path, shards, *settings, "granularity=own_granularity:Rows")
    rows = {n: m.any(1) for n, m in mask.items()}
    assert all(torch.equal(m, rows[n][:, None].expand_as(m)) for n, m in mask.items())
    assert {n: (int(r.sum()), len(r)) for n, r in rows.items()} == {
        "fc1.weight": (6, 12),
        "fc2.weight": (4, 8),
        "fc3.weight": (2, 3),
    }


# ---- a schedule that looks at the weights


@pytest.mark.parametrize("place", PLACES)
def test_a_schedule_that_sees_the_weights(place, tmp_path, shards):
    settings = (*PLACES[place], "allocation=global", "allocation.guard=false")
    _, mask = shipped(tmp_path, shards, *settings, "schedule=own_schedule:Below", "schedule.tau=0.2")
    start, _ = trained(shards)
    large = {n: t.abs() >= 0.2 for n, t in start.items() if n.endswith("weight")}
    if place == "clients":  # nothing was pruned before they trained but what the server saw in theta_0
        expected = union([{n: (m[n].abs() >= 0.2) & large[n] for n in large} for m in trained(shards, mask=large)[1]])
    else:
        merged = mean(trained(shards, mask=large)[1])
        expected = {n: merged[n].abs() >= 0.2 for n in large}
    assert 0.05 < masks.sparsity(large) < masks.sparsity(expected) < 0.9
    assert equal(mask, expected)
    assert rows_of(tmp_path)[0]["down"]["mask"] > 0


# ---- consensus: of clients, by cohort


def test_a_vote_with_voices_by_rows(tmp_path, shards):
    """Four clients with a quarter of the rows each: three of them are a quorum of 0.75, where the majority is too."""
    settings = (*ONCE, "schedule.at=1")
    _, mask = shipped(tmp_path / "run", shards, *settings, "consensus=own_consensus:Quorum", "consensus.share=0.75")
    votes = [top_half({n: t.abs() for n, t in model.items()}) for model in trained(shards)[1]]
    assert equal(mask, {n: torch.stack([v[n] for v in votes]).sum(0) >= 3 for n in votes[0]})


def test_dense_and_sparse_cohorts_by_turns(tmp_path, shards):
    _, mask = shipped(tmp_path, shards, *EVERY, "consensus=own_consensus:Alternating", rounds=4)
    rows = rows_of(tmp_path)
    assert [row["sparsity"] for row in rows] == [0.0, 0.5, 0.0, 0.5]
    assert rows[1]["down"]["values"] < 0.8 * rows[0]["down"]["values"]
    assert masks.sparsity(mask) == 0.5


# ---- recovery


@pytest.mark.parametrize("place", PLACES)
def test_a_recovery(place, tmp_path, shards):
    """Survivors are halved after an event, exactly; a cohort goes on from weights that were halved before round 1."""
    recovery = "recovery=own_recovery:Shrink"
    if place == "cohort":
        weights, mask = shipped(tmp_path, shards, *PLACES[place], *EVERY, recovery)
        start, _ = trained(shards)
        halved = {n: t / 2 for n, t in start.items()}
        sent = top_half({n: t.abs() for n, t in start.items()})
        close(weights, masks.apply(mean(trained(shards, sent=halved, mask=sent)[1]), mask))
        return
    settings = (*PLACES[place], *ONCE, "schedule.at=1")
    kept, mask = shipped(tmp_path / "kept", shards, *settings)
    shrunk, other = shipped(tmp_path / "shrunk", shards, *settings, recovery)
    assert equal(mask, other)
    assert equal(shrunk, {n: t / 2 for n, t in kept.items()})


# ---- aggregator


@pytest.mark.parametrize("place", PLACES)
def test_an_aggregator(place, tmp_path, shards):
    schedule = ("schedule=every_round",) if place == "cohort" else ("schedule=one_shot", "schedule.at=1")
    settings = (*PLACES[place], *schedule, "schedule.sparsity=0.5", "criterion=random", "allocation=uniform")
    weights, mask = shipped(tmp_path, shards, *settings, "aggregator=own_aggregator:HalfWay")
    held = mask if place == "cohort" else None  # a random mask is the same in each round
    start, models = trained(shards, mask=held)
    close(weights, masks.apply({n: (start[n] + m) / 2 for n, m in mean(models).items()}, mask))
    assert build(FedAvg, {"aggregator": "own_aggregator:HalfWay"}).aggregator == HalfWay()


# ---- a guard


@pytest.mark.parametrize("place", PLACES)
def test_a_guard_holds_clients_near_what_they_were_sent(place, tmp_path, shards):
    schedule = EVERY if place == "cohort" else (*ONCE, "schedule.at=1")
    settings = (*PLACES[place], *schedule, "criterion=random")
    weights, mask = shipped(tmp_path, shards, *settings, "guards.own_guard.largest=0.01")
    start, models = trained(shards, mask=mask if place == "cohort" else None)
    moved = mean([{n: start[n] + (m[n] - start[n]).clamp(-0.01, 0.01) for n in m} for m in models])
    close(weights, masks.apply(moved, mask))
    before = masks.apply(start, mask)
    assert max(float((t - before[n]).abs().max()) for n, t in weights.items()) == pytest.approx(0.01, rel=1e-3)


def test_a_guard_at_the_server_and_what_it_does_not_go_with(tmp_path, shards):
    sent = Sent(None, lambda: ({"w": torch.zeros(2)}, None))
    near = own_guard.Near(0.5)
    fine = Reply(0, 1, {"w": torch.tensor([0.5, -0.5])}, None, {})
    assert near.arriving(fine, sent, None) is fine
    with pytest.raises(WireError, match="'w' moved by more than 0.5"):
        near.arriving(Reply(0, 1, {"w": torch.tensor([0.6, 0.0])}, None, {}), sent, None)
    with pytest.raises(ConfigError, match="guard Near goes with sums alone, and phase 'explore' keeps single replies"):
        play(small("autoflip", "guards.own_guard.largest=1"), tmp_path, shards)


def test_a_guard_in_a_package_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "their_guards").mkdir()
    shutil.copy(own_guard.__file__, tmp_path / "their_guards" / "near.py")
    monkeypatch.syspath_prepend(tmp_path)
    made = small("fedavg", "guards.their_guards.near.largest=0.5", "guards.bounds.rows=7")
    assert made.guards == {"bounds": {"rows": "7"}, "their_guards.near": {"largest": "0.5"}}
    assert [type(guard).__name__ for guard in made.build_guards()] == ["Bounds", "Near"]
    assert parse_study(tomllib.loads(made.to_toml())).build_guards() == made.build_guards()


# ---- all together


@pytest.mark.parametrize("place", PLACES)
def test_own_slots_together_do_not_depend_on_workers(place, tmp_path, shards):
    slots = ("criterion=own_criterion:Drift", "allocation=own_allocation:Ends", "recovery=own_recovery:Shrink")
    more = ("aggregator=own_aggregator:HalfWay", "schedule=geometric", "guards.own_guard.largest=0.5")
    study = small("fedavg", *slots, *more, "schedule.share=0.5", "schedule.sparsity=0.7", *PLACES[place], rounds=3)
    if place != "clients":  # a maximum over clients is no sum
        with pytest.raises(ConfigError, match="guard Near goes with sums alone, and phase 'score'"):
            play(study, tmp_path / "guarded", shards)
        study = study.model_copy(update={"guards": {"bounds": {}}})
    play(study, tmp_path / "one", shards)
    play(study, tmp_path / "two", shards, runtime=Runtime(workers=2))
    assert same(model_of(tmp_path / "one"), model_of(tmp_path / "two"))
    assert rows_of(tmp_path / "one")[-1]["sparsity"] > 0.1
    assert not any(row["left_out"] for row in rows_of(tmp_path / "two"))


def test_a_robust_rule_is_an_aggregator_with_a_reduction_of_its_own(tmp_path, shards):
    """One round: the shipped weights are numpy's median of what the clients trained, under the mask."""
    settings = ("schedule=one_shot", "schedule.at=1", "schedule.sparsity=0.5", "criterion=random")
    weights, mask = shipped(tmp_path, shards, *settings, "aggregator=own_median:Lower")
    _, models = trained(shards, mask=None)
    stacks = {n: np.stack([model[n].numpy() for model in models]) for n in weights}
    middle = {n: torch.from_numpy(np.sort(s, axis=0)[(len(s) - 1) // 2]) for n, s in stacks.items()}
    close(weights, masks.apply(middle, mask))


# ---- what is written for a slot and lacks something


def test_a_slot_that_lacks_a_verb_is_refused_by_name():
    @dataclass(frozen=True)
    class Nothing:
        pass

    says = {
        "criterion": "'absorb', 'ask', 'by_training', .*'scores', 'statistics' of Criterion; derive it from "
        r"secateur\.methods\.kit\.criteria\.Criterion",
        "allocation": ".*'keep'.* of Allocation",
        "granularity": "'cuts', 'mask', 'prunable', 'single' of Granularity",
        "schedule": "'due', 'level', 'planned' of Schedule",
        "consensus": "'ballot', .*'vote' of Consensus",
        "recovery": "'recover', 'remember' of Recovery",
        "aggregator": "'ballot', 'check', 'coverage', .*'refines', 'step' of Aggregator",
    }
    for slot, verbs in says.items():
        with pytest.raises(ConfigError, match=f"^{slot}: Nothing lacks {verbs}"):
            FedAvg(**{slot: Nothing()})


def test_a_slot_without_what_its_base_leaves_open_cannot_be_chosen(tmp_path, monkeypatch):
    (tmp_path / "half_done.py").write_text(
        "from dataclasses import dataclass\nfrom secateur.methods.kit.criteria import Criterion\n"
        "from secateur.methods.kit.criteria.measured import Statistic\n"
        "@dataclass(frozen=True)\nclass A(Criterion):\n    pass\n"
        "@dataclass(frozen=True)\nclass B(Statistic):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name, verbs in (("A", "'scores'"), ("B", "'observe', 'score'")):
        with pytest.raises(ConfigError, match=f"criterion = 'half_done:{name}': {name} lacks {verbs} of Criterion"):
            build(FedAvg, {"criterion": f"half_done:{name}"})


def test_a_criterion_that_asks_and_cannot_answer_says_so():
    class Deaf(Criterion):
        def scores(self, weights, statistics, *, seed):
            return weights

    class Seen:
        id = 3

    with pytest.raises(ConfigError, match="criterion Deaf asks clients for nothing, and client 3 got phase 'score'"):
        Deaf().respond(Ask("score", 1, (3,), Message({}), Expected({})), Seen())


def test_options_of_own_slots_round_trip():
    slots = {
        "criterion": "own_criterion:Drift", "allocation": "own_allocation:Ends", "schedule": "own_schedule:Below",
        "granularity": "own_granularity:Rows", "consensus": "own_consensus:Quorum", "recovery": "own_recovery:Shrink",
        "aggregator": "own_aggregator:HalfWay", "schedule.tau": 0.3,
    }  # fmt: skip
    made = build(FedAvg, slots)
    assert slots.items() <= flatten(made).items()
    assert build(FedAvg, flatten(made)) == made


# ---- nothing in the shared round looks at classes


def test_composition_asks_no_slot_for_its_class():
    path = Path(secateur.__file__).parent / "methods" / "kit" / "composition.py"
    names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    assert "Composition" in names
    assert not names & {"isinstance", "issubclass"}


def test_own_slots_are_small():
    for path in Path(__file__).parent.glob("own_*.py"):
        assert 10 <= len(path.read_text().splitlines()) <= 45, path
