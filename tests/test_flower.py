"""The Flower engine, apps, strategy and mod over an in-process grid; real processes are in test_deployment.py."""

import importlib
import inspect
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed: pip install '.[flower]' in a clone of secateur")

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, arrays_size_mod, message_size_mod
from flwr.common.config import flatten_dict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedProx, FedTrimmedAvg, Krum

from helpers import INLINE, model_of, play, rows_of, same
from loopgrid import LoopGrid, Node
from own_criterion import Drift
from own_recovery import Shrink
from own_schedule import Below
from secateur import methods
from secateur.data import Source
from secateur.engines import Failure
from secateur.errors import ConfigError, EngineError, ModelError, NobodyTrainedError
from secateur.federation import prepare, server
from secateur.federation.folder import reserve
from secateur.flower import Pruned, apps, asked, client_app, keep_pruned, messages, prune, server_app
from secateur.flower import node as node_of
from secateur.flower.asked import Answer, Asked
from secateur.flower.codes import RefusedError
from secateur.flower.engine import FlowerEngine
from secateur.flower.site import site_of
from secateur.methods.autoflip import AutoFLIP
from secateur.methods.fedsparsify import FedSparsify
from secateur.methods.fedsparsify_local import FedSparsifyLocal
from secateur.methods.kit.criteria.explored import Deviation
from secateur.methods.kit.criteria.measured import SNIP, Synflow
from secateur.methods.kit.schedule import Cubic, EveryRound
from secateur.pruning.allocation import RateDistortion
from secateur.pruning.criteria import Exploration
from secateur.pruning.granularity import Channel
from secateur.streams import stream
from secateur.study.options import flatten
from secateur.study.study import parse_study
from secateur.wire.codec import encode
from secateur.wire.message import Message as Sparse

# Flower hands out arrays that must not be written to; the copy that load_state_dict makes may be
pytestmark = [
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning"),
    pytest.mark.usefixtures("quick"),
]
ROOT = Path(__file__).parents[1]
SETTINGS = {
    "method": "autoflip", "rounds": 3, "data.clients": 4, "participation": 1.0, "data.partition": "iid",
    "criterion.explore.epochs": 1, "model.name": "mlp", "model.options.hidden": "[16]",
}  # fmt: skip


def grid_of(settings, clients=4, **config):
    return LoopGrid(
        {10 + k: Node(client_app(), 10 + k, settings, **{"partition-id": k, **config}) for k in range(clients)}
    )


def locally(settings, folder):
    made, _ = apps.study_of(settings)
    with prepare.federation(made) as shards:
        play(made, folder, shards, runtime=INLINE)


def ledger(folder):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows_of(folder)]


@pytest.mark.parametrize("method", methods.names())
def test_every_method_has_the_model_and_ledger_of_the_local_engine(method, tmp_path):
    settings = {**SETTINGS, "method": method, "data.public": 16, "out": str(tmp_path / "flower")}
    settings.pop("criterion.explore.epochs")
    for path in flatten(methods.find(method)()):
        if path.endswith("explore.epochs") or path.rpartition(".")[2] == "every":
            settings[path] = 1
    summary = apps.serve(grid_of(settings), settings)
    locally(settings, tmp_path / "local")
    assert same(model_of(tmp_path / "flower"), model_of(tmp_path / "local"))
    assert ledger(tmp_path / "flower") == ledger(tmp_path / "local")
    assert summary["left_out"] == {}


def test_a_model_that_counts_draws_and_ties_has_the_bits_of_the_local_engine(tmp_path):
    model = "everything:Everything"
    settings = {**SETTINGS, "method": "fedsparsify", "model.name": model, "out": str(tmp_path / "flower")}
    del settings["criterion.explore.epochs"], settings["model.options.hidden"]
    summary = apps.serve(grid_of(settings, allow=f"model.name={model}"), settings)
    locally(settings, tmp_path / "local")
    assert same(model_of(tmp_path / "flower"), model_of(tmp_path / "local"))
    assert ledger(tmp_path / "flower") == ledger(tmp_path / "local")
    assert summary["left_out"] == {}


