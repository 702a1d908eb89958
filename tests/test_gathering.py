"""Replies that workers reduce: the model and the records are those of replies that the server reads."""

import json
import os
import signal

import pytest
import torch

from helpers import Wrapped, model_of, rows_of, same, small, tiny_shards
from secateur import methods
from secateur.contract.fold import Node
from secateur.contract.reducer import Sums
from secateur.contract.reduction import Mean
from secateur.contract.reply import Reply
from secateur.errors import ConfigError, EngineError
from secateur.federation import client as participant
from secateur.federation import server
from secateur.federation.folder import reserve
from secateur.federation.parcels import Account, Parcel
from secateur.report import tables
from secateur.report.gather import gather
from secateur.study.runtime import Runtime


class Carried(Wrapped):
    """An engine that carries bytes, so that the server reads and reduces the replies."""


class Killing(Wrapped):
    """An engine a busy worker of which is killed once in each training."""

    @property
    def workers(self):
        return self.inner.workers

    def gather(self, tasks, job, deadline=None):
        kills = 1 if job.phase == "train" else 0
        for answer in self.inner.gather(tasks, job, deadline):
            yield answer
            busy = [w.process.pid for w in self.inner._workers if w.task is not None]
            for pid in busy[:kills]:
                os.kill(pid, signal.SIGKILL)
                kills -= 1


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("forty"), clients=40, rows=640)


def play(study, folder, shards, workers, open_engine=server.open_local):
    reserve(folder, study)
    server.resume(folder, Runtime(workers=workers), shards=shards, open_engine=open_engine)
    return model_of(folder), [{k: v for k, v in row.items() if "seconds" not in k} for row in rows_of(folder)]


OWN_MASKS = {"complement", "dispfl", "lotteryfl", "subfedavg", "fedpm", "fedsparsify_local"}
WIRES = {
    "fp32": (),
    "fp16": ("wire.values=fp16",),
    "int8 updates": ("wire.values=int8", "wire.replies=updates"),
    "topk": ("wire.replies=topk", "wire.topk=0.1"),
}


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("method", ["fedavg", "fedsparsify", "heterofl"])
def test_who_reduces_changes_no_bit_and_no_record(method, wire, forty, tmp_path):
    study = small(
        method, *WIRES[wire], rounds=3, participation=1.0,
        data={"clients": 40, "partition": "iid", "test_fraction": 0.2},
    )  # fmt: skip
    model, records = play(study, tmp_path / "carried", forty, 0, Carried.open)
    for workers in (0, 3):
        found = play(study, tmp_path / str(workers), forty, workers)
        assert same(found[0], model)
        assert found[1] == records


def test_a_worker_killed_in_every_exchange_changes_nothing(forty, tmp_path):
    study = small("fedsparsify", rounds=3, participation=1.0, data={"clients": 40, "partition": "iid"})
    model, records = play(study, tmp_path / "0", forty, 0)
    killed = play(study, tmp_path / "2", forty, 2, Killing.open)
    assert same(killed[0], model)
    assert killed[1] == records


@pytest.mark.parametrize("method", methods.names())
def test_computed_bytes_are_those_that_are_written(method, forty, tmp_path):
    data = {"clients": 40, "partition": "iid", "test_fraction": 0.2}
    studies = [
        small(method, f"wire.count={count}", "wire.packing=none", rounds=2, participation=0.3, data=data)
        for count in ("encoded", "computed")
    ]
    written = play(studies[0], tmp_path / "written", forty, 0)
    spared, unwritten = [], participant.unwritten

    def noted(*given, **more):
        spared.append(unwritten(*given, **more))
        return spared[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(participant, "unwritten", noted)
        computed = play(studies[1], tmp_path / "computed", forty, 0)
    assert len(spared) >= sum(len(row["clients"]) for row in computed[1])
    assert all(spared) or method in OWN_MASKS
    assert same(computed[0], written[0])
    for row, other in zip(computed[1], written[1], strict=True):
        assert (row.pop("bytes_count"), other.pop("bytes_count")) == ("computed", "encoded")
        assert row == other


def test_sampled_bytes_are_those_of_some_clients_and_the_mean_for_the_others(forty, tmp_path):
    data = {"clients": 40, "partition": "iid", "test_fraction": 0.0}
    encoded, sampled = (
        small("random", f"wire.count={count}", "wire.sample=0.25", rounds=2, participation=1.0, data=data)
        for count in ("encoded", "sampled")
    )
    model, every = play(encoded, tmp_path / "encoded", forty, 0)
    found, some = play(sampled, tmp_path / "sampled", forty, 2)
    assert same(found, model)
    assert play(sampled, tmp_path / "again", forty, 0)[1] == some
    for row, whole in zip(some, every, strict=True):
        assert row["bytes_down"] == whole["bytes_down"]
        ups = [up for _, _, up in whole["each"]]
        assert min(ups) <= row["sampled"]["least"] <= row["sampled"]["most"] <= max(ups)
        assert row["sampled"]["written"] == 10
        mean = sum(up for _, _, up in row["each"]) / 40
        assert row["sampled"]["least"] <= mean <= row["sampled"]["most"]
        assert sum(row["up"].values()) == row["bytes_up"] == sum(up for _, _, up in row["each"])
        assert row["bytes_up"] == pytest.approx(whole["bytes_up"], rel=0.02)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("wire.count=computed",), "wire.count = computed: packed sizes depend on the values; set wire.packing=none"),
        (("wire.count=computed", "wire.values=fp16"), "wire.count = computed: what is rounded"),
        (("wire.count=sampled", "wire.replies=topk"), "wire.count = sampled: what is rounded, or sent in part"),
        (("wire.count=sampled", "wire.sample=0"), "wire.sample = 0"),
    ],
)
def test_a_count_that_cannot_be_had_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        small("fedavg", *settings)


