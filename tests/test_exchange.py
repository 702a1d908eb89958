"""Asks on their way: hostile clients, lost masks, what the links remember, how replies travel."""

import itertools
import random
import struct
import zlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import zstandard

from helpers import Wrapped, model_of, noted, play, resumed, rows_of, same, small, tiny_shards
from secateur.data.shards import open_shards
from secateur.engines import Failure
from secateur.errors import ConfigError
from secateur.federation import client as clients
from secateur.federation import exchange, server
from secateur.study.runtime import Runtime
from secateur.wire.codec import decode, encode, lost, part_sizes
from secateur.wire.head import context_of
from secateur.wire.message import Expected
from secateur.wire.reader import varint
from secateur.wire.values import FORMATS


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"), clients=10, rows=160)


@pytest.fixture(scope="module")
def specs(shards):
    study = small(data=TEN)
    return clients.make_setting(study, clients.make_model(study, open_shards(shards)), 10).specs


TEN = {"clients": 10, "partition": "iid", "test_fraction": 0.2}
HOSTILE = (2, 5, 7)


def sealed(data):
    return data[:8] + struct.pack("<I", zlib.crc32(data[12:], zlib.crc32(data[:8]))) + data[12:]


class Attacker:
    """What a hostile client may send: it reads its requests, trains as it should, and then sends something else."""

    def __init__(self, specs, seed):
        self.specs, self.held, self.draw, self.earlier = specs, None, random.Random(seed), []
        self.attacks = [
            self.garbage, self.truncated, self.flipped, self.wrong_shape, self.poisoned, self.replayed, self.bomb,
            self.no_mask_here,
        ]  # fmt: skip

    def __call__(self, request, reply):
        open_ = Expected(self.specs, "optional", known=self.held, optional=True)
        asked = decode(request, open_)
        self.held = self.held if asked.mask is None else asked.mask
        honest = decode(reply, replace(open_, known=self.held))
        attack = self.attacks[asked.scalars["round"] % len(self.attacks)] if honest.tensors else self.garbage
        bad = attack(request, reply, honest)
        self.earlier.append(reply)  # what it could replay later
        return bad

    def garbage(self, request, reply, honest):
        return self.draw.randbytes(len(reply))

    def truncated(self, request, reply, honest):
        return reply[: self.draw.randrange(len(reply))]

    def flipped(self, request, reply, honest):
        at = self.draw.randrange(len(reply))
        return reply[:at] + bytes([reply[at] ^ 1 << self.draw.randrange(8)]) + reply[at + 1 :]

    def send(self, honest, request, reply, **tensors):
        changed = replace(honest, tensors={**honest.tensors, **tensors})
        return encode(
            changed, values=FORMATS[reply[7]], known=self.held, template=self.specs, context=context_of(request)
        )

    def wrong_shape(self, request, reply, honest):
        shapes = replace(honest, mask=None, tensors={n: torch.zeros(2, 2) for n in honest.tensors})
        return encode(shapes, values=FORMATS[reply[7]], context=context_of(request))

    def poisoned(self, request, reply, honest):
        """Put NaN or infinity where the mask keeps something; into a tensor's scale where values are int8."""
        if reply[7] == FORMATS.index("int8"):
            at = len(reply) - part_sizes(reply)["values"]
            return sealed(reply[:at] + struct.pack("<f", self.draw.choice([torch.nan, torch.inf])) + reply[at + 4 :])
        name = next(n for n, t in honest.tensors.items() if t.any())
        tensor = honest.tensors[name].clone()
        tensor[tuple(tensor.nonzero()[0])] = self.draw.choice([torch.nan, torch.inf])
        return self.send(honest, request, reply, **{name: tensor})

    def replayed(self, request, reply, honest):
        return self.draw.choice(self.earlier)

    def bomb(self, request, reply, honest):
        frame = zstandard.ZstdCompressor().compress(bytes(10**8))
        planes = 4 * (b"\1" + varint(len(frame)) + frame)
        values = part_sizes(reply)["values"]
        head, scales = reply[: len(reply) - values], sum(len(s.shape) > 1 for s in self.specs.values())
        if reply[7] == FORMATS.index("int8"):
            planes = reply[len(head) :][: 4 * scales] + planes
        return sealed(head[:20] + struct.pack("<Q", len(planes)) + head[28:] + planes)

    def no_mask_here(self, request, reply, honest):
        """Claim not to hold the mask, again and again."""
        return lost(request)