@pytest.mark.parametrize("place", ["context", "folder"])
def test_what_clients_keep_survives_a_stop_of_the_server(place, tmp_path, monkeypatch):
    """Error feedback lives on the nodes; a stop, also with replies that the server forgot, changes no bit."""
    settings = {**SETTINGS, "wire.values": "int8", "out": str(tmp_path / "stopped")}
    config = {"state": str(tmp_path / "state")} if place == "folder" else {}
    grid = grid_of(settings, **config)
    rounds = []

    def stop(row):
        if row["event"] == "row":
            rounds.append(row)
            if len(rounds) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(apps, "_log", stop)
    with pytest.raises(KeyboardInterrupt):
        apps.serve(grid, settings)
    # a third exchange that the server forgets: the nodes are one state ahead of its checkpoint
    if place == "folder":  # a new run of Flower, too, has new contexts
        grid = grid_of(settings, **config)
    monkeypatch.setattr(server.checkpoint, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        apps.serve(grid, settings)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    apps.serve(grid, settings)
    locally(settings, tmp_path / "whole")
    assert same(model_of(tmp_path / "stopped"), model_of(tmp_path / "whole"))
    assert ledger(tmp_path / "stopped") == ledger(tmp_path / "whole")


@pytest.mark.parametrize(("method", "values"), [("fedavg", "int8"), ("spafl", "fp32"), ("fedpub", "fp32")])
def test_a_node_that_lost_what_it_kept_goes_on_and_it_is_said(method, values, tmp_path, said):
    settings = {**SETTINGS, "method": method, "wire.values": values, "out": str(tmp_path / "run")}
    for path in [p for p in settings if p.startswith(("criterion", "schedule"))]:
        settings.pop(path)
    grid = grid_of(settings)
    answer = grid.nodes[12].answer

    def forget(message):
        grid.nodes[12].context.state = RecordDict()
        return answer(message)

    grid.nodes[12].answer = forget
    summary = apps.serve(grid, settings)
    assert summary["left_out"] == {}
    assert any("client 2 no longer has what it kept" in line for line in said())
    lost = [row["lost_state"] for row in rows_of(tmp_path / "run")]
    assert [2] in lost
    assert all(found in ([], [2]) for found in lost)
    assert "client 2 had lost what it kept and went on without" in (tmp_path / "run" / "run.log").read_text()


def test_a_damaged_state_on_a_node_is_a_lost_one(tmp_path, said):
    """Bits of client 2's state flip on its disk before each request: it goes on without, and it is said."""
    settings = {**SETTINGS, "method": "fedavg", "wire.values": "int8", "out": str(tmp_path / "run")}
    for path in [p for p in settings if p.startswith(("criterion", "schedule"))]:
        settings.pop(path)
    grid = grid_of(settings, state=str(tmp_path / "state"))
    answer = grid.nodes[12].answer

    def damaged(message):
        for path in (tmp_path / "state").glob("*-2/*"):
            data = bytearray(path.read_bytes())
            data[-5] ^= 64
            path.write_bytes(data)
        return answer(message)

    grid.nodes[12].answer = damaged
    summary = apps.serve(grid, settings)
    assert summary["left_out"] == {}
    assert [2] in [row["lost_state"] for row in rows_of(tmp_path / "run")]
    assert any("client 2 no longer has what it kept" in line for line in said())


def test_the_name_of_a_state_is_short_or_costs_its_sender_the_round(tmp_path):
    settings = {**SETTINGS, "method": "fedavg", "wire.values": "int8", "out": str(tmp_path / "run")}
    for path in [p for p in settings if p.startswith(("criterion", "schedule"))]:
        settings.pop(path)
    grid = grid_of(settings)
    answer = grid.nodes[12].answer

    def endless(message):
        reply = answer(message)
        if reply is not None and not reply.has_error() and "kept" in messages.unpack(reply.content)[0]:
            about, payload = messages.unpack(reply.content)
            reply.content = messages.pack({**about, "kept": "x" * 10**6}, payload)
        return reply

    grid.nodes[12].answer = endless
    apps.serve(grid, settings)
    reasons = {e["reason"] for row in rows_of(tmp_path / "run") for e in row["left_out"]}
    assert reasons == {"the name of its state is not one of at most 64 letters and digits"}


def test_a_node_that_never_answers_is_left_out_by_the_deadline(tmp_path):
    settings = {**SETTINGS, "out": str(tmp_path / "run"), "deadline": 1.0, "rounds": 2}
    grid = grid_of(settings)
    first = grid.nodes[11].answer

    def falls_silent(message):
        grid.nodes[11].mute = grid.nodes[11].asked >= 2  # greeted, explored
        return first(message)

    grid.nodes[11].answer = falls_silent
    apps.serve(grid, settings)
    reasons = [[(o["client"], o["reason"]) for o in row["left_out"]] for row in rows_of(tmp_path / "run")]
    assert reasons == [[], [(1, "no reply within 1 s")], [(1, "no reply within 1 s")]]


def test_nodes_leave_in_mid_round_and_come_back(tmp_path):
    settings = {**SETTINGS, "out": str(tmp_path / "run"), "rounds": 4}
    grid = grid_of(settings)
    answer, gone = grid.nodes[13].answer, []

    def leaves(message):
        if grid.nodes[13].asked == 2:
            grid.nodes[13].asked += 1
            gone.append(grid.nodes.pop(13))
            return None
        return answer(message)

    grid.nodes[13].answer = leaves
    counted = grid.nodes[10].answer

    def brings_back(message):
        if grid.nodes[10].asked == 4 and gone:
            grid.nodes[99] = Node(client_app(), 99, settings, **{"partition-id": 3})  # restarted: another number
        return counted(message)

    grid.nodes[10].answer = brings_back
    apps.serve(grid, settings)
    reasons = [[(o["client"], o["reason"]) for o in row["left_out"]] for row in rows_of(tmp_path / "run")]
    assert reasons[0] == []
    assert reasons[1] == [(3, "its node left the federation before it answered")]
    assert reasons[2] == [(3, "no node of this client is connected")]
    assert reasons[-1] == []


def test_who_cannot_take_part_is_told_why_and_costs_nobody_else(tmp_path, said):
    settings = {**SETTINGS, "out": str(tmp_path / "run"), "wait": 0.2}
    grid = grid_of(settings)
    bad = {
        20: Node(client_app(), 20, settings, **{"partition-id": 7}),
        21: Node(client_app(), 21, settings),
        22: Node(client_app(), 22, settings, **{"partition-id": 2}),
        23: Node(client_app(), 23, {**settings, "metod": "x"}, **{"partition-id": 3}),
        24: Node(ClientApp(), 24, settings, **{"partition-id": 3}),
    }
    del grid.nodes[13]
    grid.nodes |= bad
    summary = apps.serve(grid, settings)
    lines = "\n".join(said())
    assert (
        "node 20 cannot take part: partition-id = 7: start this SuperNode with --node-config 'partition-id=K'" in lines
    )
    assert "node 21 cannot take part: partition-id = None" in lines
    assert "node 22 cannot take part: it says it is client 2, which node 12 is already" in lines
    assert "node 23 cannot take part: the run's settings are refused there" in lines
    assert "refused (settings): unknown option" in lines  # in the node's own log
    assert "node 24 cannot take part: ValueError: No query function registered" in lines
    assert set(summary["left_out"]) == {3} or set(summary["left_out"]) == {"3"}


def test_other_versions_and_models_are_refused_with_what_to_do(tmp_path, said, monkeypatch):
    settings = {**SETTINGS, "out": str(tmp_path / "run"), "wait": 0.2}
    grid = grid_of(settings)
    other = {**settings, "model.options.hidden": "[8]"}
    grid.nodes[13] = Node(client_app(), 13, other, **{"partition-id": 3})
    introduce = node_of._introduce

    def older(asked, site):
        said = introduce(asked, site)
        return Answer({**said.about, "wire": 1, "secateur": "0.0.9"}) if asked.node.id == 12 else said

    monkeypatch.setattr(node_of, "_introduce", older)
    apps.serve(grid, settings)
    lines = "\n".join(said())
    assert "node 12 cannot take part: it has secateur 0.0.9 (wire version 1), this server" in lines
    assert re.search(r"node 13( \(client 3\))? cannot take part: its model is", lines)
    assert all({o["client"] for o in row["left_out"]} == {2, 3} for row in rows_of(tmp_path / "run"))


def test_no_node_is_one_clear_line(tmp_path):
    settings = {**SETTINGS, "out": str(tmp_path / "run"), "wait": 0.05}
    with pytest.raises(EngineError, match=r"no node was connected within 0\.05 s: start SuperNodes"):
        apps.serve(LoopGrid(), settings)


def test_a_folder_of_another_study_is_not_touched(tmp_path):
    settings = {**SETTINGS, "out": str(tmp_path / "run")}
    made, _ = apps.study_of({**settings, "seed": 5})
    reserve(tmp_path / "run", made)
    with pytest.raises(ConfigError, match="holds a run of another study"):
        apps.serve(grid_of(settings), settings)


def test_settings_are_checked_and_set_adds_to_them():
    made, own = apps.study_of({**SETTINGS, "set": "rounds=7 schedule.sparsity=0.4", "out": "", "deadline": 60})
    assert (made.rounds, made.options["schedule.sparsity"], own) == (7, "0.4", {"deadline": 60})
    with pytest.raises(ConfigError, match="unknown setting 'lrr': did you mean 'lr'"):
        apps.study_of({"training.lrr": 3})
    with pytest.raises(ConfigError, match="unknown setting 'rounds'"):
        apps.study_of({"set": "data.rounds=1"})


def test_a_node_refuses_a_request_for_someone_else_and_names_that_lead_elsewhere(tmp_path):
    settings = {**SETTINGS, "out": str(tmp_path / "run")}
    grid = grid_of(settings, state=str(tmp_path / "state"))
    for run, client, kept in (("r1", 2, ""), ("../../x", 0, ""), ("r1", 0, "../../etc/passwd")):
        about = {"run": run, "client": client, "kept": kept}
        (ask,) = grid.push_messages([Message(messages.pack(about, b"x"), 10, messages.SERVE)])
        (reply,) = grid.pull_messages([ask])
        assert "error" in messages.unpack(reply.content)[0]
    assert not (tmp_path / "x").exists()


def test_hostile_replies_cost_the_sender_its_place_only(tmp_path):
    """Content that is nothing of ours, of the wrong kind, or empty."""
    settings = {**SETTINGS, "out": str(tmp_path / "run")}
    grid = grid_of(settings)
    contents = [
        RecordDict(), RecordDict({"about": MetricRecord({"x": 1.0}), "payload": ConfigRecord({"payload": b"x"})}),
        RecordDict({"about": ConfigRecord({"kept": 7}), "payload": ArrayRecord([np.ones(3)])}),
        messages.pack({"kept": [1]}, b"garbage"),
    ]  # fmt: skip
    answer = grid.nodes[11].answer

    def hostile(message):
        reply = answer(message)
        if message.metadata.message_type == messages.SERVE:
            reply.content = contents[grid.nodes[11].asked % len(contents)]
        return reply

    grid.nodes[11].answer = hostile
    apps.serve(grid, settings)
    assert all({o["client"] for o in row["left_out"]} == {1} for row in rows_of(tmp_path / "run"))


def test_a_server_app_ends_with_an_error_at_once_where_no_node_can_be_trained(tmp_path, said):
    settings = {**SETTINGS, "method": "fedavg", "out": str(tmp_path / "run"), "training.lr": 1e30, "wait": 3600}
    settings.pop("criterion.explore.epochs")
    app = server_app()
    context = Context(1, 0, {}, RecordDict(), settings)
    with pytest.raises(SystemExit) as stopped:
        app(grid_of(settings), context)
    assert stopped.value.code == 2
    (told,) = {text for text in said() if "no node can take part" in text}
    assert re.search("[34] of 4 nodes were refused because: no first step of training can be taken", told)
    assert "lower training.lr" in told
    assert not {"rounds.jsonl", "summary.json"} & {path.name for path in (tmp_path / "run").iterdir()}


def test_a_round_without_replies_is_asked_again_of_the_same_clients_as_locally(tmp_path, monkeypatch):
    """One client a round: whoever is drawn first for round 2 fails, and so does whoever is drawn in its place."""
    (tmp_path / "their_fickle.py").write_text(
        '"""FedAvg whose clients fail in round 2.\n\nReference: none\n"""\n'
        "from dataclasses import dataclass\n"
        "from secateur.methods.kit.composition import Composition\n\n"
        "@dataclass(frozen=True)\nclass Fickle(Composition):\n    failing: str = ''\n\n"
        "    def respond(self, ask, client):\n"
        "        if ask.round == 2 and str(client.id) in self.failing:\n"
        "            raise RuntimeError('not today')\n"
        "        return super().respond(ask, client)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    order = torch.randperm(4, generator=stream(0, "cohort", 2)).tolist()
    failing = "".join(map(str, order[:2]))
    settings = {
        **SETTINGS, "method": "their_fickle", "participation": 0.25, "failing": f"x{failing}", "wire.values": "fp16",
        "out": str(tmp_path / "flower"),
    }  # fmt: skip
    settings.pop("criterion.explore.epochs")
    apps.serve(grid_of(settings, allow="method=their_fickle"), settings)
    locally(settings, tmp_path / "local")
    assert [row["clients"] for row in rows_of(tmp_path / "flower")][1:4] == [[k] for k in order[:3]]
    assert same(model_of(tmp_path / "flower"), model_of(tmp_path / "local"))
    said, told = ledger(tmp_path / "flower"), ledger(tmp_path / "local")
    assert "its code raised RuntimeError" in said[2]["left_out"][0]["reason"]  # the text stays in the node's log
    for row in (*said, *told):
        row["left_out"] = [entry["client"] for entry in row["left_out"]]
    assert said == told


def hospital(folder, seed):
    """Return the rows of a folder: a numpy file, its last column the class."""
    rows = np.concatenate([np.load(path) for path in sorted(Path(folder).glob("*.npy"))])
    x, y = rows[:, :-1].astype(np.float32), rows[:, -1].astype(np.int64)
    return Source("hospital", x, y, x[:0], y[:0], None, 2, kind="tabular")


def test_nodes_with_data_of_their_own(tmp_path, monkeypatch, said):
    """The server has no row: it learns shapes from the nodes and has the model scored by them."""
    monkeypatch.setitem(sys.modules, "hospitals_of_a_test", types.ModuleType("h"))
    sys.modules["hospitals_of_a_test"].load = hospital
    settings = {
        "method": "fedsparsify", "rounds": 4, "data.clients": 3, "participation": 1.0, "model.name": "mlp",
        "model.options.hidden": "[8]", "data.source": "hospitals_of_a_test:load", "out": str(tmp_path / "run"),
        "schedule.sparsity": 0.5, "training.lr": 0.1, "wait": 0.2,
    }  # fmt: skip
    nodes = {}
    for k in range(3):
        rng = np.random.default_rng(k)
        y = rng.integers(0, 2, 60 + 10 * k)
        (tmp_path / str(k)).mkdir()
        np.save(tmp_path / str(k) / "rows.npy", np.column_stack([rng.normal(size=(len(y), 5)) + y[:, None], y]))
        config = {"data": str(tmp_path / str(k)), "allow": "data.source=hospitals_of_a_test:load"}
        nodes[k + 1] = Node(client_app(), k + 1, settings, **{"partition-id": k, **config})
    summary = apps.serve(LoopGrid(nodes), settings)
    assert summary["final"]["accuracy"] > 0.8
    rows = rows_of(tmp_path / "run")
    assert all(0 < row["evaluate_bytes"] < summary["final"]["evaluate_bytes"] for row in rows)
    assert all(0 <= row["validation"] <= 1 for row in [*rows, summary["final"]])  # clients alone hold such rows
    assert summary["final"]["sparsity"] == pytest.approx(0.5, abs=0.02)
    # the model of a simulation of the same three hospitals is the same
    (tmp_path / "2" / "rows.npy").unlink()
    settings["out"] = str(tmp_path / "again")
    apps.serve(LoopGrid(nodes), settings)
    assert any(f"client 2: its data folder {tmp_path / '2'} is empty" in line for line in said())
    nodes[2].context.node_config["data"] = str(tmp_path / "nowhere")
    site = site_of(nodes[2].context.node_config)
    with pytest.raises(RefusedError, match="client 1: its data folder .*nowhere does not exist"):
        node_of._introduce(
            Asked(messages.HELLO, {}, None, asked.Node(12, 1, nodes[2].context.node_config, settings)), site
        )


@pytest.mark.parametrize("nodes", [4, 2])
def test_who_lies_about_its_data_costs_itself_alone_and_one_of_two_ends_the_run(nodes, tmp_path, said):
    settings = {**SETTINGS, "rounds": 1, "out": str(tmp_path / "run"), "wait": 0.1}
    grid = grid_of(settings, clients=nodes)
    introduce = {k: node.answer for k, node in grid.nodes.items()}

    def own(message):
        reply = introduce[11](message)
        about, payload = messages.unpack(reply.content)
        if payload is None:
            reply.content = messages.pack({**about, "own": True})
        return reply

    grid.nodes[11].answer = own
    if nodes == 2:
        with pytest.raises(EngineError, match="nodes disagree on what their data is"):
            apps.serve(grid, settings)
        return
    summary = apps.serve(grid, settings)
    assert any("its data is rows of its own, simulated is expected" in line for line in said())
    assert set(summary["left_out"]) == {"1"}


def test_the_engine_alone(tmp_path):
    settings = {**SETTINGS}
    engine = FlowerEngine(grid_of(settings, clients=3), clients=4, run="r", wait=0.01)
    with engine:
        assert list(engine.clients()) == [0, 1, 2, 3]
        found = dict(engine.exchange([(0, b"junk"), (3, b"junk")]))
    assert found[3] == Failure(3, "no node of this client is connected", sent=False)
    assert isinstance(found[0], Failure)
    assert "it cannot read the request" in found[0].reason


@pytest.mark.parametrize(
    "lie",
    [
        {"own": None}, {"inputs": None}, {"inputs": "ab"}, {"inputs": [10**9]}, {"inputs": ["a"]}, {"outputs": 0},
        {"outputs": "2"}, {"scale": "x"}, {"kind": 3}, {"task": None}, {"model": None}, {"inputs": [1] * 99},
    ],
    ids=str,
)  # fmt: skip
def test_a_greeting_without_its_facts_costs_the_sender_its_place_alone(lie, tmp_path, said):
    """Node 10 would be the lowest client, whose facts the server takes first."""
    settings = {**SETTINGS, "method": "fedavg", "out": str(tmp_path / "run"), "wait": 0.2}
    settings = {k: v for k, v in settings.items() if not k.startswith("criterion")}
    grid = grid_of(settings)
    answer = grid.nodes[10].answer

    def lying(message):
        reply = answer(message)
        if message.metadata.message_type == messages.HELLO and not reply.has_error():
            about = {k: v for k, v in (messages.unpack(reply.content)[0] | lie).items() if v is not None}
            reply.content = messages.pack(about)
        return reply

    grid.nodes[10].answer = lying
    summary = apps.serve(grid, settings)
    assert summary["left_out"] == {"0": sum(0 in row["clients"] for row in rows_of(tmp_path / "run"))}
    assert any("node 10 cannot take part: its " in line for line in said())


def test_a_deadline_holds_while_an_upload_is_stuck():
    """The reply of one node is announced and never complete: Flower blocks whoever asks for it."""
    free = threading.Event()

    class Stuck(LoopGrid):
        def pull_messages(self, message_ids):
            if first.intersection(message_ids):
                free.wait()
            return super().pull_messages(message_ids)

    first = set()
    grid = Stuck(grid_of(SETTINGS, clients=4).nodes)
    with FlowerEngine(grid, clients=4, run="r", wait=5.0) as engine:
        engine.meet(range(4))
        first.add(str(next(grid.numbers) + 1))
        begun = time.monotonic()
        found = dict(engine.exchange([(k, b"junk") for k in range(4)], deadline=3.0))
        took = time.monotonic() - begun
    free.set()
    assert 3.0 <= took <= 5.0
    assert found[0].reason == "no reply within 3 s"
    assert all("no reply" not in found[k].reason for k in (1, 2, 3))


# ---- the strategy and the mod, for apps that exist already


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 2))