def test_kinds_of_bytes_are_told_and_never_stand_side_by_side(forty, tmp_path):
    data = {"clients": 40, "partition": "iid", "test_fraction": 0.2}
    for count in ("encoded", "computed"):
        study = small("random", f"wire.count={count}", "wire.packing=none", rounds=1, participation=0.1, data=data)
        play(study, tmp_path / count, forty, 0)
    summary = json.loads((tmp_path / "computed" / "summary.json").read_text())
    told = "bytes of replies are computed: exact, from names, shapes and the masks that both sides hold"
    assert summary["bytes_count"] == "computed"
    assert any(remark.startswith(told) for remark in summary["remarks"])
    _, lines, _, _ = gather([tmp_path / "computed"])
    assert told.capitalize() in tables.note(lines)
    assert "Bytes" not in tables.note(gather([tmp_path / "encoded"]).lines)
    with pytest.raises(ConfigError, match=r"bytes are computed in .*, encoded in .*: figures of diff"):
        gather([tmp_path / "computed", tmp_path / "encoded"])


def test_who_carries_bytes_counts_them(forty, tmp_path):
    study = small("fedavg", "wire.count=sampled", data={"clients": 40, "partition": "iid"})
    with pytest.raises(ConfigError, match="only a simulation knows sizes of what is not written"):
        play(study, tmp_path / "run", forty, 0, Carried.open)


def test_a_client_that_lost_its_state_is_sent_the_mask_again(forty, tmp_path):
    """As after a restart without the clients' states: the ledger is that of replies that say so."""

    def forgetful(base):
        class Forgetful(base):
            def put(self, states):
                for client in (5, 6, 21):
                    states._memory.pop(client, None)
                    states._names.pop(client, None)

            def exchange(self, requests, deadline=None):
                self.put(self.inner.states)
                yield from self.inner.exchange(requests, deadline)

        class Gathers(Forgetful):
            @property
            def workers(self):
                return self.inner.workers

            def gather(self, tasks, job, deadline=None):
                if job.round == 3 and not getattr(self, "done", False):
                    self.done = True
                    self.put(self.inner.states)
                yield from self.inner.gather(tasks, job, deadline)

        return Forgetful, Gathers

    study = small("fedsparsify", rounds=4, participation=1.0, data={"clients": 40, "partition": "iid"})
    plain, _ = play(study, tmp_path / "plain", forty, 0)
    model, records = play(study, tmp_path / "gathered", forty, 2, forgetful(Wrapped)[1].open)
    assert same(model, plain)
    assert sum(row["bytes_down"] for row in records) > 0
    assert not any(row["left_out"] for row in records)


def test_a_parcel_comes_back_as_it_was_packed():
    draw = torch.Generator().manual_seed(0)
    kinds = {
        "f": torch.randn(3, 2, generator=draw), "d": torch.randn(4, generator=draw).double(), "i": torch.arange(5),
        "b": torch.rand(7, generator=draw) < 0.5, "none": torch.zeros(0), "one": torch.tensor(3.5),
        "last": torch.randn(2, 3, 4, 5, generator=draw).to(memory_format=torch.channels_last),
    }  # fmt: skip
    sums = Sums({"mean": {"sum w": kinds["d"], "weight": 0.1 + 0.2}, "grouped": {"1": {"sum": -0.0, "n": 2**60}}})
    account = Account(
        3, 100, {"values": 90, "framing": 10}, {"loss": 1e-300, "flag": True, "name": "x\u2028"}, own="ab"
    )
    reply = Reply(3, 17, kinds, {"f": kinds["f"] > 0}, account.scalars)
    parcel = Parcel([account, Account(4, failed="why")], [(Node(1, 2), sums), (Node(0, 12), None)], [reply], {7: True})
    read = Parcel.read([memoryview(bytearray(buffer)) for buffer in parcel.write()])
    assert (read.accounts, read.lacking, read.broken) == (parcel.accounts, parcel.lacking, "")
    (node, found), (other, nothing) = read.sums
    assert (node, other, nothing) == (Node(1, 2), Node(0, 12), None)
    assert torch.equal(found.of["mean"]["sum w"], kinds["d"])
    assert found.of["mean"]["weight"] == 0.1 + 0.2
    assert json.dumps(found.of["grouped"]) == json.dumps({"1": {"sum": -0.0, "n": 2**60}})
    (back,) = read.replies
    assert (back.client, back.rows, back.scalars) == (3, 17, account.scalars)
    assert all(torch.equal(back.tensors[n], t) and back.tensors[n].dtype == t.dtype for n, t in kinds.items())
    assert torch.equal(back.mask["f"], kinds["f"] > 0)


def test_what_cannot_travel_is_refused_by_name():
    with pytest.raises(EngineError, match="a reduction's accumulator holds set, which cannot travel"):
        Parcel(sums=[(Node(0, 0), Sums({"mean": {"who": {1, 2}}}))]).write()
    assert Mean().linear
