"""A run without a result: how many replies a round needs, whom it asks instead, and how it ends."""

import shutil
import sys
from functools import partial

import pytest
import torch

from helpers import INLINE, Wrapped, edited, model_of, play, rows_of, same, small, tiny_shards
from secateur.contract.state import Setting
from secateur.engines import Failure
from secateur.errors import ConfigError, DivergedError, NobodyTrainedError, NoResultError
from secateur.federation import server
from secateur.federation.folder import read_failure, reserve
from secateur.federation.quorum import check_learnt
from secateur.federation.records import by_reason, listing
from secateur.pruning.structure import Layout
from secateur.report.outcomes import outcome
from secateur.study.runtime import Runtime
from secateur.study.study import parse_study


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("eight"), clients=8)


SHY = '''"""FedAvg whose clients fail in some rounds.

Reference: none
"""
from dataclasses import dataclass
from secateur.methods.kit.composition import Composition


@dataclass(frozen=True)
class Shy(Composition):
    failing: str = ""
    since: int = 2
    until: int = 2

    def respond(self, ask, client):
        if self.since <= ask.round <= self.until and str(client.id) in self.failing.split():
            raise RuntimeError(f"client {client.id} is shy in round {ask.round}")
        return super().respond(ask, client)
'''


@pytest.fixture
def shy(tmp_path, monkeypatch):
    """Return a function that makes studies of eight clients, two a round, of which some fail in round 2."""
    (tmp_path / "their_shy.py").write_text(SHY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_shy", raising=False)

    def made(failing, *settings, **top):
        text = " ".join(map(str, failing))
        values = {"data": {"clients": 8, "partition": "iid"}, "participation": 0.25} | top
        return small("their_shy", f"failing={text}", *settings, **values)

    return made


def setting(clients=8, participation=0.25, attempt=0):
    return Setting(3, 4, clients, participation, Layout({}, []), {}, attempt)


def test_each_attempt_draws_other_clients_as_long_as_there_are_any():
    draws = [setting(attempt=attempt).cohort(2) for attempt in range(4)]
    assert draws[0] == setting().cohort(2)
    assert sorted(k for draw in draws for k in draw) == list(range(8))
    assert setting(attempt=4).cohort(2) == draws[0]
    first, second = (set(setting(participation=0.75, attempt=attempt).cohort(1)) for attempt in (0, 1))
    assert len(first) == len(second) == 6
    assert first | second == set(range(8))
    assert setting(participation=1.0, attempt=2).cohort(1) == tuple(range(8))
    assert {setting(attempt=1).cohort(round_) for round_ in range(1, 9)} != {draws[1]}


def test_a_round_without_replies_is_asked_again_of_others_with_the_same_bits_everywhere(tmp_path, shy, eight):
    first = small(participation=0.25, data={"clients": 8, "partition": "iid"})
    drawn = [Setting(first.seed, 4, 8, 0.25, Layout({}, []), {}, attempt).cohort(2) for attempt in (0, 1, 2)]
    study = shy(drawn[0] + drawn[1])
    whole = play(study, tmp_path / "whole", eight)
    rows = rows_of(tmp_path / "whole")
    assert [(row["round"], row.get("attempt", 0)) for row in rows] == [(1, 0), (2, 0), (2, 1), (2, 2), (3, 0), (4, 0)]
    assert [tuple(row["clients"]) for row in rows[1:4]] == drawn
    assert [row.get("below_quorum") for row in rows] == [None, 1, 1, None, None, None]
    assert ["accuracy" in row for row in rows] == [True, False, False, True, True, True]
    assert whole["phases"]["train"]["asks"] == 6
    (group,) = whole["reasons"]
    assert (group["requests"], group["clients"]) == (4, sorted(drawn[0] + drawn[1]))

    play(study, tmp_path / "workers", eight, runtime=Runtime(workers=2))
    for stop in (2, 3):  # killed after the first failed attempt, and after the second

        class Stop(Exception):
            pass

        def kill(event, seen, stop=stop, stopped=Stop):
            if event["event"] == "reply" and (event["round"], event["done"]) == (2, 2):
                seen.append(event)
                if len(seen) == stop:
                    raise stopped

        reserve(tmp_path / f"cut{stop}", study)
        with pytest.raises(Stop):
            server.resume(tmp_path / f"cut{stop}", INLINE, shards=eight, watch=partial(kill, seen=[]))
        server.resume(tmp_path / f"cut{stop}", INLINE, shards=eight)
    for other in ("workers", "cut2", "cut3"):
        assert same(model_of(tmp_path / other), model_of(tmp_path / "whole")), other
        bare = [
            [{k: v for k, v in r.items() if "seconds" not in k} for r in rows_of(tmp_path / o)]
            for o in (other, "whole")
        ]
        assert bare[0] == bare[1]


def test_three_times_in_a_row_end_the_run_and_a_resume_asks_further_clients(tmp_path, shy, eight):
    study = shy(range(8))
    with pytest.raises(
        NobodyTrainedError, match=r"'train' of round 2, .* 3 times in a row: 6 of 6 .*: client \d is shy"
    ):
        play(study, tmp_path / "run", eight)
    assert len(rows_of(tmp_path / "run")) == 4
    failure = read_failure(tmp_path / "run")
    assert "is shy in round 2" in failure["failed"]
    assert failure["reasons"][0]["requests"] == 6
    assert failure["phases"]["train"]["left_out"] == 6
    assert not {"summary.json", "model.safetensors"} & {path.name for path in (tmp_path / "run").iterdir()}
    with pytest.raises(NoResultError, match="is shy in round 2"):
        outcome(tmp_path / "run")
    with pytest.raises(NobodyTrainedError, match="is shy"):
        server.resume(tmp_path / "run", INLINE, shards=eight)
    assert [row.get("attempt", 0) for row in rows_of(tmp_path / "run")] == [0, 0, 1, 2, 3, 4, 5]
    text = (tmp_path / "their_shy.py").read_text().replace("raise RuntimeError", "print")
    sys.modules.pop("their_shy")
    (tmp_path / "their_shy.py").write_text(text)
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    summary = server.resume(tmp_path / "run", INLINE, shards=eight, accept=True)
    assert "from round 2 on the code of their_shy changed, and was accepted" in summary["remarks"]
    assert summary["final"]["accuracy"] > 0
    assert read_failure(tmp_path / "run") is None


def test_a_quorum_is_a_share_of_those_who_are_asked(tmp_path, shy, eight):
    study = shy([0, 1, 2, 3], participation=1.0)
    assert play(study, tmp_path / "one", eight)["reasons"][0]["requests"] == 4
    half = study.model_copy(update={"quorum": 0.5})
    play(half, tmp_path / "half", eight)
    assert same(model_of(tmp_path / "half"), model_of(tmp_path / "one"))
    with pytest.raises(
        NobodyTrainedError, match="fewer than the 5 replies of the quorum counted in phase 'train' of round 2"
    ):
        play(study.model_copy(update={"quorum": 0.51}), tmp_path / "more", eight)
    assert {row.get("below_quorum") for row in rows_of(tmp_path / "more")} == {None, 5}
    for wrong in (-0.1, 1.5):
        with pytest.raises(ConfigError, match="quorum"):
            parse_study({"quorum": wrong})


def test_replies_of_clients_without_rows_do_not_count(tmp_path, monkeypatch, shards):
    """The server cannot know: it believes a first claim."""
    monkeypatch.setattr(server.Books, "__init__", blind(server.Books.__init__))

    class Empty(Wrapped):
        def exchange(self, requests, deadline=None):
            for who, reply in self.inner.exchange(requests, deadline):
                yield who, edited(samples=0)(reply)

    with pytest.raises(
        NobodyTrainedError, match="9 of 9 requests failed because: it says that it has no training rows"
    ):
        play(small(), tmp_path / "run", shards, open_engine=Empty.open)


def blind(begin):
    def made(self, folder, specs, known=None, **more):
        del known
        begin(self, folder, specs, **more)

    return made


def test_explorers_that_are_asked_in_turn_are_passed_over_unless_all_fail(tmp_path, shards):
    class Gone(Wrapped):
        who = (1,)

        def exchange(self, requests, deadline=None):
            for client, request in requests:
                if client in self.who and b"explore" in request[:200]:
                    yield client, Failure(client, "gone")
                else:
                    yield from self.inner.exchange([(client, request)], deadline)

    study = small("autoflip", "criterion.explore.start=sequential")
    summary = play(study, tmp_path / "one", shards, open_engine=Gone.open)
    assert summary["phases"]["explore"]["asks"] == 4
    assert summary["left_out"] == {"1": 1}
    everyone = type("All", (Gone,), {"who": range(4)})
    with pytest.raises(NobodyTrainedError, match="phase 'explore'.* 4 of 4 requests failed because: gone"):
        play(study, tmp_path / "all", shards, open_engine=everyone.open)
    assert {row["phase"] for row in rows_of(tmp_path / "all")} == {"explore"}


def test_a_method_that_goes_on_for_ever_is_one_line(tmp_path, monkeypatch, shards):
    text = SHY.replace(
        "    def respond",
        "    def plan(self, state):\n"
        "        from secateur.methods.kit.rounds import train_ask\n"
        "        return train_ask(state, self.at or state.round + 1, state.mask)\n\n    def respond",
    ).replace("since: int", "at: int = 0\n    since: int")
    (tmp_path / "their_endless.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="method Shy: plan asks for round 5 of 4; it must return None once"):
        play(small("their_endless"), tmp_path / "run", shards)
    monkeypatch.setattr("secateur.federation.quorum._ASKS", 1)
    with pytest.raises(ConfigError, match=r"method Shy: plan has asked \d+ times within round 1; absorb must"):
        play(small("their_endless", "at=1"), tmp_path / "stuck", shards)


# ---- the trial before the first round

COUNTING = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, shape, outputs):
        super().__init__()
        self.a, self.n, self.o = nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, outputs)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.seen += 1
        return self.o(self.drop(torch.relu(self.n(self.a(x.flatten(1))))))
