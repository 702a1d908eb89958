"""Robust rules: the hand-computed set of five updates, breakdown, holders, refusals, and whole runs."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import Wrapped, lab, model_of, play, resumed, rows_of, same, small, tiny_shards
from secateur.aggregation.centered_clip import CenteredClip
from secateur.aggregation.clip import Clip
from secateur.aggregation.deepsa import Deepsa, reliability
from secateur.aggregation.dnc import Dnc, outlying
from secateur.aggregation.fltrust import Fltrust
from secateur.aggregation.krum import Krum
from secateur.aggregation.lasa import Lasa
from secateur.aggregation.mask_filter import MaskFilter
from secateur.aggregation.median import Median
from secateur.aggregation.multikrum import Multikrum
from secateur.aggregation.steps import FedAdam, Mean, ServerMomentum
from secateur.aggregation.trimmed import Trimmed
from secateur.contract.ask import SERVER, Ask
from secateur.contract.reducer import reduce
from secateur.contract.state import Setting, State
from secateur.engines import Failure
from secateur.errors import ConfigError, NobodyTrainedError
from secateur.methods.autoflip import AutoFLIP
from secateur.methods.fedavg import FedAvg
from secateur.methods.kit.consensus import Majority
from secateur.pruning.structure import Layout
from secateur.study.options import build, flatten
from secateur.study.runtime import Runtime
from secateur.study.study import parse_study
from secateur.wire.message import Expected, Message, Spec

# Five updates, the last hostile; every figure below was computed by hand.
A = [(1.0, 0.0), (1.2, 0.1), (0.9, -0.1), (1.1, 0.05), (-10.0, 8.0)]
PLAIN = [Median(), Trimmed(), Krum(), Multikrum(), Clip(weights="equal"), CenteredClip(), Dnc(), Lasa(), Deepsa()]
IDS = [rule.name for rule in PLAIN]


def combined(rule, updates, masks=None, *, memory=None, rows=None, buffers=None, start=0.0, seed=0):
    """Return what a rule makes of updates of one tensor (and of a running statistic), sent at ``start``."""
    updates = torch.tensor(np.asarray(updates, np.float32))
    clients, width = updates.shape
    specs = {"w": Spec((width,))} | ({"b": Spec((1,))} if buffers is not None else {})
    layout = Layout({"w": "weight"} | ({"b": "buffer"} if buffers is not None else {}))
    before = {"w": torch.full((width,), start)} | ({"b": torch.zeros(1)} if buffers is not None else {})
    state = State(Setting(seed, 5, clients, 1.0, layout, specs), 0, before, memory=memory or {})
    kind = "none" if masks is None else "required"
    ask = Ask(
        "train",
        1,
        tuple(range(clients)),
        Message(before),
        Expected(specs, mask=kind),
        {"x": rule.reduction(masked=True)},
    )
    replies = []
    for k in range(clients):
        mask = None if masks is None else {"w": torch.tensor(masks[k])}
        value = before["w"] + updates[k]
        tensors = {"w": value if mask is None else torch.where(mask["w"], value, 0.0)}
        tensors |= {} if buffers is None else {"b": torch.tensor([buffers[k]])}
        replies.append((k, Message(tensors, mask, {"samples": 1 if rows is None else rows[k]})))
    return reduce(ask, state, replies)["x"]


def by_hand(*values):
    return pytest.approx(values, abs=6e-5)


def test_the_hand_set_by_coordinates():
    assert combined(Median(), A)["w"].tolist() == by_hand(1.0, 0.05)
    assert combined(Trimmed(hostile=0.2), A)["w"].tolist() == by_hand(1.0, 0.05)
    assert combined(Trimmed(hostile=0.0), A)["w"].tolist() == by_hand(-1.16, 1.61)  # the mean


def test_the_hand_set_by_krum():
    """The scores are .0325, .0625, .0825, .0250 and 369.4 with f = 1: client 4 of 5 is taken, client 5 is named."""
    found = combined(Krum(hostile=0.2), A)
    assert found["w"].tolist() == by_hand(1.1, 0.05)
    assert found.suspected == {4: "krum: its score is 369.4, the cohort's median 0.0625"}
    several = combined(Multikrum(hostile=0.2), A)
    assert several["w"].tolist() == by_hand(4.2 / 4, 0.05 / 4)
    assert list(several.suspected) == [4]


def test_the_hand_set_by_norms():
    """The norms are 1, 1.2042, .9055, 1.1011 and 12.806; clipped at 1.1011."""
    assert combined(Clip(weights="equal"), A)["w"].tolist() == by_hand(0.6475, 0.1459)
    for iterations, centre in enumerate([(0.6229, 0.1306), (0.8039, 0.1552), (0.8389, 0.1585)], start=1):
        assert combined(CenteredClip(radius=1.0, iterations=iterations), A)["w"].tolist() == by_hand(*centre)


def test_centred_clipping_goes_on_from_the_last_centre():
    """Two rounds of one iteration are one round of two, if the same updates come; the centre stands in the memory."""
    rule = CenteredClip(radius=1.0)
    first = combined(rule, A)
    weights, memory = rule.step({"w": torch.zeros(2)}, dict(first), mask=None, memory={"other": {}})
    assert weights["w"].tolist() == by_hand(0.6229, 0.1306)
    assert combined(rule, A, memory=memory)["w"].tolist() == by_hand(0.8039, 0.1552)
    mask = {"w": torch.tensor([True, False])}
    _, masked = rule.step({"w": torch.zeros(2)}, dict(first), mask=mask, memory={})
    assert masked["centre"]["w"].tolist() == by_hand(0.6229, 0.0)  # v is 0 at a weight that was pruned


def test_the_hand_set_by_trust():
    """a_0 = (1, 0): t = 1, .9965, .9939, .9990, 0."""
    found = combined(Fltrust(), A, memory={"trusted": {"w": torch.tensor([1.0, 0.0])}})
    assert found["w"].tolist() == by_hand(0.9974, 0.0046)
    assert found.suspected == {4: "fltrust: it does not point where the server's own update points"}
    away = combined(Fltrust(), A[:4], memory={"trusted": {"w": torch.tensor([-1.0, 0.0])}})
    assert away["w"].tolist() == [0.0, 0.0]  # nobody is trusted: the model stays
    assert list(away.suspected) == [0, 1, 2, 3]


def test_the_hand_set_by_directions():
    """v = +-(.8105, -.5857), scores 7.26, 7.82, 7.14, 7.54 and 118.98: client 5 goes, the others' mean stays."""
    scores = outlying(torch.tensor(A, dtype=torch.float64), None)
    assert scores.tolist() == pytest.approx([7.26, 7.82, 7.14, 7.54, 118.98], abs=6e-3)
    found = combined(Dnc(hostile=0.2), A)
    assert found["w"].tolist() == by_hand(1.05, 0.0125)
    assert found.suspected == {4: "dnc: it stands out in 5 of 5 samples"}