def rows(k):
    rng = torch.Generator().manual_seed(k)
    y = torch.randint(0, 2, (64,), generator=rng)
    return torch.randn(64, 6, generator=rng) + y[:, None], y


def someones_app(mods, *, keeps=False, masks=None):
    """Return a ClientApp as its author would have written it; with ``keeps`` the one extra line in its loop."""
    app = ClientApp(mods=mods)

    @app.train()
    def train(message, context):
        model, (x, y) = net(), rows(context.node_config["partition-id"])
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            if keeps:
                keep_pruned(model)
        if masks is not None:
            masks.append({n: p.detach() != 0 for n, p in model.named_parameters()})
        metrics = MetricRecord({"train_loss": loss.item(), "num-examples": len(y)})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        model, (x, y) = net(), rows(context.node_config["partition-id"])
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        accuracy = float((model(x).argmax(1) == y).float().mean())
        metrics = MetricRecord({"accuracy": accuracy, "num-examples": len(y)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def federate(strategy, mods, rounds=6, **app):
    random.seed(0)  # Flower draws the order in which it adds up its nodes from here
    nodes = {10 + k: Node(someones_app(mods, **app), 10 + k, {}, **{"partition-id": k}) for k in range(5)}
    grid = LoopGrid(nodes)
    return strategy.start(grid, ArrayRecord(net().state_dict()), num_rounds=rounds), grid


def density(arrays):
    kept = [np.count_nonzero(t) for n, t in arrays.to_torch_state_dict().items() if n.endswith("weight")]
    return sum(kept) / (72 + 24)


def test_without_pruning_the_wrapper_changes_no_bit():
    plain, _ = federate(FedAvg(), [])
    wrapped, _ = federate(Pruned(FedAvg(), FedSparsify(schedule=Cubic(sparsity=0.0)), net()), [prune(net())])
    assert same(plain.arrays.to_torch_state_dict(), wrapped.arrays.to_torch_state_dict())


@pytest.mark.parametrize(
    "inner", [FedAvg, FedAdam, lambda: FedProx(proximal_mu=0.1), lambda: Krum(num_malicious_nodes=1), FedTrimmedAvg]
)
def test_it_composes_with_flowers_strategies(inner):
    method = FedSparsify(schedule=Cubic(sparsity=0.75))
    strategy = Pruned(inner(), method, net())
    result, _ = federate(strategy, [prune(net())], rounds=8)
    assert density(result.arrays) == pytest.approx(0.25, abs=0.02)
    assert result.evaluate_metrics_clientapp[8]["accuracy"] > 0.8
    assert [row["round"] for row in strategy.ledger] == list(range(1, 9))
    assert all(row["left_out"] == {} for row in strategy.ledger)
    sent = [sum(row["down"].values()) for row in strategy.ledger]
    assert sent[-1] < 0.6 * sent[0]


@pytest.mark.parametrize("mod", [LocalDpMod(10.0, 1e-4, 1.0, 0.1), arrays_size_mod, message_size_mod])
def test_it_composes_with_flowers_mods(mod):
    strategy = Pruned(FedAvg(), FedSparsify(schedule=Cubic(sparsity=0.5)), net())
    result, _ = federate(strategy, [prune(net()), mod])
    assert density(result.arrays) == pytest.approx(0.5, abs=0.02)
    assert all(row["left_out"] == {} for row in strategy.ledger)


class Tied(torch.nn.Module):
    """Two layers of one weight, and a constant mask of minus infinity."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = torch.nn.Linear(6, 6, bias=False), torch.nn.Linear(6, 6, bias=False)
        self.two.weight = self.one.weight
        self.out = torch.nn.Linear(6, 2)
        self.register_buffer("past", torch.tensor([0.0] * 5 + [-torch.inf]))

    def forward(self, x):
        x = torch.relu(self.two(torch.relu(self.one(x))))
        return self.out(x * torch.softmax(x.detach() + self.past, 1))


def test_tied_weights_of_an_app_travel_once_under_one_mask(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "net", Tied)
    strategy = Pruned(FedAvg(), FedSparsify(schedule=Cubic(sparsity=0.5)), net())
    result, _ = federate(strategy, [prune(net())])
    assert all(row["left_out"] == {} for row in strategy.ledger)
    arrays = result.arrays.to_torch_state_dict()
    assert set(arrays) == set(net().state_dict())
    assert torch.equal(arrays["one.weight"], arrays["two.weight"])
    assert set(strategy.state.mask) == {"one.weight", "out.weight"}
    assert int((arrays["one.weight"] == 0).sum() + (arrays["out.weight"] == 0).sum()) == (36 + 12) // 2
    assert strategy.ledger[0]["down"]["values"] <= 5 * 4 * (36 + 12 + 2 + 6) + 100
    assert torch.isneginf(arrays["past"]).tolist() == [False] * 5 + [True]


def test_autoflip_explores_through_the_apps_own_training():
    method = AutoFLIP(criterion=Deviation(Exploration(epochs=3)), schedule=EveryRound(sparsity=0.3))
    strategy = Pruned(FedAdam(eta=0.05), method, net())
    result, _ = federate(strategy, [prune(net())])
    assert [row["phase"] for row in strategy.ledger] == ["explore"] + ["train"] * 6
    assert {f"deviation/{k}" for k in range(5)} <= set(strategy.state.archive)
    expected = (torch.cat([t.reshape(-1) for t in net().state_dict().values()])).numel()
    assert strategy.ledger[0]["down"]["values"] <= 5 * 4 * expected + 100
    assert density(result.arrays) < 0.8
    assert result.evaluate_metrics_clientapp[6]["accuracy"] > 0.8


def test_exploration_repeats_the_apps_training_epochs_times():
    seen = []
    for epochs in (1, 3):
        method = AutoFLIP(criterion=Deviation(Exploration(epochs=epochs)))
        strategy = Pruned(FedAvg(), method, net())
        federate(strategy, [prune(net())], rounds=1)
        seen.append(strategy.state.archive["deviation/0"]["0.weight"].sum().item())
    model, (x, y) = net(), rows(0)
    start = model[0].weight.detach().clone()
    for epochs, total in zip((1, 3), seen, strict=True):
        model.load_state_dict(net().state_dict())
        for _ in range(epochs):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            for _ in range(5):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        assert total == pytest.approx((model[0].weight - start).square().sum().item(), rel=1e-5)


def test_one_line_in_the_loop_keeps_the_mask_within_the_round():
    for keeps, holds in ((False, False), (True, True)):
        found = []
        strategy = Pruned(FedAvg(), FedSparsify(schedule=Cubic(sparsity=0.5)), net())
        federate(strategy, [prune(net())], keeps=keeps, masks=found)
        pruned = ~strategy.state.mask["0.weight"]
        early = found[-1]["0.weight"]
        assert bool((early & pruned).sum() <= 10) is holds or not keeps
        assert all(row["left_out"] == {} for row in strategy.ledger)


def test_a_node_that_lost_its_mask_is_sent_it_again_in_the_same_round():
    strategy = Pruned(FedAvg(), FedSparsify(schedule=Cubic(sparsity=0.5)), net())
    nodes = {10 + k: Node(someones_app([prune(net())]), 10 + k, {}, **{"partition-id": k}) for k in range(3)}
    answer = nodes[11].answer

    def forget(message):
        if nodes[11].asked in {4, 6}:
            nodes[11].context.state = RecordDict()
        return answer(message)

    nodes[11].answer = forget
    random.seed(0)
    result = strategy.start(LoopGrid(nodes), ArrayRecord(net().state_dict()), num_rounds=6)
    whole = Pruned(FedAvg(), FedSparsify(schedule=Cubic(sparsity=0.5)), net())
    fresh = {10 + k: Node(someones_app([prune(net())]), 10 + k, {}, **{"partition-id": k}) for k in range(3)}
    random.seed(0)
    expected = whole.start(LoopGrid(fresh), ArrayRecord(net().state_dict()), num_rounds=6)
    assert same(result.arrays.to_torch_state_dict(), expected.arrays.to_torch_state_dict())
    assert nodes[11].asked > fresh[11].asked


def test_nodes_without_the_mod_and_hostile_ones_are_left_out_and_named():
    strategy = Pruned(FedAvg(), FedSparsify(schedule=Cubic(sparsity=0.5)), net())
    nodes = {10 + k: Node(someones_app([prune(net())]), 10 + k, {}, **{"partition-id": k}) for k in range(4)}
    nodes[12] = Node(someones_app([]), 12, {}, **{"partition-id": 2})
    nodes[13] = Node(someones_app([prune(torch.nn.Linear(3, 3))]), 13, {}, **{"partition-id": 3})
    strategy.start(LoopGrid(nodes), ArrayRecord(net().state_dict()), num_rounds=2)
    for row in strategy.ledger:
        assert set(row["left_out"]) == {12, 13}, row["left_out"]
        assert "it cannot read the request, which is damaged, or of another model" in row["left_out"][13]


def test_a_server_gets_of_a_node_with_the_mod_what_its_owner_allows(said):
    """Each try is one line in the node's log and a code at the server; the app's own error text stays there, too."""
    limits = {"answers": "train", "most.epochs": 3, "most.bytes": 4000, "partition-id": 0}
    trained = []

    def counts(message, context, call_next):
        trained.append(message)
        if len(trained) > 1:
            raise RuntimeError("a cell of anna.csv")
        return call_next(message, context)

    node = Node(someones_app([prune(net()), counts]), 10, {}, **limits)
    grid, tensors = LoopGrid({10: node}), {n: t.detach() for n, t in net().named_parameters()}
    tries = [
        ({"phase": "train", "epochs": 10**9}, "it would cost more than the node's owner lets a request cost: epochs 3"),
        ({"phase": "explore"}, "the node's owner lets it answer no request of this kind: explore"),
        ({"epochs": 1}, "the node's owner lets it answer no request of this kind: explore"),
        (
            {"phase": "train", "x": "y" * 5000},
            "it would cost more than the node's owner lets a request cost: bytes 4000",
        ),
        ({"phase": "train", "epochs": "many"}, "its code raised ValueError; the node's own log says more"),
        ({"phase": "train"}, None),
        ({"phase": "train"}, "its code raised RuntimeError; the node's own log says more"),
    ]
    for scalars, reason in tries:
        content = RecordDict({"arrays": ArrayRecord(net().state_dict()), "config": ConfigRecord({"lr": 0.1})})
        payload = encode(Sparse(tensors, None, scalars))
        before = len(said())
        (ask,) = grid.push_messages([Message(messages.with_payload(content, payload), 10, "train")])
        (reply,) = grid.pull_messages([ask])
        assert (reply.error.reason if reply.has_error() else None) == reason
        assert len(said()) - before == (reason is not None)
    assert len(trained) == 2
    assert "a cell of anna.csv" in said()[-1]  # in the node's own log


def test_what_a_node_says_to_pruned_is_short_and_printable(said):
    strategy = Pruned(FedAvg(), FedSparsify(schedule=Cubic(sparsity=0.5)), net())
    nodes = {10 + k: Node(someones_app([prune(net())]), 10 + k, {}, **{"partition-id": k}) for k in range(3)}
    flood = "A\x1b[2J\n[/red]" * 10**5
    answers = {11: lambda m: Message(Error(2, flood), reply_to=m)}

    def names(message):
        reply = Node.answer(nodes[12], message)
        if message.metadata.message_type != "train":
            return reply
        payload = encode(Sparse({flood[:60_000]: torch.zeros(1)}, None, {flood[:200]: 1.0}), context=1)
        reply.content = messages.with_payload(reply.content, payload)
        return reply

    nodes[11].answer = answers[11]
    nodes[12].answer = names
    strategy.start(LoopGrid(nodes), ArrayRecord(net().state_dict()), num_rounds=1)
    for reason in strategy.ledger[0]["left_out"].values():
        assert reason.isprintable()
        assert len(reason) < 600
    assert set(strategy.ledger[0]["left_out"]) == {11, 12}


def test_a_result_to_which_no_node_has_led_is_an_error():
    strategy = Pruned(FedAvg(), FedSparsify(schedule=Cubic(sparsity=0.5)), net())
    reason = "phase 'train'.* 10 of 10 requests failed because: .*secateur.wire"  # which the bare app cannot read
    with pytest.raises(NobodyTrainedError, match=reason):
        federate(strategy, [], rounds=2)  # five nodes, none with the mod
    assert [row["answered"] for row in strategy.ledger] == [0, 0]


def test_slots_of_ones_own_go_with_it():
    """The schedule looks at what the strategy merged: no survivor is below its threshold."""
    strategy = Pruned(FedAvg(), FedSparsify(schedule=Below(tau=0.1), recovery=Shrink(share=1.0)), net())
    result, _ = federate(strategy, [prune(net())], rounds=2)
    kept, mask = result.arrays.to_torch_state_dict(), strategy.state.mask
    assert all((kept[name][part].abs() >= 0.1).all() for name, part in mask.items())
    assert 0.3 < density(result.arrays) < 0.95


def test_units_are_removed_where_an_example_is_given_to_try_them_on():
    method = FedSparsify(schedule=Cubic(sparsity=0.5), granularity=Channel())
    odd = torch.nn.Sequential(
        torch.nn.Unflatten(1, (2, 3)), torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)
    )
    with pytest.raises(ModelError, match="units are tried on an example of an input, and none was given"):
        Pruned(FedAvg(), method, odd)
    assert Pruned(FedAvg(), method, odd, example=torch.zeros(1, 6))
    strategy = Pruned(FedAvg(), method, net(), example=torch.zeros(1, 6))
    result, _ = federate(strategy, [prune(net())])
    alive = result.arrays.to_torch_state_dict()["0.weight"].any(1)
    assert int(alive.sum()) == 6  # half of twelve neurons


def test_what_the_wrapper_cannot_do_is_refused_at_once():
    for method in (
        FedSparsifyLocal(),
        AutoFLIP(criterion=Deviation(Exploration(warm_start=True))),
        FedSparsify(criterion=SNIP()),
        FedSparsify(criterion=Synflow()),
        FedSparsify(allocation=RateDistortion()),
        FedSparsify(criterion=Drift()),
    ):
        with pytest.raises(ConfigError, match="needs code of its own on clients"):
            Pruned(FedAvg(), method, net())
    with pytest.raises(ConfigError, match="not those of the model"):
        Pruned(FedAvg(), FedSparsify(), torch.nn.Linear(2, 2)).start(LoopGrid(), ArrayRecord(net().state_dict()))
    with pytest.raises(ConfigError, match="started with start"):
        Pruned(FedAvg(), FedSparsify(), net()).configure_train(1, ArrayRecord(), ConfigRecord(), LoopGrid())


def test_nodes_do_not_train_together():
    with pytest.raises(ConfigError, match="compute.together = 4: nodes train each by itself"):
        apps.serve(LoopGrid(), {"compute.together": 4, "data.clients": 4})


def test_a_process_that_serves_a_message_never_imports_the_compiler(tmp_path):
    """It would take longer than torch itself, for every message of a deployment."""
    code = """
import sys
from pathlib import Path
import secateur.flower
from secateur.federation import gathering, prepare
from secateur.study.study import parse_study
from secateur.wire.codec import encode
from secateur.wire.message import Message as Sparse
from secateur.contract.client import Client
made = parse_study({"data": {"clients": 4}})
serve = gathering.build(made.model_dump_json(), str(prepare.simulated(made, Path(sys.argv[1])))).participant
view = Client(0, serve.setting, serve.model, serve.data(0), made.training)
view.train({n: t.clone() for n, t in serve.model.state_dict().items()}, None, round_=1)
print(sorted(m for m in sys.modules if m in {"torch._dynamo", "torch._inductor", "sympy"}))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout.replace("'", '"')) == []


def test_the_study_of_a_run_config_is_that_of_the_command_line_with_the_guard_for_strangers():
    settings = {"method": "fedsparsify", "data.clients": 4, "wire.feedback": False}
    by_flower, _ = apps.study_of(settings)
    typed = {"method": "fedsparsify", "data": {"clients": 4}, "wire": {"feedback": False}}
    assert by_flower.hash() == parse_study({**typed, "guards": {"norms": {}}}).hash()
    off, _ = apps.study_of(
        {"method": "fedsparsify", "data.clients": 4, "wire.feedback": False, "guards.norms.on": False}
    )
    assert off.hash() == parse_study(typed).hash()


# ---- the examples


def quickstart(tmp_path, monkeypatch, *, patched):
    """Return the two apps of the quickstart example, with or without the diff that the documentation shows."""
    folder = tmp_path / ("after" if patched else "before")
    shutil.copytree(ROOT / "examples" / "quickstart", folder)
    if patched:
        diff = (folder / "fedsparsify.diff").read_bytes()
        subprocess.run(["patch", "-p1", "--quiet"], input=diff, cwd=folder, check=True)
    monkeypatch.syspath_prepend(folder)
    for name in [n for n in sys.modules if n.partition(".")[0] == "quickstart"]:
        monkeypatch.delitem(sys.modules, name)
    return importlib.import_module("quickstart.server_app").app, importlib.import_module("quickstart.client_app").app


def run_quickstart(apps_, rounds, folder, said):
    server, client = apps_
    config = {
        "num-server-rounds": rounds, "local-epochs": 1, "learning-rate": 0.05, "batch-size": 16,
        "save-to": str(folder / "model.pt"),
    }  # fmt: skip
    nodes = {k + 1: Node(client, k + 1, config, **{"partition-id": k, "num-partitions": 4}) for k in range(4)}
    server(LoopGrid(nodes), Context(1, 0, {}, RecordDict(), config))
    lines = [line for line in said() if "'eval_acc'" in line and "Aggregated" in line]
    accuracy = float(re.search(r"'eval_acc': ([\d.]+)", lines[-1]).group(1))
    return accuracy, torch.load(folder / "model.pt")


def test_the_quickstart_app_becomes_fedsparsify_by_five_changed_lines(tmp_path, monkeypatch, said):
    diff = (ROOT / "examples" / "quickstart" / "fedsparsify.diff").read_text()
    assert len([line for line in diff.splitlines() if re.match(r"\+(?!\+\+)", line)]) <= 5
    assert diff.strip() in (ROOT / "docs" / "flower.md").read_text()
    before, dense = run_quickstart(quickstart(tmp_path, monkeypatch, patched=False), 8, tmp_path, said)
    after, sparse = run_quickstart(quickstart(tmp_path, monkeypatch, patched=True), 8, tmp_path, said)
    kept = sum(int(t.count_nonzero()) for n, t in sparse.items() if n.endswith("weight"))
    total = sum(t.numel() for n, t in dense.items() if n.endswith("weight"))
    assert kept / total == pytest.approx(0.1, abs=0.002)
    assert before > 0.8
    assert after > before - 0.15


def hospitals(folder):
    """Return four folders, each with the rows of one hospital."""
    source = Path(__file__).parents[2] / "shared" / "data" / "heart_disease"
    if not source.is_dir():
        pytest.skip("the UCI heart disease data is not at hand (shared/data/heart_disease)")
    places = []
    for k, name in enumerate(("cleveland", "hungarian", "switzerland", "va")):
        places.append(folder / str(k))
        places[-1].mkdir(parents=True)
        shutil.copy(source / f"processed.{name}.data", places[-1])
    return places


def test_four_hospitals_train_together_and_keep_their_rows(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "hospitals")
    app = importlib.import_module("hospitals_app")
    text = tomllib.loads((ROOT / "examples" / "hospitals" / "pyproject.toml").read_text())
    settings = {**flatten_dict(text["tool"]["flwr"]["app"]["config"]), "out": str(tmp_path / "run"), "wait": 0.2}
    places, allow = hospitals(tmp_path), f"data.source={settings['data.source']}"
    nodes = {
        k + 1: Node(app.client, k + 1, settings, **{"partition-id": k, "data": str(place), "allow": allow})
        for k, place in enumerate(places)
    }
    summary = apps.serve(LoopGrid(nodes), settings)
    final = summary["final"]
    assert final["sparsity"] == pytest.approx(0.8, abs=0.01)
    assert final["accuracy"] > 0.72  # answering "ill" for everyone gives 0.55
    assert len(final["local"]) == 4
    assert not [p for p in (tmp_path / "run").rglob("*") if p.suffix in {".npy", ".data"}]


def test_flower_still_offers_what_the_engine_is_built_on():
    """Fail here, with names, when a release of Flower moves something; everything else would fail less clearly."""
    wanted = {
        Message: ["content", "reply_to", "dst_node_id", "message_type", "ttl"],
        messages.Array: ["dtype", "shape", "stype", "data"],
        FedAvg.start: ["grid", "initial_arrays", "num_rounds"],
        FedAvg.configure_train: ["server_round", "arrays", "config", "grid"],
        FedAvg.aggregate_train: ["server_round", "replies"],
    }
    for thing, names in wanted.items():
        found = inspect.signature(thing.__init__ if isinstance(thing, type) else thing).parameters
        assert set(names) <= set(found), f"{thing} takes {list(found)}"
    for name in ("get_node_ids", "push_messages", "pull_messages", "send_and_receive"):
        assert callable(getattr(messages.Grid, name))
    for name in ("to_torch_state_dict", "from_torch_state_dict"):
        assert hasattr(ArrayRecord, name)
    for name in ("src_node_id", "dst_node_id", "reply_to_message_id", "message_type", "ttl"):
        assert hasattr(Metadata, name)


def test_a_part_that_is_on_its_way_is_looked_for_every_second():
    from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError, pull_objects

    looks = []

    def pull(_name):
        looks.append(time.monotonic())
        if looks[-1] < looks[0] + 3.0:
            raise ObjectUnavailableError("it is still being sent")
        return b"it"

    messages.look_often()
    assert pull_objects(["x"], pull) == {"x": b"it"}
    assert len(looks) >= 5  # 0, 1/4, 3/4, 7/4, 11/4 and a last one, a fifth more or less; Flower's own: 0, 1, 3 s
    assert looks[1] - looks[0] < 1.0


def test_without_flower_an_error_names_the_extra(tmp_path):
    (tmp_path / "flwr.py").write_text("raise ModuleNotFoundError(\"No module named 'flwr'\", name='flwr')")
    code = "from secateur.flower import client_app"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "MissingExtraError" in done.stderr
    assert "pip install --upgrade '.[flower]' in a clone of secateur" in done.stderr
