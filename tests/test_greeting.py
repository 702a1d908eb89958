"""What nodes say of themselves: wrong forms, another's number, lies on rows, floods; each costs its own node alone."""

import json
import stat
import time

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed: pip install '.[flower]' in a clone of secateur")

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from helpers import model_of, rows_of, same
from loopgrid import LoopGrid, Node
from secateur.errors import CheckpointError, EngineError
from secateur.flower import apps, client_app, keys, messages
from secateur.flower.greeting import Greeting, GreetingError, about_this, most_say, read
from secateur.wire import head

pytestmark = [
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning"),
    pytest.mark.usefixtures("quick"),
]
SETTINGS = {
    "method": "fedavg", "rounds": 2, "data.clients": 3, "participation": 1.0, "data.partition": "iid",
    "model.name": "mlp", "model.options.hidden": "[8]", "training.epochs": 1, "wait": 0.5,
}  # fmt: skip
ROWS = {
    "inputs": [1, 8, 8], "outputs": 10, "kind": "image", "scale": 16.0, "task": "classification",
    "model": "0123456789abcdef", "classes": "",
}  # fmt: skip
SAID = {"client": 1, "own": False, **about_this(), **ROWS}
FLOOD = "A\x1b[31m\n[bold]\u202e" * 100_000


def grid_of(settings, clients=3, **config):
    own = {name: value if callable(value) else lambda _, v=value: v for name, value in config.items()}
    return LoopGrid({
        10 + k: Node(client_app(), 10 + k, settings, **{"partition-id": k, **{n: f(k) for n, f in own.items()}})
        for k in range(clients)
    })  # fmt: skip


class Liar(Node):
    """A node that answers each greeting with what it is given."""

    def __init__(self, number, make):
        super().__init__(client_app(), number, {})
        self.make = make

    def answer(self, message):
        self.asked += 1
        made = self.make(message)
        return Message(made, reply_to=message)


# ---- the form of a greeting


def test_a_whole_greeting_is_read():
    said = read(SAID)
    assert (said.client, said.own, said.data) == (1, False, "simulated")
    assert said.rows.shape.input_shape == (1, 8, 8)
    table = {"client": 0, "own": True, **about_this(), "holds": False}
    assert (read(table).data, read(table).rows) == ("a table", None)
    assert read({**SAID, "own": True}).data == "rows of its own"


@pytest.mark.parametrize(
    ("lie", "named"),
    [
        ({"client": True}, "client"), ({"client": -1}, "client"), ({"client": 10**6}, "client"),
        ({"client": "1"}, "client"), ({"client": 1.0}, "client"), ({"own": 1}, "own"), ({"own": None}, "own"),
        ({"holds": "yes"}, "holds"), ({"inputs": [10**9]}, "inputs.0"), ({"inputs": [0]}, "inputs.0"),
        ({"inputs": [1] * 9}, "inputs"), ({"inputs": [True]}, "inputs.0"), ({"inputs": 3}, "inputs"),
        ({"outputs": 2**20 + 1}, "outputs"), ({"scale": 0.0}, "scale"), ({"scale": float("nan")}, "scale"),
        ({"scale": float("inf")}, "scale"), ({"kind": "graph"}, "kind"), ({"task": "x" * 201}, "task"),
        ({"model": "0" * 15}, "model"), ({"model": FLOOD}, "model"), ({"classes": "zz"}, "classes"),
        ({"key": "abc"}, "key"), ({"proof": "A" * 10**7}, "proof"), ({"more": 1}, "more"), ({FLOOD: 1}, "A"),
        ({"wire": head.VERSION + 1}, "wire version"), ({"wire": True}, "wire version"),
        ({"wire": FLOOD}, "wire version"),
        ({"secateur": FLOOD, "wire": 0}, "wire version 0"), ({f"x{k}": k for k in range(40)}, "51 facts"),
    ],
    ids=lambda lie: str(lie)[:30],
)  # fmt: skip
def test_every_other_form_is_refused_in_one_short_line(lie, named):
    with pytest.raises(GreetingError) as found:
        read({**SAID, **lie})
    assert named in str(found.value)
    assert str(found.value).isprintable()
    assert len(str(found.value)) < 600