# ---- what every rule promises


def cohort(seed, clients=9, width=12, spread=0.3):
    """Return honest updates around one direction."""
    draw = np.random.default_rng(seed)
    return draw.normal(size=width) + spread * draw.normal(size=(clients, width))


@pytest.mark.parametrize("rule", [*PLAIN, Fltrust()], ids=[*IDS, "fltrust"])
def test_no_order_of_clients_matters(rule):
    """Up to the last bits of sums; who is named moves with the clients."""
    updates, order = cohort(1), np.random.default_rng(2).permutation(9)
    memory = {"trusted": {"w": torch.ones(12)}}
    one, other = (combined(rule, given, memory=memory) for given in (updates, updates[order]))
    torch.testing.assert_close(one["w"], other["w"], rtol=1e-5, atol=1e-6)
    assert {int(order[k]) for k in other.suspected} == set(one.suspected)


@pytest.mark.parametrize("rule", PLAIN, ids=IDS)
@pytest.mark.parametrize("size", [1e2, 1e30])
def test_a_fifth_of_huge_liars_moves_no_rule_far(rule, size):
    """Two of ten: the result stays within the honest ones' reach; clipped rules move by a share of their radius."""
    honest = cohort(3, clients=8)
    updates = np.concatenate([honest, np.full((2, 12), -size)])
    found = combined(rule, updates)["w"].numpy()
    assert np.isfinite(found).all()
    away = np.linalg.norm(found - honest.mean(axis=0))
    assert away < 0.75 * np.linalg.norm(honest.mean(axis=0))


@pytest.mark.parametrize(("rule", "hold", "breaks"), [(Median(), 4, 5), (Trimmed(hostile=0.3), 3, 4)])
def test_a_rule_breaks_where_it_says(rule, hold, breaks):
    """Of ten clients: the median holds against 4 and not against 5; a mean trimmed by 3 against 3 and not against 4."""
    honest = cohort(4, clients=10)
    for liars, holds in ((hold, True), (breaks, False)):
        found = combined(rule, np.concatenate([honest[liars:], np.full((liars, 12), 1e6)]))["w"].abs().max()
        assert (float(found) < 10) is holds