"""


@pytest.mark.parametrize("method", ["autoflip", "prunefl", "hidenseek", "dispfl"])
def test_the_trial_changes_no_bit_and_carries_no_byte(method, tmp_path, monkeypatch, shards):
    (tmp_path / "their_counting.py").write_text(COUNTING)
    monkeypatch.syspath_prepend(tmp_path)
    study, tried = small(method, model={"name": "their_counting:Net"}), []
    play(study, tmp_path / "tried", shards)
    monkeypatch.setattr("secateur.federation.trial.check", lambda *asked: tried.append(asked))
    play(study, tmp_path / "not", shards)
    assert len(tried) == 1
    assert same(model_of(tmp_path / "tried"), model_of(tmp_path / "not"))
    rows = [
        [{k: v for k, v in r.items() if "seconds" not in k} for r in rows_of(tmp_path / n)] for n in ("tried", "not")
    ]
    assert rows[0] == rows[1]


def test_one_client_that_cannot_be_trained_does_not_stop_the_others(tmp_path, shy, eight):
    summary = play(shy([0, 1], "since=0", "until=9", participation=1.0), tmp_path / "run", eight)
    assert summary["left_out"] == {"0": 4, "1": 4}


RAISES = COUNTING.replace("self.seen += 1", "if self.training: raise RuntimeError('no data for the auxiliary loss')")
EVALUATES = COUNTING.replace(
    "self.seen += 1", "if not self.training and len(x) > 5: raise RuntimeError('not to be evaluated')"
)
OWN = """
from secateur.learning.task import Classification
from secateur.methods.kit.criteria.measured import Statistic


