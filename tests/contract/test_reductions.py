"""What becomes of replies: by hand, against numpy, whatever order they come in."""

import functools
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.contract.ask import Ask
from secateur.contract.reducer import Reducer, reduce
from secateur.contract.reduction import Grouped, Keep, Mean, Moments, Scalars, Sum, masks_of
from secateur.contract.reply import Reply, Sent, Stack
from secateur.contract.spool import Spool
from secateur.contract.state import Setting, State
from secateur.errors import CheckpointError, ConfigError, EngineError
from secateur.pruning.structure import Layout
from secateur.wire.message import Expected, Message, Spec

SETTING = Setting(0, 5, 20, 1.0, Layout({"w": "weight"}), {"w": Spec((3,))})
STATE = State(SETTING, 0, {"w": torch.tensor([7.0, 8.0, 9.0])})
ANY = Expected({"w": Spec((3,))}, mask="optional")


def asked(reduce, clients=range(20), expects=ANY, **more):
    return Ask("train", 1, tuple(clients), Message(STATE.weights), expects, reduce, **more)


def message(values, rows=1, mask=None, **scalars):
    masked = None if mask is None else {"w": torch.tensor(mask)}
    return Message({"w": torch.tensor(values)}, masked, {"samples": rows, **scalars})


def found(reduction, *replies, **more):
    return reduce(asked({"x": reduction}, **more), STATE, enumerate(replies))["x"]


def test_a_mean_by_rows_and_by_clients():
    """(1 * 1 + 3 * 5) / 4 = 4; (1 + 5) / 2 = 3."""
    replies = message([1.0, 0.0, 0.0], 1), message([5.0, 0.0, 0.0], 3)
    assert found(Mean(), *replies)["w"].tolist() == [4.0, 0.0, 0.0]
    assert found(Mean(by="clients"), *replies)["w"].tolist() == [3.0, 0.0, 0.0]
    assert found(Mean()) == {}
    assert found(Mean(), message([1.0, 1.0, 1.0], 0)) == {}


def test_a_mean_over_holders_and_where_nobody_holds():
    """Both hold the first: (2 + 3 * 6) / 4 = 5; the second only client 1; the third nobody."""
    replies = message([2.0, 0.0, 0.0], 1, [True, False, False]), message([6.0, 4.0, 0.0], 3, [True, True, False])
    assert found(Mean(holders=masks_of), *replies)["w"].tolist() == [5.0, 4.0, 0.0]
    assert found(Mean(holders=masks_of, fallback="state"), *replies)["w"].tolist() == [5.0, 4.0, 9.0]


def test_a_holder_without_rows_does_not_blank_a_weight():
    replies = message([2.0, 2.0, 2.0], 0, [True, True, True]), message([4.0, 0.0, 0.0], 2, [True, False, False])
    assert found(Mean(holders=masks_of, fallback="state"), *replies)["w"].tolist() == [4.0, 8.0, 9.0]


def test_masks_are_counted_exactly():
    replies = message([0.0] * 3, 2, [True, True, False]), message([0.0] * 3, 5, [True, False, False])
    counts = found(Sum(masks_of), *replies)["w"]
    assert counts.tolist() == [2, 1, 0]
    assert counts.dtype == torch.int64
    assert found(Sum(masks_of, by="rows"), *replies)["w"].tolist() == [7, 2, 0]
    assert found(Sum(masks_of)) == {}


def ranks(reply, sent):
    del sent
    return {"w": reply.tensors["w"].long()}


def of_sent(reply, sent):
    return {"w": reply.tensors["w"] - sent.tensors["w"], "clients": torch.tensor(float(sent.setting.clients))}


def test_what_is_reduced_may_be_made_of_a_message_and_its_request():
    replies = message([2.0, 3.0, 1.0]), message([1.0, 2.0, 3.0])
    assert found(Sum(ranks), *replies)["w"].tolist() == [3, 5, 4]
    away = found(Mean(of_sent, by="clients"), *replies)
    assert away["w"].tolist() == [-5.5, -5.5, -7.0]
    assert away["clients"] == 20