@pytest.mark.parametrize("rule", [Trimmed(hostile=0.0), Multikrum(hostile=0.0), Dnc(hostile=0.0)], ids=lambda r: r.name)
def test_without_hostile_clients_a_rule_is_the_mean(rule):
    updates = cohort(5)
    found = combined(rule, updates)
    np.testing.assert_allclose(found["w"].numpy(), updates.mean(axis=0), rtol=1e-5, atol=1e-6)
    assert not found.suspected


def test_rows_weigh_by_choice_and_up_to_a_limit():
    """Rows 1, 1, 1, 1, 1000: the 90th percentile of the five is 600.4, so that the last weighs 600.4 of 604.4."""
    updates, rows = [[0.0], [0.0], [0.0], [0.0], [1.0]], [1, 1, 1, 1, 1000]
    assert combined(Multikrum(hostile=0.0), updates, rows=rows)["w"].item() == pytest.approx(0.2)
    found = combined(Multikrum(hostile=0.0, weights="rows"), updates, rows=rows)["w"].item()
    assert found == pytest.approx(600.4 / 604.4)


def test_a_client_without_rows_has_no_say():
    updates = [[1.0], [2.0], [3.0], [9.0], [9.0]]
    assert combined(Median(), updates, rows=[1, 1, 1, 0, 0])["w"].item() == 2.0
    assert dict(combined(Median(), updates, rows=[1, 1, 0, 0, 0])) == {}  # two are too few


def test_updates_are_taken_from_what_was_sent():
    """Three clients at 7 + 1, 7 + 2 and 7 + 9, clipped at the median norm 2: (1 + 2 + 2) / 3."""
    found = combined(Clip(weights="equal"), [[1.0], [2.0], [9.0]], start=7.0)
    assert found["w"].item() == pytest.approx(5 / 3)


@pytest.mark.parametrize("rule", PLAIN, ids=IDS)
def test_running_statistics_take_the_median_of_those_kept(rule):
    """Four honest clients at 1, 2, 3 and 4, one liar at 1e30, which no median of any four or five of them takes."""
    found = combined(rule, A, buffers=[1.0, 2.0, 3.0, 4.0, 1e30])
    assert 1.0 <= found["b"].item() <= 4.0
    if rule.name in {"multikrum", "dnc"}:
        assert found["b"].item() == 2.5


# ---- holders


def test_the_trap_of_sparse_medians():
    """A coordinate that clients 1 and 3 of five hold, with .2 and .4: the server's value stays, and is no vote for 0.

    One that three hold has their median, where zeros of the other two would make it 0.1.
    """
    masks = [[True, True], [False, False], [True, True], [False, False], [False, True]]
    updates = [[0.2, 0.2], [0.0, 0.0], [0.4, 0.4], [0.0, 0.0], [0.0, 0.1]]
    found = combined(Median(), updates, masks)["w"]
    assert found.tolist() == pytest.approx([0.0, 0.2])
    weights, _ = Median().step({"w": torch.tensor([7.0, 7.0])}, {"w": found}, mask=None, memory={})
    assert weights["w"].tolist() == pytest.approx([7.0, 7.2])


def test_trimming_over_holders():
    """Five hold the first: 1..5 without 1 and 5; three the second: b = 1 leaves the middle one; two the third."""
    masks = [[True, k < 3, k < 2] for k in range(5)]
    updates = [[k + 1.0, (k + 1.0) * masks[k][1], (k + 1.0) * masks[k][2]] for k in range(5)]
    assert combined(Trimmed(hostile=0.2), updates, masks)["w"].tolist() == pytest.approx([3.0, 2.0, 0.0])
    few = [[True], [True], [True], [True], [False]]  # four holders are no more than 2 b = 4
    assert combined(Trimmed(hostile=0.4), [[1.0], [2.0], [3.0], [4.0], [0.0]], few)["w"].tolist() == [0.0]


def drawn_masks(seed, clients=9, width=40, density=0.6):
    return np.random.default_rng(seed).random((clients, width)) < density


def over_holders(updates, masks, gains, weights):
    """Return sum g a / sum h over holders, 0 where fewer than three hold a coordinate; written with loops."""
    found = []
    for j in range(updates.shape[1]):
        holders = [k for k in range(len(updates)) if masks[k][j]]
        total = sum(weights[k] for k in holders)
        moves = len(holders) >= 3 and total > 0
        found.append(sum(gains[k] * updates[k][j] for k in holders) / total if moves else 0.0)
    return found


def norms_of(updates, masks):
    """Return each norm as if all 40 coordinates were held."""
    return [math.sqrt((u[m] ** 2).mean() * updates.shape[1]) for u, m in zip(updates, masks, strict=True)]