class Infinite(Classification):
    def loss(self, output, target):
        return super().loss(output, target) + float("inf")


@dataclass(frozen=True)
class Raises(Statistic):
    def observe(self, client, weights, mask, round_):
        raise KeyError("no such layer")

    def score(self, w, statistic):
        return w
"""


class Late(Wrapped):
    def exchange(self, requests, deadline=None):
        yield from self.inner.exchange(requests, 1e-9)


class Refused(Wrapped):
    def exchange(self, requests, deadline=None):
        for who, reply in self.inner.exchange(requests, deadline):
            yield who, edited(samples=10**6)(reply)


LOCAL = server.open_local
CAUSES = {
    "the model raises": (RAISES, "fedavg", (), LOCAL, "RuntimeError: no data for the auxiliary loss"),
    "the model cannot be evaluated": (EVALUATES, "fedavg", (), LOCAL, "RuntimeError: not to be evaluated"),
    "a learning rate": (COUNTING, "fedavg", ("training.lr=1e30",), LOCAL, "its loss is nan"),
    "batches of one row": (
        COUNTING,
        "fedavg",
        ("training.batch_size=1",),
        LOCAL,
        "training.batch_size = 1: batch norm",
    ),
    "the statistic raises": (COUNTING, "oneshot", ("criterion=theirs:Raises",), LOCAL, "KeyError: 'no such layer'"),
    "the loss is no number": (COUNTING, "fedavg", ("data.task=theirs:Infinite",), LOCAL, "its loss is inf"),
    "nobody is in time": (COUNTING, "fedavg", (), Late.open, "9 of 9 requests failed because: no reply within"),
    "replies are refused": (COUNTING, "fedavg", (), Refused.open, "it says that it has 1000000 train rows, and has"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_a_study_that_nobody_can_train_ends_with_its_cause(cause, tmp_path, monkeypatch):
    net, method, settings, engine, told = CAUSES[cause]
    (tmp_path / "theirs.py").write_text(f"from dataclasses import dataclass\n{net}{OWN}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    study = small(method, *settings, model={"name": "theirs:Net"})
    shards = tiny_shards(tmp_path / "shards", task=study.data.task or "classification")
    with pytest.raises(NobodyTrainedError, match=told):
        play(study, tmp_path / "run", shards, open_engine=engine)
    failure = read_failure(tmp_path / "run")
    assert told in failure["failed"]
    assert failure["final"] == {}
    assert not {"summary.json", "model.safetensors"} & {path.name for path in (tmp_path / "run").iterdir()}


# ---- divergence


def test_a_model_whose_loss_is_beyond_all_bounds_is_no_result():
    def never():
        raise AssertionError

    fine = {"w": torch.ones(2), "steps": torch.tensor([3])}
    check_learnt({"loss": 99.0}, fine, never)
    check_learnt({}, fine, never)
    check_learnt({"loss": 150.0}, fine, lambda: 0.2)  # 750 times
    check_learnt({"loss": 1e9}, fine, lambda: float("nan"))
    for final, model, told in (
        ({"loss": 0.1}, {"w": torch.tensor([1.0, torch.nan])}, "tensor 'w' of its model holds NaN or infinity"),
        (
            {"loss": float("inf")},
            fine,
            "the loss of its model on test rows is inf, where the initial weights have 2; lower training.lr",
        ),
        ({"loss": 5000.0}, fine, "the loss of its model on test rows is 5e"),
    ):
        with pytest.raises(DivergedError, match=told):
            check_learnt(final, model, lambda: 2.0)


WILD = '''"""FedAvg whose last merge goes far astray.

