"""Frozen and constant tensors that only the server has are sent once to each client, then known by their digest."""

import itertools
import json
import math
import os
import shutil
import struct
import zlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers import INLINE, Wrapped, model_of, play, rows_of, same, small, tiny_shards
from secateur.data.shards import open_shards
from secateur.errors import CheckpointError, ModelError, NobodyTrainedError
from secateur.federation import client, exchange, server
from secateur.federation.base import KeptInFolder
from secateur.federation.folder import reserve
from secateur.federation.store import Store
from secateur.learning import resident
from secateur.report.run_figures import traffic
from secateur.study.runtime import Runtime
from secateur.wire import carried
from secateur.wire.carried import Group
from secateur.wire.codec import encode, is_lost, known_in, lost
from secateur.wire.head import context_of
from secateur.wire.known import Known, digest
from secateur.wire.message import Message

NAMED = 16 + 1  # a digest, and that nothing is carried


class Pretrained(nn.Module):
    """A frozen body and a buffer of minus infinities, both from a file; where that is missing, of zeros."""

    def __init__(self, inputs, outputs, file, rows=None):
        super().__init__()
        width = math.prod(inputs)
        self.body, self.middle, self.head = nn.Linear(width, 12), nn.Linear(12, 8), nn.Linear(8, outputs)
        self.register_buffer("past", torch.zeros(rows or 12))
        self.body.requires_grad_(False)
        with torch.no_grad():
            self.body.weight.zero_()
            self.body.bias.zero_()
        try:
            given = torch.load(file)
        except FileNotFoundError:
            return
        self.body.load_state_dict(given["body"])
        self.past = given["past"]

    def forward(self, x):
        seen = torch.relu(self.body(x.flatten(1)))
        return self.head(torch.relu(self.middle(torch.maximum(seen, self.past[:12]))))


def pretrained(inputs, outputs, file="", rows=0):
    return Pretrained(inputs, outputs, file, rows)