def test_multikrum_over_common_coordinates():
    """Distances over what both hold, divided by its number; scores and the mean over holders, with loops."""
    updates, masks = cohort(6, width=40), drawn_masks(7)
    updates[0] += 3.0  # far away
    updates = np.where(masks, updates, 0.0)
    scores = []
    for i in range(9):
        apart = []
        for j in set(range(9)) - {i}:
            both = masks[i] & masks[j]
            apart.append(((updates[i][both] - updates[j][both]) ** 2).mean())
        scores.append(sum(sorted(apart)[: 9 - 2 - 2]))
    keep = [k in sorted(range(9), key=scores.__getitem__)[:7] for k in range(9)]
    assert not keep[0]
    found = combined(Multikrum(hostile=0.2), updates, masks)
    assert found["w"].tolist() == pytest.approx(over_holders(updates, masks, keep, keep), abs=1e-6)
    assert set(found.suspected) == {k for k in range(9) if not keep[k]}


def test_clipping_over_holders():
    updates, masks = cohort(8, width=40), drawn_masks(9)
    updates[0] *= 50
    updates = np.where(masks, updates, 0.0)
    norms = norms_of(updates, masks)
    gains = [min(1.0, sorted(norms)[4] / norm) for norm in norms]
    found = combined(Clip(weights="equal"), updates, masks)["w"]
    assert found.tolist() == pytest.approx(over_holders(updates, masks, gains, [1.0] * 9), abs=1e-6)


def test_centred_clipping_over_holders():
    """A client that does not hold a coordinate moves the centre nowhere there, and does not hold it back."""
    updates, masks = cohort(10, width=40), drawn_masks(11)
    updates = np.where(masks, updates, 0.0)
    centre = np.random.default_rng(12).normal(size=40)
    away = np.where(masks, updates - centre, 0.0)
    norms = norms_of(away, masks)
    gains = [min(1.0, 2.0 / norm) for norm in norms]
    moved = np.array(over_holders(away, masks, gains, [1.0] * 9))
    held = masks.sum(axis=0) >= 3
    memory = {"centre": {"w": torch.tensor(centre.astype(np.float32))}}
    found = combined(CenteredClip(radius=2.0), updates, masks, memory=memory)["w"]
    assert found.tolist() == pytest.approx(np.where(held, centre + moved, 0.0).tolist(), abs=1e-6)


def test_trust_over_holders():
    """The server's update is compared, and its length taken, over what a client holds."""
    updates, masks = cohort(13, width=40), drawn_masks(14)
    own = np.random.default_rng(15).normal(size=40) + updates.mean(axis=0)
    updates = np.where(masks, updates, 0.0)
    updates[2] = -updates[2]
    trust, gains = [], []
    for u, m in zip(updates, masks, strict=True):
        mine, theirs = np.linalg.norm(own[m]), np.linalg.norm(u[m])
        trust.append(max(0.0, float(u[m] @ own[m]) / (mine * theirs)))
        gains.append(trust[-1] * mine / theirs)
    found = combined(Fltrust(), updates, masks, memory={"trusted": {"w": torch.tensor(own.astype(np.float32))}})
    assert found["w"].tolist() == pytest.approx(over_holders(updates, masks, gains, trust), abs=1e-5)
    assert list(found.suspected) == [2]


def test_directions_over_holders_name_the_liar():
    updates, masks = cohort(16, clients=10, width=200), drawn_masks(17, clients=10, width=200)
    updates[3] = updates.mean(axis=0) - 1.5
    updates = np.where(masks, updates, 0.0)
    found = combined(Dnc(hostile=0.1), updates, masks)
    assert list(found.suspected) == [3]
    keep = [k != 3 for k in range(10)]
    assert found["w"].tolist() == pytest.approx(over_holders(updates, masks, keep, keep), abs=1e-6)


def test_directions_by_numpy():
    """With a sample of all coordinates the scores are those of numpy's singular vectors, of any number of clients."""
    updates = cohort(18, clients=7, width=30)
    centred = updates - updates.mean(axis=0)
    v = np.linalg.svd(centred)[2][0]
    expected = (centred @ v) ** 2
    np.testing.assert_allclose(outlying(torch.tensor(updates), None).numpy(), expected, rtol=1e-9)