Reference: none
"""
from dataclasses import dataclass, replace
from secateur.methods.kit.composition import Composition


@dataclass(frozen=True)
class Wild(Composition):
    factor: float = 1e6

    def absorb(self, state, reduced):
        state = super().absorb(state, reduced)
        last = state.round == state.setting.rounds
        return replace(state, weights={n: w * self.factor for n, w in state.weights.items()}) if last else state
'''


@pytest.mark.parametrize("factor", [1e6, 1e30])
def test_a_run_that_diverged_ends_as_an_error_and_again_when_it_is_resumed(factor, tmp_path, monkeypatch, shards):
    (tmp_path / "their_wild.py").write_text(WILD)
    monkeypatch.syspath_prepend(tmp_path)
    study = small("their_wild", f"factor={factor}")
    for attempt in (0, 1):
        with pytest.raises(DivergedError, match="the run diverged, and has no result: the loss of its model"):
            server.resume(tmp_path / "run", INLINE, shards=shards) if attempt else play(study, tmp_path / "run", shards)
    assert len(rows_of(tmp_path / "run")) == 4
    assert not {"summary.json", "model.safetensors"} & {path.name for path in (tmp_path / "run").iterdir()}
    with pytest.raises(NoResultError, match="diverged"):
        outcome(tmp_path / "run")


# ---- reasons and remarks


def test_reasons_that_differ_in_numbers_only_are_one():
    entries = [
        {"client": 4, "reason": "it says that it has 12 train rows, and has 7"},
        {"client": 9, "reason": "silent"},
        {"client": 2, "reason": "it says that it has -3 train rows, and has 1.5e3"},
        {"client": 4, "reason": "it says that it has 1 train rows, and has 7"},
        {"client": 1, "reason": "scalar 'loss' is inf"},
        {"client": 1, "reason": "scalar 'loss' is nan"},
    ]
    assert by_reason(entries) == [
        {"reason": "it says that it has 12 train rows, and has 7", "requests": 3, "clients": [2, 4]},
        {"reason": "scalar 'loss' is inf", "requests": 2, "clients": [1]},
        {"reason": "silent", "requests": 1, "clients": [9]},
    ]
    assert by_reason([]) == []
    assert listing([5]) == "client 5"
    assert listing(range(8), most=3) == "8 clients (0, 1, 2, ...)"


def test_layers_that_pruning_empties_are_told(tmp_path, shards):
    told = []
    study = small("fedsparsify", "schedule.sparsity=0.995")
    summary = play(study, tmp_path / "run", shards, watch=told.append)
    rows = rows_of(tmp_path / "run")
    empty = [[name for name, kept in row["layers"].items() if kept == 0] for row in rows]
    assert empty[-1]
    assert not empty[0]
    assert [row.get("emptied", []) for row in rows] == empty
    assert summary["final"]["emptied"] == empty[-1]
    assert [line for line in summary["remarks"] if "no weight left" in line] == [
        f"{name} has no weight left: nothing of its input comes through" for name in empty[-1]
    ]