class Hostile(Wrapped):
    """Three of ten clients attack; or, with ``attack`` False, never answer."""

    attack = True
    specs = None

    def __init__(self, inner):
        super().__init__(inner)
        self.attackers = {k: Attacker(self.specs, k) for k in HOSTILE}

    def exchange(self, requests, deadline=None):
        asked = {}

        for client, reply in self.inner.exchange(noted(requests, asked), deadline):
            if client not in HOSTILE or isinstance(reply, Failure):
                yield client, reply
            elif self.attack:
                yield client, self.attackers[client](asked[client], reply)
            else:
                yield client, Failure(client, "silent")


@pytest.mark.parametrize("settings", [(), ("wire.values=int8",), ("wire.replies=updates",)])
@pytest.mark.parametrize("method", ["fedavg", "fedsparsify", "autoflip"])
def test_thirty_percent_hostile_clients_change_nothing(method, settings, tmp_path, shards, specs):
    study = small(method, *settings, data=TEN, participation=1.0, rounds=17)
    attacked = type("Attacked", (Hostile,), {"specs": specs})
    summary = play(study, tmp_path / "attacked", shards, open_engine=attacked.open)
    silent = type("Silent", (Hostile,), {"specs": specs, "attack": False})
    play(study, tmp_path / "silent", shards, open_engine=silent.open)
    assert same(model_of(tmp_path / "attacked"), model_of(tmp_path / "silent"))
    rows = rows_of(tmp_path / "attacked")
    for row in rows:
        assert [entry["client"] for entry in row["left_out"]] == list(HOSTILE)
    assert summary["left_out"] == {str(k): len(rows) for k in HOSTILE}
    reasons = " ".join(entry["reason"] for row in rows for entry in row["left_out"])
    for said in ("checksum", "not a secateur payload", "arrived", "NaN or infinity", "another request", "a frame of",
                 "asks for the full mask"):  # fmt: skip
        assert said in reasons
    assert all(row["up"]["refused"] > 0 for row in rows)


def test_a_client_that_lost_its_state_is_served_the_whole_mask_at_once(tmp_path, shards):
    """Client 3 comes back as a new device in every round: one more message each time, and the same model."""

    class Forgetful(Wrapped):
        @classmethod
        def open(cls, *args):
            engine = cls(server.open_local(*args))
            read = engine.states.get
            engine.states.get = lambda client: None if client == 3 else read(client)
            return engine

        def exchange(self, requests, deadline=None):
            answers = list(self.inner.exchange(requests, deadline))
            carried.append([client for client, _ in answers])
            yield from answers

    carried = []
    study = small("fedsparsify", data=TEN, participation=1.0, rounds=6)
    play(study, tmp_path / "whole", shards)
    play(study, tmp_path / "forgetful", shards, open_engine=Forgetful.open)
    assert same(model_of(tmp_path / "forgetful"), model_of(tmp_path / "whole"))
    rows, plain = rows_of(tmp_path / "forgetful"), rows_of(tmp_path / "whole")
    assert all(not row["left_out"] for row in rows)
    asked_again = [clients for clients in carried if clients == [3]]
    assert asked_again
    assert sum(row["bytes_up"] for row in rows) - sum(row["bytes_up"] for row in plain) == 28 * (len(asked_again) - 1)
    assert sum(row["bytes_down"] for row in rows) > sum(row["bytes_down"] for row in plain)