def test_what_was_sent_is_a_clients_own():
    sliced = asked(
        {"x": Sum(of_sent)}, slices={0: {"w": torch.tensor([True, False, True])}, 1: {}}, own={1: {"w": torch.ones(3)}}
    )
    reduced = reduce(sliced, STATE, [(0, message([7.0, 1.0, 0.0])), (1, message([1.0, 1.0, 2.0]))])
    assert reduced["x"]["w"].tolist() == [0.0, 1.0, -8.0]  # 7 - 7 + 1 - 1, 1 - 0 + 1 - 1, 0 - 9 + 2 - 1


def test_moments_are_those_of_numpy():
    values, rows = np.random.default_rng(0).normal(3, 2, (9, 3)).astype(np.float32), np.arange(1, 10)
    replies = [message(v.tolist(), int(n)) for v, n in zip(values, rows, strict=True)]
    plain, weighted = found(Moments(), *replies), found(Moments(by="rows"), *replies)
    np.testing.assert_allclose(plain.mean["w"], values.astype(float).mean(0), rtol=1e-12)
    np.testing.assert_allclose(plain.variance["w"], values.astype(float).var(0), rtol=1e-9)
    repeated = np.repeat(values.astype(float), rows, axis=0)
    np.testing.assert_allclose(weighted.mean["w"], repeated.mean(0), rtol=1e-12)
    np.testing.assert_allclose(weighted.variance["w"], repeated.var(0), rtol=1e-9)
    assert (plain.weight, weighted.weight) == (9, 45)
    assert found(Moments()).weight == 0


def test_scalars_are_averaged():
    replies = message([0.0] * 3, 1, loss=2.0), message([0.0] * 3, 3, loss=4.0)
    assert found(Scalars("loss"), *replies) == 3.5
    assert found(Scalars("loss", by="clients"), *replies) == 3.0
    assert found(Scalars("loss")) is None


def test_classes_are_reduced_apart():
    replies = [message([float(k)] * 3, k + 1) for k in range(12)]
    grouped = found(Grouped(Mean(), {k: k % 3 for k in range(20)}), *replies[:11])
    for group in range(3):
        members = range(group, 11, 3)
        expected = sum(k * (k + 1) for k in members) / sum(k + 1 for k in members)
        assert grouped[group]["w"].tolist() == pytest.approx([expected] * 3)
    assert found(Grouped(Sum(), dict.fromkeys(range(20), 4)), *replies[:2])[4]["w"].tolist() == [1.0, 1.0, 1.0]


def by_fours(values, rows):
    """Add up in float64 as the page on reductions says, in numpy: four neighbours, then the fours, then theirs."""
    parts = [value.astype(np.float64) * float(row) for value, row in zip(values, rows, strict=True)]
    while len(parts) > 1:
        parts = [functools.reduce(np.add, parts[start : start + 4]) for start in range(0, len(parts), 4)]
    return (parts[0] / float(sum(rows))).astype(np.float32)


