"""What stands between a message and the sum."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

import guard_of_theirs
from helpers import Wrapped, edited, model_of, noted, play, rows_of, same, small, tiny_shards
from secateur import guards
from secateur.contract.ask import Ask
from secateur.contract.guard import Guard, Passage
from secateur.contract.reduction import Keep, Mean
from secateur.contract.reply import Reply, Sent
from secateur.contract.state import Setting
from secateur.data.shards import Shards
from secateur.engines import Failure
from secateur.errors import ConfigError, EngineError, NobodyTrainedError, WireError
from secateur.federation.claims import Claims
from secateur.federation.gathering import build
from secateur.federation.server import Run
from secateur.guards.bounds import Bounds
from secateur.pruning.structure import Layout
from secateur.study.runtime import Runtime
from secateur.wire.codec import encode
from secateur.wire.head import context_of
from secateur.wire.message import Expected, Message
from secateur.wire.settings import Wire

SETTING = Setting(0, 5, 20, 1.0, Layout({"w": "weight"}), {})
SENT = Sent(SETTING, lambda: ({}, None))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def passage(values="fp32"):
    return Passage("train", 1, 0, SETTING, Wire(values=values))


def reply(value, rows=5):
    return Reply(0, rows, {"w": torch.tensor([0.0, value]), "n": torch.tensor([2**40])}, None, {})


def test_the_bounds_are_what_the_format_can_carry():
    """65504 is the largest half, 65520 the first number that rounds beyond it."""
    honest = reply(-65504.0)
    assert Bounds().arriving(honest, SENT, passage("fp16")) is honest
    for value in (65520.0, float("inf"), float("nan")):
        with pytest.raises(WireError, match="tensor 'w' has values beyond 65504"):
            Bounds().arriving(reply(value), SENT, passage("fp16"))
    assert Bounds().arriving(reply(3e38), SENT, passage())
    with pytest.raises(WireError, match="beyond 2 "):
        Bounds(largest=2.0).arriving(reply(2.5), SENT, passage())


def test_no_more_rows_are_believed_than_the_bounds_say():
    assert Bounds(rows=5).arriving(reply(1.0), SENT, passage())
    with pytest.raises(WireError, match="says that it has 6 rows; at most 5 are believed"):
        Bounds(rows=5).arriving(reply(1.0, rows=6), SENT, passage())


def test_a_guard_that_hides_single_replies_refuses_who_keeps_them():
    @dataclass(frozen=True)
    class Pads(Guard):
        sums_only = True

    ask = Ask("explore", 1, (0,), Message({}), Expected({}), {"mean": Mean(), "single": Keep()})
    with pytest.raises(
        ConfigError,
        match=r"guard Pads goes with sums alone, and phase 'explore' keeps single replies \(single = Keep\)",
    ):
        Pads().check(ask)
    Pads().check(replace(ask, reduce={"mean": Mean()}))


def test_a_pair_that_does_not_go_together_is_refused_before_anything_is_trained(tmp_path, shards):
    with pytest.raises(ConfigError, match="guard Theirs goes with sums alone"):
        play(small("dispfl", "guards.guard_of_theirs.secret=true"), tmp_path / "run", shards)
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_anybodys_guard_works_at_the_client_and_at_the_server(tmp_path, shards):
    """Theirs doubles at the client what it halves at the server: exact in binary, so that nothing changes."""
    guard_of_theirs.CALLS.clear()
    play(small("fedavg", "guards.guard_of_theirs.factor=2.0"), tmp_path / "guarded", shards)
    play(small("fedavg"), tmp_path / "plain", shards)
    assert same(model_of(tmp_path / "guarded"), model_of(tmp_path / "plain"))
    assert guard_of_theirs.CALLS.count("leaving") == guard_of_theirs.CALLS.count("arriving") == 4 * 3
    play(small("fedavg", "guards.guard_of_theirs.back=1.0"), tmp_path / "twice", shards)
    assert not same(model_of(tmp_path / "twice"), model_of(tmp_path / "plain"))


def test_guards_are_found_by_name_and_anybodys_by_module():
    assert "bounds" in guards.names()
    assert guards.find("bounds") is Bounds
    assert guards.find("guard_of_theirs") is guard_of_theirs.Theirs
    with pytest.raises(ConfigError, match="unknown guard 'bouns'.*bounds"):
        guards.find("bouns")
    with pytest.raises(ConfigError, match="must define exactly one frozen dataclass"):
        guards.find("toy_method")


@pytest.mark.parametrize("method", ["fedavg", "heterofl", "subfedavg", "fedsparsify", "feddip"])
def test_both_sides_of_a_guard_see_the_same_request(method, tmp_path, shards):
    guard_of_theirs.SENT.update(leaving={}, arriving={})
    play(small(method, "guards.guard_of_theirs.factor=2.0"), tmp_path, shards)
    pairs = guard_of_theirs.SENT
    assert len(pairs["leaving"]) >= 12
    assert pairs["leaving"] == pairs["arriving"]


def test_what_guards_make_of_a_reply_is_finite_or_costs_its_sender(tmp_path, shards):
    with pytest.raises(NobodyTrainedError, match="what the guards made of it holds NaN or infinity"):
        play(small("fedavg", "guards.guard_of_theirs.back=1e300"), tmp_path, shards)


class Liar(Wrapped):
    """Client 1 says something else of itself from some exchange on; or, with ``change`` None, nothing at all."""

    change, since = None, 0

    def exchange(self, requests, deadline=None):
        self.count = getattr(self, "count", 0) + 1
        for client, answer in self.inner.exchange(requests, deadline):
            if client != 1 or isinstance(answer, Failure) or self.count <= self.since:
                yield client, answer
            else:
                yield client, Failure(1, "silent") if self.change is None else self.change(answer)


def lying(**more):
    return type("Lying", (Liar,), {k: staticmethod(v) if callable(v) else v for k, v in more.items()}).open


@pytest.mark.parametrize("rows", [2**40, 10**6, 10_000, 17, 0])
def test_in_simulation_the_server_knows_how_many_rows_a_client_has(rows, tmp_path, shards):
    study = small(participation=1.0)
    play(study, tmp_path / "lied", shards, open_engine=lying(change=edited(samples=rows)))
    play(study, tmp_path / "silent", shards, open_engine=lying())
    assert same(model_of(tmp_path / "lied"), model_of(tmp_path / "silent"))
    reasons = {entry["reason"] for row in rows_of(tmp_path / "lied") for entry in row["left_out"]}
    assert all("rows" in reason or "samples" in reason for reason in reasons)


def test_elsewhere_a_clients_first_word_counts():
    claims = Claims()
    claims.check(3, "train", 50)
    claims.check(3, "train", 50)
    claims.check(3, "test", 7)
    claims.check(4, "train", 51)
    with pytest.raises(WireError, match="says that it has 51 train rows, and said 50 when it was first heard"):
        claims.check(3, "train", 51)


def test_a_claim_that_the_bounds_refuse_is_not_what_counts_later(tmp_path, shards):
    """Client 1 says too much once, the truth ever after: it is out for one round and not for good."""
    study = small("fedavg", "guards.bounds.rows=100", participation=1.0)
    lie = edited(samples=101)

    class Once(Liar):
        def exchange(self, requests, deadline=None):
            self.count = getattr(self, "count", 0) + 1
            for client, answer in self.inner.exchange(requests, deadline):
                yield client, lie(answer) if client == 1 and self.count == 1 else answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shards, "empty", True)  # as where rows lie with the clients: the server knows none of them
        play(study, tmp_path / "run", shards, open_engine=Once.open)
    left = [[entry["client"] for entry in row["left_out"]] for row in rows_of(tmp_path / "run")]
    assert left == [[1], [], [], []]


def test_an_fp16_study_takes_no_other_format_and_no_value_beyond_it(tmp_path, shards):
    """A reply in fp32 of 1e7 used to end the server at its next request, and every resume after it."""
    study = small("fedavg", "wire.values=fp16", participation=1.0)

    class Wide(Wrapped):
        def exchange(self, requests, deadline=None):
            asked = {}

            for client, answer in self.inner.exchange(noted(requests, asked), deadline):
                if client == 1:
                    specs = Run(study, Runtime(workers=0), tmp_path / "attacked", shards).setting.specs
                    huge = {n: torch.full(s.shape, 1e7) for n, s in specs.items()}
                    scalars = {"samples": 18, "processed": 18, "loss": 1.0, "seconds": 0.1, "measured": 0}
                    yield client, encode(Message(huge, None, scalars), template=specs, context=context_of(asked[1]))
                else:
                    yield client, answer

    summary = play(study, tmp_path / "attacked", shards, open_engine=Wide.open)
    assert set(summary["left_out"]) == {"1"}
    reasons = {e["reason"] for row in rows_of(tmp_path / "attacked") for e in row["left_out"]}
    assert reasons == {"values come as fp32, and were asked for as fp16"}


def test_replies_come_once(tmp_path, shards):
    run = Run(small(), Runtime(workers=0), tmp_path, shards)
    state = run.create()
    ask = run.method.plan(state)
    serve = partial(build, run.study.model_dump_json(), str(shards))
    with run.open_engine(serve, 4, run.runtime, tmp_path) as engine:
        exchange = run._exchange(ask, engine)
        assert len(list(exchange.replies())) == 3
        with pytest.raises(EngineError, match="read already: they come once"):
            list(exchange.replies())