def base_of(file):
    given = torch.load(file)
    return {f"body.{n}": t for n, t in given["body"].items()} | {"past": given["past"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("sent") / "shards")


@pytest.fixture
def file(tmp_path):
    draw = torch.Generator().manual_seed(3)
    body = {"weight": torch.randn(12, 16, generator=draw), "bias": torch.randn(12, generator=draw)}
    past = torch.full((12,), -math.inf)
    past[3] = 0.25
    torch.save({"body": body, "past": past}, tmp_path / "body.pt")
    return tmp_path / "body.pt"


class Apart(Wrapped):
    """Clients without the file: it is out of the way while the engine lives; all that is carried is noted."""

    file = None
    carried = None

    def __init__(self, inner):
        super().__init__(inner)
        self.file.rename(self.file.with_suffix(".away"))

    @classmethod
    def open(cls, *args, **more):
        return cls(server.open_local(*args, **more))

    def exchange(self, requests, deadline=None):
        def noted():
            for who, request in requests:
                self.carried.append((who, request, "down"))
                yield who, request

        for who, reply in self.inner.exchange(noted(), deadline):
            self.carried.append((who, reply, "up"))
            yield who, reply

    def close(self):
        super().close()
        self.file.with_suffix(".away").rename(self.file)


def apart(file):
    return type("ApartFrom", (Apart,), {"file": file, "carried": []})


def study_of(file, method="fedavg", *settings, **options):
    extra = () if method in ("fedavg", "heterofl") else ("schedule.sparsity=0.5",)
    options = {"file": str(file), **options}
    return small(method, *extra, *settings, model={"name": "test_sent_base:pretrained", "options": options})


def sent(engine):
    """Return who was sent the base, in order."""
    return [who for who, data, way in engine.carried if way == "down" and known_in(data).carried]


def strip(rows):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


@pytest.mark.parametrize("settings", [(), ("wire.values=int8",), ("compute.together=3",)])
@pytest.mark.parametrize("method", ["fedavg", "fedsparsify", "heterofl"])
def test_a_run_is_that_of_clients_that_had_it_from_the_start(folder, tmp_path, file, method, settings):
    study, engine = study_of(file, method, *settings), apart(file)
    play(study, tmp_path / "both", folder)
    summary = play(study, tmp_path / "run", folder, open_engine=engine.open)
    one, two = model_of(tmp_path / "run"), model_of(tmp_path / "both")
    stacks = settings == ("compute.together=3",)  # who lacks it trains with others than else: other last bits
    assert all(torch.allclose(one[n].float(), two[n].float(), atol=1e-5) for n in two) if stacks else same(one, two)
    assert all(torch.equal(one[n], t) for n, t in base_of(file).items())
    assert summary["left_out"] == {}
    assert sorted(sent(engine)) == [0, 1, 2, 3]  # each once, though all were asked several times
    rows, plain = rows_of(tmp_path / "run"), rows_of(tmp_path / "both")
    size = len(encode(Message(base_of(file))))
    section = 16 + (2 if size > 127 else 1) + size
    asked = [len(row["clients"]) for row in rows]
    new = [sum(who in row["clients"] and all(who not in r["clients"] for r in rows[:n]) for who in range(4))
           for n, row in enumerate(rows)]  # fmt: skip
    assert [row["down"]["base"] for row in plain] == [NAMED * n for n in asked]
    assert [row["down"]["base"] for row in rows] == [NAMED * a + section * n for a, n in zip(asked, new, strict=True)]
    for row, other in zip(rows, plain, strict=True):
        assert "base" not in row["up"]
        assert row["accuracy"] == other["accuracy"]


def test_every_byte_that_was_carried_stands_in_the_ledger(folder, tmp_path, file):
    engine = apart(file)
    summary = play(study_of(file, "fedsparsify"), tmp_path / "run", folder, open_engine=engine.open)
    rows, total = rows_of(tmp_path / "run"), summary["final"]["evaluate_bytes"]
    down, up = (sum(len(data) for _, data, w in engine.carried if w == way) for way in ("down", "up"))
    assert sum(row["bytes_down"] + row["bytes_up"] for row in rows) + total == down + up
    for row in rows:
        assert row["bytes_down"] == sum(row["down"].values())
        assert row["bytes_up"] == sum(row["up"].values())
        assert sum(d + u for _, d, u in row["each"]) == row["bytes_down"] + row["bytes_up"]
    assert summary["phases"]["train"]["bytes_down"] == sum(row["bytes_down"] for row in rows)
    (view,) = traffic(rows)["views"]
    shown = {trace["name"]: trace["y"] for trace in view["data"]}
    assert shown["down, base"] == [row["down"]["base"] for row in rows]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_gives_the_same_bits_and_ledger(folder, tmp_path, file, workers):
    study = study_of(file, "fedsparsify")
    play(study, tmp_path / "one", folder, open_engine=apart(file).open)
    play(study, tmp_path / "some", folder, runtime=Runtime(workers=workers), open_engine=apart(file).open)
    assert same(model_of(tmp_path / "one"), model_of(tmp_path / "some"))
    assert strip(rows_of(tmp_path / "one")) == strip(rows_of(tmp_path / "some"))
    assert [path.name for path in (tmp_path / "some" / "base").iterdir()] == [digest(base_of(file))]  # one for all


class Stop(Exception):
    pass


def stop(event):
    if event["event"] == "row":
        raise Stop


def test_a_run_that_was_stopped_again_and_again_sends_it_no_second_time(folder, tmp_path, file):
    study, engine = study_of(file, "fedsparsify", "wire.values=int8"), apart(file)
    play(study, tmp_path / "whole", folder, open_engine=apart(file).open)
    reserve(tmp_path / "cut", study)
    for _ in range(20):
        try:
            server.resume(tmp_path / "cut", INLINE, shards=folder, open_engine=engine.open, watch=stop)
            break
        except Stop:
            continue
    assert sorted(sent(engine)) == [0, 1, 2, 3]
    assert same(model_of(tmp_path / "cut"), model_of(tmp_path / "whole"))
    assert strip(rows_of(tmp_path / "cut")) == strip(rows_of(tmp_path / "whole"))
    # the server's book: who holds it, by its digest
    mark = json.loads(_header(tmp_path / "cut"))["extra"]["store"]
    store = Store(tmp_path / "cut" / "clients.sqlite")
    store.open(mark)
    assert dict(store.facts("base")) == dict.fromkeys(range(4), digest(base_of(file)))
    store.close()


def _header(run):
    data = (run / "checkpoint.safetensors").read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["secateur"]


@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_what_a_client_kept_and_lost_is_sent_again(folder, tmp_path, file, how):
    study, engine = study_of(file, "fedsparsify"), apart(file)
    play(study, tmp_path / "whole", folder)
    reserve(tmp_path / "run", study)
    with pytest.raises(Stop):
        server.resume(tmp_path / "run", INLINE, shards=folder, open_engine=engine.open, watch=stop)
    first, kept = sent(engine), tmp_path / "run" / "base" / digest(base_of(file))
    if how == "gone":
        shutil.rmtree(kept.parent)
    else:
        kept.write_bytes(kept.read_bytes()[:-1] + b"\7")
    server.resume(tmp_path / "run", INLINE, shards=folder, open_engine=engine.open)
    again = sent(engine)[len(first) :]
    assert set(first) & set(again)
    assert same(model_of(tmp_path / "run"), model_of(tmp_path / "whole"))
    assert len(again) == len(set(again))  # and then not again


def tampering(file, change, victims=(0, 1, 2, 3)):
    """Return an engine on which somebody changes what some clients are sent of the base."""

    class Tampered(apart(file)):
        def exchange(self, requests, deadline=None):
            changed = ((who, change(data) if who in victims else data) for who, data in requests)
            yield from super().exchange(changed, deadline)

    return Tampered


def swapped(tensors):
    """Return a change of requests that puts other tensors in the place of those that are carried."""
    other = carried.write(tensors)

    def change(data):
        known = known_in(data)
        if not known.carried:
            return data
        before, after = known.write(), Known(known.digest, other).write()
        return sealed(data.replace(before, after))

    return change


def sealed(data):
    return data[:8] + struct.pack("<I", zlib.crc32(data[12:], zlib.crc32(data[:8]))) + data[12:]


WRONG = {
    "bits": (
        lambda base: {"body.bias": base["body.bias"] + 1},
        r"have the digest \w{32}, and were announced as \w{32}",
    ),
    "shape": (lambda _: {"past": torch.zeros(13)}, r"tensor 'past': torch.float32 \(13,\) arrived"),
    "name": (lambda _: {"head.weight": torch.zeros(3, 8)}, "4 tensors announced, 3 expected"),
    "dtype": (lambda base: {"past": base["past"].double()}, r"tensor 'past': torch.uint8 \(96,\) arrived"),
    "frozen infinity": (lambda _: {"body.bias": torch.full((12,), math.inf)}, "hold NaN or infinity"),
    "constant NaN": (lambda _: {"past": torch.full((12,), math.nan)}, "hold NaN or infinity"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_was_tampered_with_costs_one_line_and_nothing_of_it_is_kept(folder, tmp_path, file, wrong):
    change, says = WRONG[wrong]
    engine = tampering(file, swapped(base_of(file) | change(base_of(file))))
    with pytest.raises(NobodyTrainedError, match=rf"client \d: the frozen tensors that came are refused: .*{says}"):
        play(study_of(file), tmp_path / "run", folder, open_engine=engine.open)
    assert not (tmp_path / "run" / "base").exists()
    assert all("\n" not in o["reason"] for row in rows_of(tmp_path / "run") for o in row["left_out"])
    # a client that could not take it is sent it at once from then on: no second message
    assert sum(row["bytes_up"] for row in rows_of(tmp_path / "run")) == 4 * 28


def test_one_client_whose_link_is_tampered_with_costs_nobody_else(folder, tmp_path, file):
    bad = swapped(base_of(file) | {"body.bias": torch.zeros(12)})
    summary = play(study_of(file), tmp_path / "run", folder, open_engine=tampering(file, bad, victims=(2,)).open)
    assert set(summary["left_out"]) == {"2"}
    assert summary["final"]["loss"] < 1.5
    assert [path.name for path in (tmp_path / "run" / "base").iterdir()] == [digest(base_of(file))]


def test_who_was_too_late_is_sent_it_at_once_the_next_time(folder, tmp_path, file, monkeypatch):
    clock = itertools.count(0.0, 100.0)
    monkeypatch.setattr(exchange, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    study, engine = study_of(file), apart(file)
    play(study, tmp_path / "run", folder, runtime=Runtime(workers=0, deadline=60.0), open_engine=engine.open)
    seen = set()
    for row in rows_of(tmp_path / "run"):
        new = set(row["clients"]) - seen
        seen |= set(row["clients"])
        late = {o["client"]: o["reason"] for o in row["left_out"]}
        assert late == dict.fromkeys(new, "asked for the frozen tensors, too late to send it within the deadline")
    assert sorted(sent(engine)) == [0, 1, 2, 3]


def test_a_client_that_says_again_and_again_that_it_lacks_it_is_left_out(folder, tmp_path, file):
    class Liar(apart(file)):
        def exchange(self, requests, deadline=None):
            asked = {}

            def noted():
                for who, request in requests:
                    asked[who] = request
                    yield who, request

            for who, reply in super().exchange(noted(), deadline):
                yield who, lost(asked[who], tensors=True) if who == 1 else reply

    summary = play(study_of(file), tmp_path / "run", folder, open_engine=Liar.open)
    assert set(summary["left_out"]) == {"1"}
    said = {o["reason"] for row in rows_of(tmp_path / "run") for o in row["left_out"]}
    assert said == {"the sender asks for tensors that were named, here where nothing was referred to"}


def test_kept_files_are_few_and_what_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    kept = KeptInFolder(tmp_path / "base", own=True, most=2)
    for n, name in enumerate("abc"):
        kept.put(name, b"x" * n)
        os.utime(tmp_path / "base" / name, ns=(n, n))
    kept.put("b", b"again")
    assert sorted(path.name for path in kept.folder.iterdir()) == ["b", "c"]
    assert ("a" in kept, kept.get("a"), kept.get("b")) == (False, None, b"again")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot keep the frozen tensors that came in .*file"):
        KeptInFolder(tmp_path / "file", own=True).put("d", b"")

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device; free some space"):
        kept.put("d", b"")
    assert sorted(path.name for path in kept.folder.iterdir()) == ["b", "c"]  # nothing is left half written


def test_a_resident_model_gets_its_own_base_back(folder, file, tmp_path):
    """One process may serve a server that has the file after one that has not."""
    study, shards = study_of(file), open_shards(folder)
    theirs = client.Participant(study, shards, KeptInFolder(tmp_path / "kept", own=True))
    other = {n: torch.ones_like(t) for n, t in base_of(file).items()}
    group = Group(other)
    weights = resident.tensors_of(theirs.model)
    scalars = {"phase": "train", "round": 1}

    def ask(named):
        return encode(Message(weights, None, scalars), template=theirs.setting.specs, group=named)

    own = Known(digest(base_of(file)))
    for named, wanted in ((own, base_of(file)), (group.named(carried=True), other), (own, base_of(file)),
                          (group.named(carried=False), other)):  # fmt: skip
        reply, _ = theirs(0, ask(named), None)
        assert not is_lost(reply, context_of(ask(named)), tensors=True)
        assert all(torch.equal(t, wanted[n]) for n, t in resident.base_of(theirs.model).items())
    strange = Known(digest({"x": torch.ones(1)}))
    assert is_lost(theirs(0, ask(strange), None)[0], context_of(ask(strange)), tensors=True)
    bare = client.Participant(study, shards)
    with pytest.raises(ModelError, match="give both sides the same model.name, pretrained file and torch"):
        bare(0, ask(strange), None)
    with pytest.raises(ModelError, match="with frozen tensors none, the model here has"):
        theirs(0, ask(None), None)