def test_what_most_nodes_say_counts_and_a_tie_is_no_view():
    assert most_say({0: "a", 1: "b", 2: "b"}, "x") == "b"
    with pytest.raises(EngineError, match=r"disagree on x.* a \(2 clients \(0, 3\)\), or b \(2 clients \(1, 2\)\)"):
        most_say({0: "a", 1: "b", 2: "b", 3: "a"}, "x")


# ---- keys


def test_a_key_is_made_once_is_the_nodes_own_and_proves_one_greeting(tmp_path):
    said = keys.proof(tmp_path / "state", "c1", 7, 3)
    path = tmp_path / "state" / "key-3"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys.proof(tmp_path / "state", "c2", 7, 3)["key"] == said["key"]
    greeting = Greeting(client=3, own=True, holds=True, **said)
    assert keys.proven(greeting, "c1", 7)
    assert not keys.proven(greeting, "c2", 7)  # another challenge
    assert not keys.proven(greeting, "c1", 8)  # another node
    assert not keys.proven(Greeting(client=2, own=True, holds=True, **said), "c1", 7)  # another number
    assert not keys.proven(Greeting(client=3, own=True, holds=True, key=said["key"]), "c1", 7)
    assert not keys.proven(Greeting(client=3, own=True, holds=True, key="00" * 40, proof=said["proof"]), "c1", 7)
    path.write_bytes(b"short")
    with pytest.raises(CheckpointError, match="key-3 is no key of 32 bytes"):
        keys.proof(tmp_path / "state", "c1", 7, 3)