def test_masks_travel_as_changes_once_the_clients_hold_one(tmp_path, shards):
    """The first mask is whole, later ones are changes, an unchanged one is its hash: all counted."""
    play(small("fedsparsify", data=TEN, participation=1.0, rounds=8), tmp_path / "run", shards)
    rows = rows_of(tmp_path / "run")
    masked = [row for row in rows if row["down"]["mask"]]
    weights = sum(spec for spec in (row["kept"] for row in rows[:1]))
    assert weights
    again = [b for a, b in itertools.pairwise(masked) if a["sparsity"] == b["sparsity"]]
    assert all(row["down"]["mask"] >= 10 * 16 for row in masked)
    assert all(row["down"]["mask"] == 10 * 16 for row in again[1:])


TRAVELS = [
    ("wire.values=bf16",), ("wire.values=int8",), ("wire.values=int8", "wire.feedback=false"),
    ("wire.replies=updates",), ("wire.values=int8", "wire.replies=updates"), ("wire.replies=topk", "wire.topk=0.2"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "settings"),
    [(m, s) for m in ("autoflip", "fedsparsify") for s in TRAVELS],
)
def test_every_way_to_travel_resumes_to_the_same_bits_with_any_workers(method, settings, tmp_path, shards):
    study = small(method, *settings, data=TEN, participation=0.5, rounds=5)
    play(study, tmp_path / "whole", shards)
    play(study, tmp_path / "workers", shards, runtime=Runtime(workers=2))

    resumed(study, tmp_path / "cut", shards)
    for folder in ("workers", "cut"):
        assert same(model_of(tmp_path / folder), model_of(tmp_path / "whole"))
        strip = [{k: v for k, v in row.items() if "seconds" not in k} for row in rows_of(tmp_path / folder)]
        assert strip == [{k: v for k, v in r.items() if "seconds" not in k} for r in rows_of(tmp_path / "whole")]


def test_too_late_for_the_whole_mask(tmp_path, shards, specs, monkeypatch):
    """What is left of the deadline is spent on the second message; where nothing is left, the client is named."""
    clock = itertools.count(0.0, 100.0)
    monkeypatch.setattr(exchange, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    asks_again = type("Again", (Hostile,), {"specs": specs})
    # header: the mask's form; 1 is a known one, 3 a change
    forget = lambda self, request, reply: lost(request) if request[6] & 3 in (1, 3) else reply  # noqa: E731
    monkeypatch.setattr(Attacker, "__call__", forget)
    study = small("oneshot", data=TEN, participation=1.0, rounds=4)
    play(study, tmp_path / "run", shards, runtime=Runtime(workers=0, deadline=60.0), open_engine=asks_again.open)
    row = rows_of(tmp_path / "run")[-1]
    assert {entry["client"]: entry["reason"] for entry in row["left_out"]} == dict.fromkeys(
        HOSTILE, "asked for the full mask, too late to send it within the deadline"
    )


def test_lossless_replies_of_updates_give_the_model_of_weights_but_for_rounding(tmp_path, shards):
    base = small("fedsparsify", data=TEN, participation=0.5, rounds=4)
    other = small("fedsparsify", "wire.replies=updates", data=TEN, participation=0.5, rounds=4)
    play(base, tmp_path / "weights", shards)
    play(other, tmp_path / "updates", shards)
    one, two = model_of(tmp_path / "weights"), model_of(tmp_path / "updates")
    assert all(torch.allclose(one[n].float(), two[n].float(), atol=1e-5) for n in one)


def test_topk_is_refused_where_clients_send_masks_of_their_own(tmp_path, shards):
    with pytest.raises(ConfigError, match=r"wire\.replies = topk.*use updates"):
        play(small("fedsparsify_local", "wire.replies=topk", data=TEN), tmp_path / "run", shards)


def test_topk_sends_its_share(tmp_path, shards):
    play(small("fedavg", "wire.replies=topk", "wire.topk=0.1", data=TEN), tmp_path / "run", shards)
    for row in rows_of(tmp_path / "run"):
        share = 10 * (1 + 4 * int(0.1 * row["kept"]))
        assert row["up"]["values"] < share
        assert row["up"]["mask"] < row["up"]["values"]
        assert row["down"]["values"] > 5 * row["up"]["values"]
