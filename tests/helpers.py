"""A tiny federation for tests: real digits, real methods, real bytes."""

from __future__ import annotations

import copy
import json
import os
import signal
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from secateur import methods
from secateur.contract.ask import SCORES
from secateur.contract.client import Client
from secateur.data.shards import make_shards, open_shards
from secateur.data.sources import Source
from secateur.federation import client, server
from secateur.federation.folder import reserve
from secateur.federation.intake import COST_SCALARS
from secateur.learning.resident import tensors_of
from secateur.learning.task import Classification
from secateur.study.options import flatten
from secateur.study.runtime import Runtime
from secateur.study.study import assign, parse_study

INLINE = Runtime(workers=0)

SCORED = {**SCORES, **COST_SCALARS, **client.further_scores(Classification())}
"""Scalars of a client's reply to EVALUATE, where classes are learnt."""


def environment():
    """Return the environment of a process that imports what this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def small(method="fedavg", *settings, **top):
    """Return a study of a few rounds on a small MLP; ``settings`` as on the command line."""
    values = {
        "method": method,
        "rounds": 4,
        "participation": 0.75,
        "data": {"clients": 4, "partition": "iid", "test_fraction": 0.2},
        "model": {"name": "mlp", "options": {"hidden": (12, 8)}},
        "training": {"epochs": 1, "batch_size": 16, "lr": 0.1},
    } | copy.deepcopy(top)
    for path, value in flatten(methods.find(method)()).items():
        if path.endswith("explore.epochs"):
            assign(values, f"{path}=2")
        if path.rpartition(".")[2] == "every" and value > values["rounds"]:
            assign(values, f"{path}=2")  # something has to happen within so few rounds
    for setting in settings:
        assign(values, setting)
    return parse_study(values)


def tiny_source(rows=96, classes=3, seed=0, size=4):
    """Return a learnable set of small images: class c is bright in row c."""
    rng = np.random.default_rng(seed)
    y = np.arange(rows) % classes
    x = rng.integers(0, 100, (rows, 1, size, size)).astype(np.uint8)
    for row, label in enumerate(y):
        x[row, 0, label] += 120
    return Source("tiny", x, y.astype(np.int64), x[: rows // 4], y[: rows // 4].astype(np.int64), None, classes)


def tiny_shards(folder: Path, clients=4, size=4, rows=96, validation_fraction=0.0, task="classification", public=True):
    """Write the shards of ``tiny_source`` for some clients and return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    source = replace(tiny_source(rows, size=size), task=task)
    parts = [np.arange(k, len(source.y_train), clients) for k in range(clients)]
    given = np.arange(0, len(source.y_train), 8) if public else None
    held = {"test_fraction": 0.25, "validation_fraction": validation_fraction}
    make_shards(source, parts, **held, seed=0, folder=folder, public=given)
    return folder


def play(study_, folder, shards, *, runtime=INLINE, open_engine=server.open_local, watch=server.silent):
    """Run a study to its end; return its summary."""
    reserve(folder, study_)
    return server.resume(folder, runtime, shards=shards, open_engine=open_engine, watch=watch)


class Stop(Exception):
    """The process of a run ends here."""


def stop_after_each(event):
    """Watch a run whose process ends after every exchange."""
    if event["event"] == "row":
        raise Stop


def resumed(study_, folder, shards, *, watch=stop_after_each, tries=50, **more):
    """Play a study that is stopped again and again, as new processes would find it; return its summary."""
    reserve(folder, study_)
    for _ in range(tries):
        try:
            return server.resume(folder, INLINE, shards=shards, watch=watch, **more)
        except Stop:
            continue
    raise AssertionError("the run does not end")


def lab(folder, study_):
    """Return a method's first state on some shards, and a function from a client's number to the method's view of it.

    All views share one resident model, as in a worker.
    """
    shards = open_shards(folder)
    model = client.make_model(study_, shards)
    setting = client.make_setting(study_, model, shards.clients, client.example(shards))
    theta = tensors_of(model)

    def view(k):
        return Client(k, setting, model, client.wrap(shards, *shards.train(k)), study_.training, {}, theta)

    return study_.build_method().start(setting, theta, {}), view


def model_of(folder):
    """Return the shipped tensors of a run folder."""
    return load_file(Path(folder) / "model.safetensors")


def rows_of(folder):
    """Return the records of a run folder, without the digests that chain them."""
    rows = [json.loads(line) for line in (Path(folder) / "rounds.jsonl").read_text().splitlines()]
    assert [len(row.pop("chain")) for row in rows] == [16] * len(rows)
    return rows


def same(one, other):
    """Whether two sets of tensors are equal bit for bit (0.0 and -0.0 differ)."""
    return list(one) == list(other) and all(
        one[n].dtype == other[n].dtype and one[n].numpy().tobytes() == other[n].numpy().tobytes() for n in one
    )


class Wrapped:
    """An engine around another: subclasses change or watch what is carried."""

    def __init__(self, inner):
        self.inner = inner
        self.states = inner.states

    @classmethod
    def open(cls, *args):
        return cls(server.open_local(*args))

    def clients(self):
        return self.inner.clients()

    def exchange(self, requests, deadline=None):
        yield from self.inner.exchange(requests, deadline)

    def close(self):
        self.inner.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


class Killing(Wrapped):
    """An engine that gathers, and one of whose processes is killed in the middle of its first task in each exchange."""

    @property
    def workers(self):
        return self.inner.workers

    def gather(self, tasks, job, deadline=None):
        yield from self.inner.gather(self.deadly(tasks), job, deadline)

    def deadly(self, tasks):
        for number, task in enumerate(tasks):
            if number == 1:  # the first one is under way
                self.kill()
            yield task

    def kill(self):
        local = getattr(self.inner, "_local", self.inner)
        for worker in [w for w in local._workers if w.task is not None][:1]:
            os.kill(worker.process.pid, signal.SIGKILL)
            self.killed = getattr(self, "killed", 0) + 1


class KillingRelays(Killing):
    """The same, around an engine with relays."""

    @property
    def relays(self):
        return self.inner.relays

    def traffic(self):
        return self.inner.traffic()


def noted(requests, asked):
    """Pass requests on, and note in ``asked`` what each client was sent."""
    for who, request in requests:
        asked[who] = request
        yield who, request


def edited(**scalars):
    """Return an attack that changes scalars of an honest reply and seals it again."""

    def attack(reply):
        data = bytearray(reply)
        for name, value in scalars.items():
            at = data.index(b"%c%s" % (len(name), name.encode())) + 1 + len(name) + 1
            data[at : at + 8] = struct.pack("<q" if isinstance(value, int) else "<d", value)
        return bytes(data[:8]) + struct.pack("<I", zlib.crc32(data[12:], zlib.crc32(data[:8]))) + bytes(data[12:])

    return attack