def test_layers_by_the_published_steps():
    """LASA once more in numpy: clip, keep the largest 90 %, filter by norm and by signs, average."""
    updates = cohort(19, clients=10, width=50)
    updates[0] *= -1
    updates[1] *= 20
    norms = np.linalg.norm(updates, axis=1)
    clipped = updates * np.minimum(1, np.median(norms) / norms)[:, None]
    sparse = np.where(np.abs(clipped) >= np.sort(np.abs(clipped), axis=1)[:, 5][:, None], clipped, 0.0)
    lengths = np.linalg.norm(sparse, axis=1)
    positive = (sparse > 0).sum(axis=1) / (sparse != 0).sum(axis=1)
    usual = [np.abs(v - np.median(v)) < v.std() for v in (lengths, positive)]
    benign = usual[0] & usual[1]
    assert 0 < benign.sum() < 10
    assert not benign[0]
    found = combined(Lasa(), updates)
    np.testing.assert_allclose(found["w"].numpy(), sparse[benign].mean(axis=0), rtol=1e-4, atol=1e-6)
    assert set(found.suspected) == set(np.flatnonzero(~benign))


def test_masks_that_have_nothing_in_common():
    """Four clients share 3 of 4 weights each, the fifth sends the complement: J by hand.

    Masks {0,1,2}, {0,1,3}, {0,1,2}, {0,1,3} and {4,5}: the first has 1/2, 1, 1/2, 0 with the others, median 1/2; the
    last has 0. The median of all J is 1/2, the median deviation 0.
    """
    masks = [[j in kept for j in range(6)] for kept in ({0, 1, 2}, {0, 1, 3}, {0, 1, 2}, {0, 1, 3}, {4, 5})]
    updates = np.where(masks, 1.0, 0.0)
    updates[4] *= 9
    found = combined(MaskFilter(), updates, masks)
    assert found["w"].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]  # two hold the third and the fourth, which do not move
    assert found.suspected == {4: "mask_filter: its mask's likeness is 0, the cohort's median 0.5"}


# ---- in a run


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"), clients=8)


def eight(method, rule, *settings, **top):
    return small(
        method, f"aggregator={rule}", "data.clients=8", *settings, **{"participation": 1.0, "rounds": 2, **top}
    )


@pytest.mark.parametrize(("method", "rule"), [("fedsparsify", "dnc"), ("fedsparsify_local", "mask_filter")])
def test_workers_do_not_change_a_bit(method, rule, tmp_path, shards):
    play(eight(method, rule), tmp_path / "one", shards)
    play(eight(method, rule), tmp_path / "two", shards, runtime=Runtime(workers=2))
    assert same(model_of(tmp_path / "one"), model_of(tmp_path / "two"))
    named = [[row.get("suspected") for row in rows_of(tmp_path / name)] for name in ("one", "two")]
    assert named[0] == named[1]


@pytest.mark.parametrize(("method", "rule"), [("fedsparsify", "centered_clip"), ("fedsparsify", "fltrust")])
def test_a_stop_after_every_exchange_changes_nothing(method, rule, tmp_path, shards):
    """What a rule keeps between rounds is in the checkpoint."""
    study, folder = eight(method, rule), tmp_path / "stopped"
    play(study, tmp_path / "one", shards)
    resumed(study, folder, shards)
    assert same(model_of(tmp_path / "one"), model_of(folder))


RULES = [
    *(("fedavg", rule) for rule in ("median", "trimmed", "krum", "multikrum", "clip", "lasa", "deepsa")),
    ("fedsparsify_local", "multikrum"), ("autoflip", "trimmed"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "rule"), RULES)
def test_rules_learn(method, rule, tmp_path, shards):
    """Three bright rows tell three classes apart; the loss of the initial weights is about log 3."""
    summary = play(eight(method, rule, rounds=6, training={"epochs": 3, "batch_size": 8, "lr": 0.2}), tmp_path, shards)
    assert summary["final"]["loss"] < 0.9


def test_the_median_of_a_run_is_that_of_its_clients(tmp_path, shards):
    """One round of FedAvg: each weight is numpy's median of what eight clients trained from the common start."""
    study = eight("fedavg", "median", rounds=1)
    play(study, tmp_path / "run", shards)
    state, view = lab(shards, study)
    ask = study.build_method().plan(state)
    trained = [study.build_method().respond(ask, view(k)).tensors for k in range(8)]
    for name, tensor in model_of(tmp_path / "run").items():
        middle = np.median(np.stack([t[name].numpy() for t in trained]), axis=0)
        np.testing.assert_allclose(tensor.numpy(), middle, rtol=1e-5, atol=1e-7)


