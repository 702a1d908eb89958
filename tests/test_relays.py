"""Relays: whatever their number, and whoever dies, the model and the records are those of a run without."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import Killing, KillingRelays, model_of, play, rows_of, same, small, tiny_shards
from secateur.contract.fold import nodes
from secateur.contract.reducer import Sums
from secateur.engines import Relaying, Task
from secateur.errors import ConfigError, EngineError, ModelError, NobodyTrainedError
from secateur.federation import server
from secateur.federation.intake import Job
from secateur.federation.opening import open_local
from secateur.federation.parcels import Account, Parcel
from secateur.federation.shares import pieces, shares
from secateur.report.gather import Subject
from secateur.report.page import subject_data
from secateur.report.terminal import comparison
from secateur.study.runtime import Runtime
from secateur.wire.message import Expected

FORTY = {"clients": 40, "partition": "iid", "test_fraction": 0.2}


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("forty"), clients=40, rows=640)


def records(folder):
    return [{k: v for k, v in row.items() if "seconds" not in k and "relayed" not in k} for row in rows_of(folder)]


class Stopped(KillingRelays):
    """An engine with relays, one of which never answers in the second round."""

    def deadly(self, tasks):
        self.rounds = getattr(self, "rounds", 0) + 1
        return super().deadly(tasks) if self.rounds == 2 else tasks

    def kill(self):
        (pid,) = [w.process.pid for w in self.inner._local._workers if w.task is not None][:1]
        os.kill(pid, signal.SIGSTOP)


class KillingBelow(Killing):
    """An engine with relays, a worker of one of which is killed in mid-round."""

    relays = KillingRelays.relays
    traffic = KillingRelays.traffic

    def kill(self):
        for relay in self.inner.pids():
            for pid in Path(f"/proc/{relay}/task/{relay}/children").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
                self.killed = getattr(self, "killed", 0) + 1
                return


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("fedsparsify", ()), ("autoflip", ()), ("heterofl", ()), ("fedavg", ("wire.replies=topk", "wire.topk=0.1")),
        ("fedavg", ("compute.together=4",)),
    ],
    ids=["sums", "single replies", "own parts", "top k", "stacks"],
)  # fmt: skip
def test_who_stands_between_changes_no_bit_and_no_record(method, settings, forty, tmp_path):
    study = small(method, *settings, rounds=2, participation=1.0, data=FORTY)
    play(study, tmp_path / "none", forty)
    killed = []

    def opened(*args, **more):
        killed.append(KillingBelow(open_local(*args, **more)))
        return killed[-1]

    play(study, tmp_path / "3", forty, runtime=Runtime(workers=3, relays=3), open_engine=opened)
    assert same(model_of(tmp_path / "3"), model_of(tmp_path / "none"))
    assert records(tmp_path / "3") == records(tmp_path / "none")
    assert settings == ("compute.together=4",) or killed[0].killed


def test_one_request_goes_to_each_relay_and_one_sum_comes_back(forty, tmp_path):
    """Three relays have 16, 16 and 8 of forty clients: three nodes of the tree."""
    study = small(
        "fedavg", rounds=2, participation=1.0, data=FORTY, model={"name": "mlp", "options": {"hidden": (200,)}}
    )
    play(study, tmp_path / "run", forty, runtime=Runtime(workers=0, relays=3))
    for row in rows_of(tmp_path / "run"):
        relayed = row["relayed"]
        assert (relayed["relays"], relayed["sums"], relayed["single"]) == (3, 3, 0)
        down, up = row["bytes_down"] / 40, row["bytes_up"] / 40  # of one client
        # with each request goes what becomes of the replies; sums are of twice the width, and of each client is said
        # what it sent
        # a relay that is slow to start leaves its share to one that has the request already
        assert any(n * down < relayed["down"] < n * down + 3 * 4096 for n in (1, 2, 3))
        assert 3 * 1.9 * up < relayed["up"] < 3 * 2 * up + 40 * 512 + 3 * 1024


def test_each_tier_stands_in_summary_table_and_page(forty, tmp_path):
    study = small("fedavg", rounds=2, participation=1.0, data=FORTY)
    summary = play(study, tmp_path / "run", forty, runtime=Runtime(workers=0, relays=3))
    rows = rows_of(tmp_path / "run")
    assert {way: summary["relayed"][way] for way in ("down", "up", "sums")} == {
        way: sum(row["relayed"][way] for row in rows) for way in ("down", "up", "sums")
    }
    table = comparison(summary, None)
    assert "bytes up, server and relays" in [row[""] for row in table.rows]
    drawn = subject_data(Subject("run", tmp_path / "run"))["figures"]
    (figure,) = [one for one in drawn if one["id"] == "relayed"]
    assert figure["alt"].endswith("relays sent 6 sums and 0 replies.")
    names = [trace["name"] for trace in figure["views"][0]["data"]]
    assert names == [f"{tier}, {way}" for tier in ("server and relays", "relays and clients") for way in ("down", "up")]


def test_what_is_no_sum_passes_as_it_is_and_the_ledger_says_so(forty, tmp_path):
    study = small("autoflip", rounds=2, participation=1.0, data=FORTY)
    play(study, tmp_path / "run", forty, runtime=Runtime(workers=0, relays=2))
    explored, *trained = rows_of(tmp_path / "run")
    assert (explored["relayed"]["sums"], explored["relayed"]["single"]) == (0, 40)
    assert all(row["relayed"]["single"] == 0 for row in trained)


def test_a_relay_that_never_answers_costs_its_clients_the_round_by_name(forty, tmp_path):
    study = small("fedavg", rounds=3, participation=1.0, data={**FORTY, "test_fraction": 0.0})
    play(study, tmp_path / "run", forty, runtime=Runtime(workers=0, relays=3, deadline=12.0), open_engine=Stopped.open)
    first, second, third = rows_of(tmp_path / "run")
    assert not first["left_out"]
    assert not third["left_out"]
    named = [entry["client"] for entry in second["left_out"]]
    assert named in (list(range(16)), list(range(16, 32)))
    assert {entry["reason"] for entry in second["left_out"]} == {"no reply within 12 s"}
    assert second["seconds"] < 12 + 8  # 2 of them on a machine that is idle


def test_a_run_goes_on_with_other_relays(forty, tmp_path):
    study = small("fedsparsify", rounds=4, participation=0.5, data=FORTY)
    play(study, tmp_path / "whole", forty)
    seen = []

    def watch(row):
        seen.append(row)
        if row["event"] == "row" and row["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(study, tmp_path / "run", forty, runtime=Runtime(workers=0, relays=2), watch=watch)
    server.resume(tmp_path / "run", Runtime(workers=0, relays=3), shards=forty)
    assert same(model_of(tmp_path / "run"), model_of(tmp_path / "whole"))
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_a_share_in_which_a_client_lost_its_state_is_asked_again(forty, tmp_path):
    class Forgetful(KillingRelays):
        def deadly(self, tasks):
            self.rounds = getattr(self, "rounds", 0) + 1
            if self.rounds == 4:
                self.inner.states._memory.pop(5, None)
                self.inner.states._names.pop(5, None)
            return tasks

    study = small("fedsparsify", rounds=4, participation=1.0, data={**FORTY, "test_fraction": 0.0})
    play(study, tmp_path / "none", forty)
    play(study, tmp_path / "run", forty, runtime=Runtime(workers=0, relays=3), open_engine=Forgetful.open)
    assert same(model_of(tmp_path / "run"), model_of(tmp_path / "none"))
    assert not any(row["left_out"] for row in rows_of(tmp_path / "run"))
    extra = [
        a["bytes_up"] - b["bytes_up"] for a, b in zip(*map(rows_of, (tmp_path / "run", tmp_path / "none")), strict=True)
    ]
    assert [size > 0 for size in extra] == [False, False, False, True]


def test_sums_leave_out_the_zeros_of_pruned_weights(forty, tmp_path):
    """At 90 % a sum has a tenth of the values, of twice the width, and a bit for each weight."""
    study = small(
        "fedsparsify", rounds=4, participation=1.0, data=FORTY,
        model={"name": "mlp", "options": {"hidden": (200,)}},
    )  # fmt: skip
    play(study, tmp_path / "run", forty, runtime=Runtime(workers=0, relays=3))
    row = rows_of(tmp_path / "run")[-1]
    assert row["sparsity"] == pytest.approx(0.9, abs=0.01)
    weights = sum(tensor.numel() for tensor in model_of(tmp_path / "run").values())
    assert row["relayed"]["up"] < 3 * (8 * row["kept"] + weights / 8) * 1.1 + 40 * 512 + 3 * 1024


@given(st.integers(0, 40), st.sampled_from([torch.float64, torch.float32, torch.int64, torch.bool]), st.integers(0, 9))
def test_a_thin_parcel_has_the_bits_of_a_whole_one(count, dtype, seed):
    draw = torch.Generator().manual_seed(seed)
    part = (torch.randint(-2, 3, (count,), generator=draw) * (torch.rand(count, generator=draw) < 0.3)).to(dtype)
    part = torch.where(part < 0, -0.0, part).to(dtype) if dtype.is_floating_point else part
    made = Parcel(sums=[(nodes(0, 1, 1).__next__(), Sums({"sum": {"w": part}}))]).write(thin=True)
    ((_, back),) = Parcel.read([memoryview(bytearray(buffer)) for buffer in made]).sums
    assert same(back.of["sum"], {"w": part})


# ---- the engine alone


class Accounts:
    """Says that each client answered; client 7 never does, and client 9 ends its process."""

    def __call__(self, client, request, state):
        return b"%d " % client + request, b"%d" % (int(state or b"0") + 1)

    def gather(self, job, first, asked):
        for client, _, _ in asked:
            if client == 7:
                time.sleep(60)
            if client == 9:
                os._exit(1)
        states = [b"%d" % (int(state or b"0") + 1) for _, _, state in asked]
        sums = [(node, Sums({})) for node in nodes(first, len(asked), job.total)]
        return Parcel([Account(client, 10) for client, _, _ in asked], sums).write(), states


def make_accounts():
    return Accounts()


def engine(folder, relays=2, workers=4, clients=8):
    return open_local(make_accounts, clients, Runtime(workers=workers, relays=relays), folder)


def job(total, **reduce):
    return Job("train", 1, Expected({}), False, False, True, {}, reduce, total)


def share(first, count):
    return Task(first, [(k, b"r") for k in range(first, first + count)])


def test_who_is_late_is_named_and_costs_its_neighbours_nothing(tmp_path):
    with engine(tmp_path) as running:
        assert isinstance(running, Relaying)
        assert len(list(running.exchange((k, b"r") for k in range(8)))) == 8  # processes are there from now on
        begun = time.monotonic()
        answers = list(running.gather([share(0, 4), share(4, 4)], job(8), deadline=6.0))
        assert time.monotonic() - begun < 7
        accounts = [account for answer in answers for account in Parcel.read(answer.made).accounts]
        assert {a.client: (a.failed != "", a.sent) for a in accounts if a.failed} == {7: (True, True)}
        assert sorted(a.client for a in accounts) == list(range(8))


def test_states_pass_and_replies_come_back_as_they_are(tmp_path):
    with engine(tmp_path, workers=0) as running:
        for count in (1, 2):
            replies = dict(running.exchange((k, b"r") for k in range(8)))
            assert replies == {k: b"%d r" % k for k in range(8)}
            assert [running.states.get(k) for k in range(8)] == [b"%d" % count] * 8
        told = running.traffic()
        assert told.down > 0
        assert told.up > 0
        assert (running.traffic().down, running.traffic().up) == (0, 0)


def test_a_client_that_ends_its_workers_is_left_out_alone(tmp_path):
    with engine(tmp_path, clients=12) as running:
        (answer,) = running.gather([share(8, 4)], job(12))
        failed = {a.client: a.failed for a in Parcel.read(answer.made).accounts if a.failed}
        assert failed == {9: "its worker process died 3 times (out of memory, or killed)"}


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads who is whose child")
def test_no_process_outlives_its_relay(tmp_path):
    with engine(tmp_path) as running:
        list(running.gather([share(0, 3), share(3, 3)], job(8)))
        below = [int(pid) for r in running.pids() for pid in Path(f"/proc/{r}/task/{r}/children").read_text().split()]
        assert len(below) in {2, 4}  # the first relay may have done both shares
        os.kill(running.pids()[0], signal.SIGKILL)
    end = time.monotonic() + 10
    while any(alive(pid) for pid in below) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in below)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_relays_that_cannot_serve_are_one_line(tmp_path):
    told = "a worker cannot serve: EngineError: .*: no model"
    for workers in (0, 2):
        runtime = Runtime(workers=workers, relays=2)
        with open_local(broken, 8, runtime, tmp_path) as running, pytest.raises(EngineError, match=told):
            list(running.gather([share(0, 4)], job(8)))


def broken():
    raise ModelError("a layer: no model")


def test_what_cannot_be_trained_is_refused_as_without_relays(forty, tmp_path):
    study = small("fedavg", rounds=1, data=FORTY, training={"lr": 1e30, "batch_size": 4})
    for runtime in (Runtime(workers=0), Runtime(workers=0, relays=2)):
        with pytest.raises(NobodyTrainedError, match="no first step of training can be taken"):
            play(study, tmp_path / str(runtime.relays), forty, runtime=runtime)


@given(st.integers(0, 300), st.integers(1, 9))
def test_shares_are_the_cohort_in_order_and_no_larger_than_a_third_above_an_even_one(total, relays):
    found = list(shares(total, relays))
    assert [place for first, count in found for place in range(first, first + count)] == list(range(total))
    assert len(found) <= relays
    assert all(count <= max(4 * total / (3 * relays), total / relays + 1) for _, count in found)


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 5))
def test_tasks_are_nodes_of_the_tree(first, count, workers):
    found = list(pieces(first, count, workers))
    assert [place for at, size in found for place in range(at, at + size)] == list(range(first, first + count))
    assert all(len(list(nodes(at, size, first + count))) == 1 for at, size in found)


@pytest.mark.parametrize("relays", [-1, 41])
def test_a_number_of_relays_that_cannot_be_is_refused_before_anything_is_written(relays, forty, tmp_path):
    with pytest.raises(ConfigError, match=f"relays = {relays}"):
        server.start(small(data=FORTY), Runtime(workers=0, relays=relays), tmp_path / "run", shards=forty)