def test_a_damaged_list_of_keys_is_one_line(tmp_path):
    for text in ("{", "[1]", '{"a": "b"}', "\x00"):
        (tmp_path / "nodes.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"nodes.json cannot be read"):
            keys.Owners(tmp_path / "nodes.json")


def test_a_number_is_its_keys_for_the_whole_run(tmp_path, said, monkeypatch):
    """The run is stopped; when it goes on, an impostor is there before the client's own node."""
    settings = {**SETTINGS, "out": str(tmp_path / "run")}
    grid = grid_of(settings, state=lambda k: str(tmp_path / f"state{k}"))

    def stop(row):
        if row["event"] == "row":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(apps, "_log", stop)
        apps.serve(grid, settings)
    assert set(json.loads((tmp_path / "run" / "nodes.json").read_text())) == {"0", "1", "2"}
    for number, state in ((1, None), (2, "elsewhere")):
        config = {} if state is None else {"state": str(tmp_path / state)}
        grid.nodes[number] = Node(client_app(), number, settings, **{"partition-id": 2, **config})
    twin = {"partition-id": 1, "state": str(tmp_path / "state1")}
    grid.nodes[20] = Node(client_app(), 20, settings, **twin)
    summary = apps.serve(grid, settings)
    lines = "\n".join(said())
    assert summary["left_out"] == {}
    for number in (1, 2):
        assert f"node {number} cannot take part: client 2 belongs to another node's key" in lines
    assert "node 20 cannot take part: two nodes with one key: node 11, which is client 1, has it too" in lines
    whole = {**SETTINGS, "out": str(tmp_path / "whole")}
    apps.serve(grid_of(whole), whole)
    assert same(model_of(tmp_path / "run"), model_of(tmp_path / "whole"))


def test_a_greeting_that_was_overheard_is_of_no_use(tmp_path, said):
    settings = {**SETTINGS, "out": str(tmp_path / "run")}
    grid = grid_of(settings, state=lambda k: str(tmp_path / f"state{k}"))
    heard, answer = [], grid.nodes[10].answer

    def overheard(message):
        reply = answer(message)
        if message.metadata.message_type == messages.HELLO:
            heard.append(reply.content)
        return reply

    grid.nodes[10].answer = overheard
    grid.nodes[30] = Liar(30, lambda _: heard[0])
    apps.serve(grid, settings)
    assert "node 30 cannot take part: it has not shown that its key is its own" in "\n".join(said())


# ---- hostile nodes beside honest ones


def replies():
    """Return what hostile nodes answer a greeting with."""
    about = [
        {}, {"client": 1}, {"client": 1, "wire": 2}, {**SAID, "client": "0"}, {**SAID, "inputs": [10**9]},
        {**SAID, FLOOD: 1},
        {**SAID, "model": FLOOD}, {"error": FLOOD}, {"error": "limit", "detail": FLOOD}, {**SAID, "key": "ab" * 32},
        {"client": 2, "own": True, **about_this(), "holds": True}, {**SAID, "client": 2}, {**SAID, "inputs": [2**20]},
    ]  # fmt: skip
    contents = [messages.pack(one) for one in about]
    contents += [
        RecordDict(), RecordDict({"about": MetricRecord({"client": 1.0})}), messages.pack(SAID, bytes(10**6)),
        RecordDict({"about": ConfigRecord({f"client{k}": k for k in range(10_000)})}),
        RecordDict({"about": ArrayRecord([np.ones(3)]), "payload": ConfigRecord(SAID)}), Error(2, FLOOD), Error(99, ""),
    ]  # fmt: skip
    return contents


def test_a_run_with_hostile_nodes_ends_as_without_them(tmp_path, said):
    """They are greeted before and after the honest nodes; one has the number of an honest node first."""
    settings = {**SETTINGS, "out": str(tmp_path / "run")}
    grid = grid_of(settings)
    lies = replies()
    for number, lie in enumerate(lies):
        grid.nodes[(number // 2 or 99) if number % 2 else 50 + number] = Liar(0, lambda _, lie=lie: lie)
    for number, node in grid.nodes.items():
        node.context.node_id = number
    summary = apps.serve(grid, settings)
    whole = {**SETTINGS, "out": str(tmp_path / "whole")}
    apps.serve(grid_of(whole), whole)
    assert summary["left_out"] == {}
    assert same(model_of(tmp_path / "run"), model_of(tmp_path / "whole"))
    for row, other in zip(rows_of(tmp_path / "run"), rows_of(tmp_path / "whole"), strict=True):
        assert row["each"] == other["each"]
        assert row["left_out"] == []
    lines = said()
    assert sum("cannot take part" in line for line in lines) >= len(lies)
    assert all(line.isprintable() and len(line) < 1_000 for line in lines)
    assert len((tmp_path / "run" / "run.log").read_bytes()) < 20_000


def test_who_was_kept_from_its_number_is_waited_for_once_the_liar_is_gone(tmp_path, monkeypatch):
    """Its second answer takes longer than an exchange waits for somebody who was just asked."""
    monkeypatch.setattr("secateur.flower.members._GREETING", 0.01)
    settings = {**SETTINGS, "wait": 60, "out": str(tmp_path / "run")}
    grid = grid_of(settings)
    grid.nodes[1] = Liar(1, lambda _: messages.pack({**SAID, "client": 2}))
    pull, greeted, since = grid.pull_messages, [], []

    def slow(asks):
        if grid.nodes[12].asked == 2 and not since:
            since.append(time.monotonic())
            greeted.extend(ask for ask in grid.replies if grid.replies[ask].metadata.src_node_id == 12)
        late = set(greeted) if since and time.monotonic() < since[0] + 1 else set()
        return pull([ask for ask in asks if ask not in late])

    grid.pull_messages = slow
    summary = apps.serve(grid, settings)
    assert summary["left_out"] == {}


def test_one_node_that_lies_about_its_rows_costs_itself_alone(tmp_path, said):
    """It is the lowest client; its width, task and classes would all be dictated before anybody else's are heard."""
    for k in range(3):
        x = np.random.default_rng(k).normal(size=(40, 3))
        (tmp_path / str(k)).mkdir()
        np.savez(tmp_path / str(k) / "rows.npz", x=x, y=(x[:, 0] > 0).astype(int))
    settings = {**SETTINGS, "data.source": "arrays", "out": str(tmp_path / "run")}
    grid = grid_of(settings, data=lambda k: str(tmp_path / str(k)))
    answer = grid.nodes[10].answer

    def lying(message):
        reply = answer(message)
        if message.metadata.message_type == messages.HELLO:
            about, _ = messages.unpack(reply.content)
            reply.content = messages.pack({**about, "inputs": [2**20], "task": "their_module:Task"})
        return reply

    grid.nodes[10].answer = lying
    summary = apps.serve(grid, settings)
    assert set(summary["left_out"]) == {"0"}
    assert any("node 10 (client 0) cannot take part: its inputs is [1048576], [3] is expected" in x for x in said())
    assert torch.isfinite(model_of(tmp_path / "run")["fc1.weight"]).all()