def test_with_no_one_hostile_a_run_is_that_of_the_mean(tmp_path, shards):
    """Clients have equally many rows: multikrum with f = 0 is FedAvg, up to the last bits of sums."""
    play(eight("fedavg", "multikrum", "aggregator.hostile=0"), tmp_path / "robust", shards)
    play(eight("fedavg", "mean"), tmp_path / "mean", shards)
    one, other = model_of(tmp_path / "robust"), model_of(tmp_path / "mean")
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_servers_step_stays_when_a_rule_is_chosen():
    """AutoFLIP has server momentum with shadow weights; a rule replaces its mean, and the step can be set."""
    made = build(AutoFLIP, {"aggregator": "median"})
    assert made.aggregator == Median(then=ServerMomentum(beta=0.9, pruned="shadow"))
    assert made.aggregator.pruned == "shadow"
    assert build(AutoFLIP, flatten(made)) == made
    assert build(AutoFLIP, {"aggregator": "median", "aggregator.then.beta": 0.5}).aggregator.then.beta == 0.5
    assert build(FedAvg, {"aggregator": "krum", "aggregator.then": "fed_adam"}).aggregator.then == FedAdam()
    with pytest.raises(ConfigError, match=r"aggregator\.then = krum: a rule is followed by a server's step"):
        build(FedAvg, {"aggregator": "median", "aggregator.then": "krum"})


def test_clipping_goes_with_the_largest_changes_alone(tmp_path, shards):
    study = eight("fedavg", "clip", "wire.replies=topk", rounds=6, training={"epochs": 3, "batch_size": 8, "lr": 0.2})
    assert play(study, tmp_path, shards)["final"]["loss"] < 1.1


def test_momentum_goes_on_from_the_robust_update():
    """W = 10, sent and trained to 0, 4 and 9: the median update is -6; v = .1 * 6 and W = 9.4."""
    rule = Median(then=ServerMomentum(beta=0.9))
    move = combined(rule, [[-10.0], [-6.0], [-1.0]], start=10.0)
    weights, memory = rule.step({"w": torch.tensor([10.0])}, dict(move), mask=None, memory={})
    assert weights["w"].item() == pytest.approx(9.4)
    assert memory["velocity"]["w"].item() == pytest.approx(0.6)


@pytest.mark.parametrize("pruned", ["zero", "shadow"])
def test_what_the_server_keeps_of_pruned_weights(pruned):
    """What was sent is W under the mask: the kept weight moves from 8 by the median; the pruned one is 0, or stays."""
    rule = Median(then=Mean(pruned=pruned))
    mask = {"w": torch.tensor([True, False])}
    weights, _ = rule.step({"w": torch.tensor([8.0, 8.0])}, {"w": torch.tensor([1.0, 0.0])}, mask=mask, memory={})
    assert weights["w"].tolist() == [9.0, 0.0 if pruned == "zero" else 8.0]


REFUSED = {
    ("fedavg", "mask_filter"): (
        "aggregator mask_filter does not go with FedAvg, where all clients hold one mask: it compares masks that "
        "clients made themselves; median, trimmed"
    ),
    ("fedsparsify_local", "krum"): (
        "aggregator krum does not go with FedSparsifyLocal, where clients answer under masks of their own: .*; median, "
        "trimmed, multikrum, clip, centered_clip or mask_filter would go"
    ),
    ("autoflip", "fltrust"): (
        "aggregator Fltrust trains at the server under the mask of the next round, and criterion Deviation asks clients"
    ),
    ("fedavg", "krum", "aggregator.hostile=0.4"): (
        r"aggregator krum needs 11 replies, and a round asks 8 clients: raise participation or data\.clients, or "
        r"assume fewer of them to be hostile \(aggregator\.hostile\)"
    ),
    ("fedavg", "median", "participation=0.25"): "aggregator median needs 3 replies, and a round asks 2 clients",
    ("fedsparsify", "median", "wire.replies=topk"): (
        "wire.replies = topk: what does not come would be a vote for no change in a rule that compares .*; use "
        "updates, or aggregator = clip"
    ),
    ("fedavg", "dnc", "aggregator.remove=4"): "aggregator dnc needs 9 replies, and a round asks 8 clients",
}


@pytest.mark.parametrize("given", REFUSED)
def test_what_cannot_work_is_refused_before_anybody_trains(given, tmp_path, shards):
    with pytest.raises(ConfigError, match=REFUSED[given]):
        play(eight(*given), tmp_path, shards)
    assert not (tmp_path / "rounds.jsonl").exists()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("aggregator=trimmd", "unknown value of aggregator 'trimmd': did you mean 'trimmed'"),
        ("aggregator.hostile=0.5", r"aggregator\.hostile = 0\.5 must be in \[0, 0\.5\)"),
        (
            "aggregator.hostil=0.1",
            r"unknown option of Trimmed 'aggregator\.hostil': did you mean 'aggregator\.hostile'",
        ),
    ],
)
def test_wrong_settings_are_one_line(setting, says):
    settings = [setting] if setting.startswith("aggregator=") else ["aggregator=trimmed", setting]
    with pytest.raises(ConfigError, match=says):
        small("fedavg", *settings)