@given(st.integers(1, 70), st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_no_order_of_arrival_changes_a_bit(count, seed, order):
    draw = np.random.default_rng(seed)
    values = (draw.normal(size=(count, 3)) * 10.0 ** draw.integers(-6, 6, (count, 3))).astype(np.float32)
    rows = draw.integers(1, 1000, count)
    replies = [Reply(k, int(rows[k]), {"w": torch.from_numpy(values[k])}, None, {}) for k in range(count)]
    order.shuffle(replies)
    reducer = Reducer(asked({"mean": Mean(), "single": Keep()}, range(count)), SETTING, Spool())
    for reply in replies:
        reducer.add(reply)
    reduced = reducer.finish(STATE)
    assert reduced["mean"]["w"].numpy().tobytes() == by_fours(values, rows).tobytes()
    assert reduced.clients == tuple(range(count)) == tuple(reduced["single"])
    assert reduced.rows == {k: int(rows[k]) for k in range(count)}


def test_who_failed_is_not_waited_for_and_who_is_silent_neither():
    reducer = Reducer(asked({"mean": Mean()}, range(9)), SETTING, Spool())
    for client in (8, 3, 1):
        reducer.add(Reply(client, 1, {"w": torch.full((3,), float(client))}, None, {"loss": client / 2}))
    reducer.skip(0)
    reduced = reducer.finish(STATE)
    assert reduced["mean"]["w"].tolist() == [4.0] * 3
    assert reduced.clients == (1, 3, 8)
    assert reduced.scalars == {1: {"loss": 0.5}, 3: {"loss": 1.5}, 8: {"loss": 4.0}}


def test_nobody_answers_twice_or_unasked():
    reducer = Reducer(asked({"mean": Mean()}, range(6)), SETTING, Spool())
    reply = Reply(1, 2, {"w": torch.ones(3)}, None, {})
    reducer.add(reply)
    for late in (replace(reply, rows=999), replace(reply, client=6)):
        with pytest.raises(EngineError, match=f"client {late.client} has answered 'train' already, or was not asked"):
            reducer.add(late)
    reduced = reducer.finish(STATE)
    assert reduced.rows == {1: 2}
    with pytest.raises(EngineError, match="answered 'train' already"):
        reducer.add(reply)
    with pytest.raises(KeyError, match="'sum' is no reduction of the ask for 'train'; it has 'mean'"):
        _ = reduced["sum"]


def test_a_late_first_client_keeps_only_its_own_block_waiting():
    reducer = Reducer(asked({"mean": Mean()}, range(40)), SETTING, Spool())
    for client in range(1, 40):
        reducer.add(Reply(client, 1, {"w": torch.ones(3)}, None, {}))
    # three replies of its four, the sums of three fours, the sums of two sixteens
    assert reducer.waiting == 3 + 3 + 2


@pytest.mark.parametrize(
    "reduction",
    [Mean(), Mean(holders=masks_of), Sum(masks_of), Moments(), Scalars("loss")],
    ids=["mean", "over holders", "counts", "moments", "scalars"],
)
def test_a_stack_is_its_replies_one_by_one(reduction):
    draw = torch.Generator().manual_seed(0)
    values, kept = torch.randn(5, 3, generator=draw), torch.rand(5, 3, generator=draw) < 0.5
    stack = Stack(range(5), [1, 2, 3, 4, 5], {"w": values}, {"w": kept}, [{"loss": k / 3} for k in range(5)])
    sent = [Sent(SETTING, lambda: (STATE.weights, None))] * 5
    together = reduction.add_stack(reduction.zero(Spool()), stack, sent)
    single = reduction.zero(Spool())
    for reply, request in zip(stack.replies(), sent, strict=True):
        single = reduction.add(single, reply, request)
    plain = [{n: t if isinstance(t, float) else t.tolist() for n, t in one.items()} for one in (together, single)]
    assert plain[0] == plain[1]


@pytest.mark.parametrize("budget", [10**9, 100, 0])
def test_single_replies_are_read_as_often_as_wanted_from_memory_and_disk(budget, tmp_path):
    draw = torch.Generator().manual_seed(1)
    tensors = [{"w": torch.randn(4, 5, generator=draw), "b": torch.arange(3) + k} for k in range(6)]
    replies = [(k, Message(t, None, {"samples": 1})) for k, t in enumerate(tensors)]
    with Spool(tmp_path, budget) as spool:
        kept = reduce(asked({"single": Keep()}, expects=Expected({})), STATE, replies, spool)["single"]
        assert bool(list(tmp_path.iterdir())) == (budget < 1000)
        for _ in range(2):
            assert list(kept) == list(range(6))
            for client, held in kept.items():
                assert list(held) == ["w", "b"]
                assert all(torch.equal(held[n], tensors[client][n]) for n in held)
            columns = {"w": [], "b": []}
            for name, part, values in kept.blocks(size=24):
                assert values.shape == (6, part.stop - part.start)
                assert values.numel() <= 24
                columns[name].append(values)
            whole = {n: torch.cat(parts, dim=1) for n, parts in columns.items()}
            assert torch.equal(whole["w"], torch.stack([t["w"].reshape(-1) for t in tensors]))
            assert torch.equal(whole["b"], torch.stack([t["b"] for t in tensors]))
    assert not list(tmp_path.iterdir())


def test_a_median_by_blocks_needs_no_model_at_a_time():
    """A robust rule over kept replies: the coordinate-wise median of numpy."""
    values = np.random.default_rng(3).normal(size=(7, 3)).astype(np.float32)
    kept = found(Keep(), *(message(v.tolist()) for v in values))
    median = torch.cat([block.median(dim=0).values for _, _, block in kept.blocks(size=7)])
    np.testing.assert_array_equal(median.numpy(), np.median(values, axis=0))


def test_a_full_disk_is_one_clear_line(tmp_path):
    with Spool(tmp_path / "nowhere", 0) as spool, pytest.raises(CheckpointError, match=r"cannot store replies in"):
        reduce(asked({"single": Keep()}), STATE, [(0, message([1.0] * 3))], spool)


def nested():
    def of(reply, sent):
        return reply.tensors

    return of


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Mean(of=lambda reply, sent: reply.tensors), "must stand in a module under a name"),
        (lambda: Sum(nested()), "must stand in a module under a name"),
        (lambda: Grouped(Keep(), {}), "Grouped of Keep: group a linear one"),
        (lambda: Mean(by="row"), "reduction Mean: by = 'row'; it can be rows or clients"),
        (lambda: Mean(fallback="zeros"), "reduction Mean: fallback = 'zeros'; it can be zero or state"),
        (lambda: Sum(by="row"), "reduction Sum: by = 'row'"),
        (lambda: Moments(by="row"), "reduction Moments: by = 'row'"),
        (lambda: Scalars("loss", by="row"), "reduction Scalars: by = 'row'"),
    ],
)
def test_a_reduction_that_others_could_not_do_is_refused_when_it_is_made(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


@pytest.mark.parametrize(
    ("reduction", "said"),
    [
        (Sum(masks_of), "reduction Sum is of masks, and the ask expects replies without any"),
        (Mean(holders=masks_of), "reduction Mean is of masks"),
        (Keep(masks_of), "reduction Keep is of masks"),
        (Grouped(Sum(masks_of), dict.fromkeys(range(20), 0)), "reduction Sum is of masks"),
        (Scalars("quality"), r"Scalars\('quality'\): replies have \['loss', 'samples'\]"),
        (Grouped(Mean(), {0: 1, 3: 1}), r"Grouped: clients \[1, 2, 4, 5, 6\] are asked and have no class"),
        (Mean, r"reduce\['x'\] is <class .*Mean'>, and no reduction"),
        ("mean", r"reduce\['x'\] is 'mean', and no reduction"),
        (None, "does not say what becomes of the replies"),
    ],
)
def test_a_reduction_that_does_not_fit_its_message_is_refused_before_anybody_is_asked(reduction, said):
    expects = Expected({"w": Spec((3,))}, scalars={"samples": int, "loss": float})
    with pytest.raises(ConfigError, match=said):
        Reducer(asked(None if reduction is None else {"x": reduction}, expects=expects), SETTING, Spool())


@dataclass(frozen=True)
class Largest(Mean):
    """Somebody's own: the largest of each entry; no sum."""

    linear = False
    reveals = "the largest of each entry"

    def add(self, accumulator, reply, sent):
        for name, value in reply.tensors.items():
            accumulator[name] = torch.maximum(accumulator[name], value) if name in accumulator else value
        return accumulator

    def merge(self, one, other):
        return {n: torch.maximum(one[n], part) if n in one else part for n, part in {**one, **other}.items()} | {
            n: torch.maximum(part, other[n]) for n, part in one.items() if n in other
        }

    def finish(self, accumulator, state):
        return accumulator


def test_anybodys_own_reduction_works_as_ours():
    values = [[float(random.Random(k).randrange(100))] * 3 for k in range(11)]
    assert found(Largest(), *map(message, values))["w"].tolist() == max(values)


def test_reductions_made_by_hand_count_whoever_is_there():
    reduced = reduce(
        replace(asked({"mean": Mean()}), clients=(5,)), STATE, [(2, message([2.0] * 3)), (9, message([4.0] * 3))]
    )
    assert reduced.clients == (2, 9)
    assert reduced["mean"]["w"].tolist() == [3.0] * 3