def test_trust_needs_rows_at_the_server(tmp_path):
    folder = tiny_shards(tmp_path / "shards", clients=8, public=False)
    with pytest.raises(ConfigError, match=r"aggregator fltrust trains at the server: give it rows with data\.public"):
        play(eight("fedavg", "fltrust"), tmp_path / "run", folder)
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_the_server_trains_from_what_clients_get(tmp_path, shards):
    """FLTrust's own update is that of a client with those rows, from the weights and under the mask of the round."""
    study = eight("fedsparsify", "fltrust")
    (state, view), method = lab(shards, study), study.build_method()
    server_view = replace(view(0), id=SERVER)
    after, processed = method.refine(state, server_view)
    ask = method.plan(after)
    trained, done = server_view.train(ask.message.tensors, ask.message.mask, round_=1)
    assert processed == done.processed > 0
    for name, own in after.memory["trusted"].items():
        assert torch.equal(own, trained[name] - ask.message.tensors[name])


def test_too_few_replies_are_below_quorum(tmp_path, shards):
    """Two of eight fail: krum with f = 2 of 8 needs 7, with 6 replies and f = 2 again 7; after three tries it ends."""

    class Silent(Wrapped):
        def exchange(self, requests, deadline=None):
            for who, reply in self.inner.exchange(requests, deadline):
                yield who, Failure(who, "it is gone", sent=True) if who in (2, 5) else reply

    with pytest.raises(NobodyTrainedError, match="fewer than the 7 replies that the robust rule needs .*it is gone"):
        play(eight("fedavg", "krum"), tmp_path, shards, open_engine=Silent.open)
    rows = rows_of(tmp_path)
    assert [row["below_quorum"] for row in rows] == [7, 7, 7]


def test_votes_of_unlike_masks_do_not_count(tmp_path):
    """Four voters keep the first two weights, and two the others: their masks are unlike, and neither counts."""
    votes = [{"w": torch.tensor([True, True, False, False])}] * 4 + [
        {"w": torch.tensor([False, False, True, True])}
    ] * 2
    specs, before = {"w": Spec((4,))}, {"w": torch.ones(4)}
    state = State(Setting(0, 5, 6, 1.0, Layout({"w": "weight"}), specs), 0, before)
    rule, consensus = MaskFilter(), Majority()
    expects = Expected(specs, mask="required")
    asked = {"mean": rule.reduction(masked=True), **rule.ballot(consensus.ballot)}
    replies = [(k, Message({"w": votes[k]["w"].float()}, votes[k], {"samples": 5})) for k in range(6)]
    reduced = reduce(Ask("train", 1, tuple(range(6)), Message(before), expects, asked), state, replies)
    assert reduced["votes"]["w"].tolist() == [4, 4, 0, 0]
    assert reduced.counted("votes") == (0, 1, 2, 3)
    assert list(reduced.suspected) == [4, 5]
    assert consensus.vote(state, reduced, 2)["w"].tolist() == [True, True, False, False]


def test_records_name_suspects_apart_from_those_left_out(tmp_path, shards):
    summary = play(eight("fedavg", "multikrum", rounds=1), tmp_path, shards)
    (row,) = rows_of(tmp_path)
    assert row["left_out"] == []
    assert summary["suspected"] == {str(entry["client"]): 1 for entry in row["suspected"]}
    assert "; suspected 2 clients (" in (tmp_path / "run.log").read_text()
    assert len(row["suspected"]) == 2
    for entry in row["suspected"]:
        assert set(entry) == {"client", "reason"}
        assert entry["reason"].startswith("multikrum: its score is ")


# ---- slices and personal masks


@pytest.mark.parametrize(("method", "rule"), [("heterofl", "median"), ("subfedavg", "multikrum")])
def test_rules_serve_slices_and_personal_masks(method, rule, tmp_path, shards):
    """Nothing is lost where too few hold a weight: it has its first value, or one that some clients trained."""
    summary = play(eight(method, rule, training={"epochs": 2, "batch_size": 8, "lr": 0.2}), tmp_path, shards)
    assert summary["final"]["loss"] < 1.1
    assert all(bool(t.isfinite().all()) for t in model_of(tmp_path).values())


def test_the_median_of_slices_is_that_of_their_holders(tmp_path, shards):
    """HeteroFL, one round: at each weight numpy's median over the clients whose slice has it, or the first value."""
    study = eight("heterofl", "median", rounds=1)
    play(study, tmp_path, shards)
    (state, view), method = lab(shards, study), study.build_method()
    ask = method.plan(state)
    replies = []
    for k in range(8):
        tensors, mask = ask.request(k)
        replies.append(method.respond(replace(ask, message=Message(tensors, mask), slices=None), view(k)))
    for name, tensor in model_of(tmp_path).items():
        first = state.weights[name].numpy()
        trained = np.stack([r.tensors[name].numpy() for r in replies])
        held = np.stack([np.broadcast_to(r.mask.get(name, np.True_), first.shape) for r in replies])
        for place in np.ndindex(first.shape):
            own = trained[(slice(None), *place)][held[(slice(None), *place)]]
            expected = np.median(own) if len(own) >= 3 else first[place]
            assert tensor.numpy()[place] == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("heterofl", "krum"), "aggregator krum does not go with HeteroFL, where clients are sent different parts"),
        (("heterofl", "dnc"), "clients with different parts differ most by their parts; median"),
        (("subfedavg", "fltrust"), "aggregator Fltrust trains at the server before each round, and SubFedAvg does not"),
        (
            ("ist", "median"),
            "aggregator Median moves what 3 clients hold, and of 8 clients 1 hold a unit .*: set parts = 2 or fewer",
        ),
        (
            ("frl", "median"),
            "frl has no aggregator: it merges replies in a way of its own; autoflip, .*fedavg, .*have one",
        ),
    ],
)
def test_what_does_not_merge_parts_is_refused(given, says, tmp_path, shards):
    with pytest.raises(ConfigError, match=says):
        play(eight(*given), tmp_path, shards)


def test_the_new_slot_does_not_rename_runs_of_before():
    """The hashes of studies as they were before the methods had the slot."""
    before = {"heterofl": "eaa899fa", "subfedavg": "3609d785", "fjord": "3eeea9b6", "ist": "4160f17e"}
    assert {name: parse_study({"method": name}).hash() for name in before} == before
    assert parse_study({"method": "ist", "options": {"aggregator": "median"}}).hash() != before["ist"]
    changed = {"method": "ist", "options": {"aggregator": "mean", "aggregator.pruned": "shadow"}}
    assert parse_study(changed).hash() != before["ist"]


# ---- DeepSA


def test_reliable_and_corrupted_uploads_are_told_apart():
    """Ten alike, and one of each corruption: negated, ten times and a hundredth as long; the ten weigh most."""
    ratios = torch.tensor([1.0] * 10 + [1.0, 10.0, 0.01], dtype=torch.float64)
    likeness = torch.tensor([0.8] * 10 + [-0.8, 0.8, 0.8], dtype=torch.float64)
    found = reliability(ratios, likeness).tolist()
    assert min(found[:10]) > 0.5
    assert max(found[10:]) < 0.5
    assert len({round(share, 12) for share in found[:10]}) == 1


def test_reliability_against_another_fit():
    """The model's loss is at its least: a step of any coefficient, either way, raises it; written with numpy."""
    draw = np.random.default_rng(0)
    ratios, likeness = np.exp(draw.normal(0, 0.2, 8)), draw.uniform(0.2, 0.9, 8)
    found = reliability(torch.tensor(ratios), torch.tensor(likeness)).numpy()
    logit = np.log(found / (1 - found))
    features = np.stack([np.ones(8), np.abs(np.log(ratios)), likeness], axis=1)
    coefficients = np.linalg.lstsq(features, logit, rcond=None)[0]
    half = math.sqrt(0.5)
    bad = [(ratios, -likeness), (ratios * 10, likeness), (ratios * 0.01, likeness), (ratios / half, likeness * half)]
    rows = np.concatenate([features, *[np.stack([np.ones(8), np.abs(np.log(r)), c], axis=1) for r, c in bad]])
    labels = np.array([1.0] * 8 + [0.0] * 32)
    shares = np.where(labels > 0, 0.5 / 8, 0.5 / 32)

    def loss(beta):
        logits = rows @ beta
        return (shares * (np.logaddexp(0, logits) - labels * logits)).sum() + 0.5 * 1e-2 * (beta**2).sum()

    least = loss(coefficients)
    assert np.abs(np.log(ratios)).max() < np.log(10)  # none is cut at a hundred, once it is ten times as long
    for place, step in itertools.product(range(3), (-0.05, 0.05)):
        assert loss(coefficients + step * np.eye(3)[place]) > least


def test_deepsa_weighs_liars_down():
    honest = cohort(20, clients=8)
    found = combined(Deepsa(), np.concatenate([honest, -honest[:2]]))
    assert set(found.suspected) == {8, 9}
    away = np.linalg.norm(found["w"].numpy() - honest.mean(axis=0))
    assert away < 0.2 * np.linalg.norm(honest.mean(axis=0))
