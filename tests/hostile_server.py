"""A server that wants more of a node than its owner allows: each try, and what the node did, under an audit hook.

    python hostile_server.py FOLDER

It prints a line of JSON for each try: what was tried, the code that the node said, the lines of its log, and all that
the process opened, listed, changed, imported, started or connected to meanwhile.
"""

import json
import logging
import resource
import sys
import time
from pathlib import Path

import numpy as np

from loopgrid import LoopGrid, Node
from secateur.federation import prepare as rows
from secateur.flower import client_app, limits, messages
from secateur.flower.settings import study_of
from secateur.flower.site import Most
from secateur.wire.codec import encode
from secateur.wire.message import Message

POLICY = """
sources = ["arrays", "images"]
methods = ["fedavg"]
models = ["mlp"]
answers = ["train", "evaluate"]

[most]
epochs = 3
rows = 500
seconds = 60
bytes = 100_000
parameters = 5_000
"""
SETTINGS = {
    "method": "fedavg", "rounds": 2, "data.clients": 2, "data.source": "arrays", "data.partition": "iid",
    "model.name": "mlp", "model.options.hidden": "[4]", "training.epochs": 1,
}  # fmt: skip
TRAP = "from pathlib import Path\n(Path(__file__).parent / 'imported').touch()\n"
WATCHED = ("os.", "shutil.", "subprocess.", "socket.", "open", "import", "ctypes.dlopen", "tempfile.", "urllib.")


def prepare(folder):
    """Write the node's rows and policy, and beside them what no server is to reach."""
    rng = np.random.default_rng(0)
    for place, count in (("data", 300), ("secret", 50)):
        (folder / place).mkdir(parents=True)
        np.savez(folder / place / "rows.npz", x=rng.normal(size=(count, 5)), y=rng.integers(0, 2, count))
    (folder / "data" / "a").mkdir()  # a class, of images
    (folder / "data" / "secateur.toml").write_text(POLICY)
    (folder / "secret" / "key.txt").write_text("a secret\n")
    (folder / "traps" / "trap_package").mkdir(parents=True)
    for name in ("trap_module.py", "trap_package/__init__.py", "trap_package/method.py"):
        (folder / "traps" / name).write_text(TRAP)
    sys.path.insert(0, str(folder / "traps"))


def tries(folder):
    """Yield each try: a name, the run's settings that differ, the facts of a request that differ, and its payload."""
    for path, value in (
        ("method", "trap_module"), ("method", "trap_package.method"), ("method", "os.path"), ("method", "fedsparsify"),
        ("model.name", "trap_module:net"), ("model.name", "twocnn"), ("aggregator", "trap_module:Slot"),
        ("set", "'options.aggregator=trap_module:Slot'"), ("data.source", "trap_module:read"),
        ("data.source", "shutil:rmtree"), ("data.source", "text:/etc/passwd"),
        ("data.source", f"arrays:{folder}/secret/rows.npz"), ("data.source", "arrays:../secret"),
        ("data.source", "hub:mnist"), ("data.source", "table"), ("guards.trap_module.norm", 1),
        ("data.task", "trap_module:Slot"), ("attack", "trap_module:0.3"),
    ):  # fmt: skip
        yield "allow", f"{path}={value}", {path: value}, {}, None
    hidden = ", ".join(["4"] * 5_000)
    for code, path, value in (
        ("limit", "training.epochs", 10**9), ("limit", "training.epochs", 3), ("limit", "set", "x" * 10**6),
        ("limit", "model.options.hidden", "[100000, 100000]"), ("limit", "model.options.hidden", f"[{hidden}]"),
        ("settings", "compute.together", 8), ("settings", "set", "'unclosed"), ("settings", "training.lrr", 1),
        ("data", "data.options.classes", '["a", "../secret"]'), ("model", "model.options.hidden", "[-1]"),
    ):  # fmt: skip
        images = {"data.source": "images"} if "classes" in path else {}
        yield code, f"{path}={str(value)[:40]}", {path: value, **images}, {}, None
    asks = Message({}, None, {"phase": "train", "round": 1})
    explores = encode(Message({}, None, {"phase": "explore", "round": 1}))
    for code, name, facts, payload in (
        ("limit", "a request of 200 kB", {}, bytes(200_000)), ("request", "another's number", {"client": 1}, b"x"),
        ("request", "a run named ../../x", {"run": "../../x"}, encode(asks)),
        ("request", "a run of 100,000 letters", {"run": "x" * 100_000}, encode(asks)),
        ("request", "a state named ../../secret/key.txt", {"kept": "../../secret/key.txt"}, encode(asks)),
        ("request", "no payload of ours", {}, b"\x80\x04garbage"), ("answers", "an exploration", {}, explores),
        ("request", "a training of no tensors", {}, encode(asks)),
    ):  # fmt: skip
        yield code, name, {}, facts, payload


class Seen(logging.Handler):
    """The lines of the node's log."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def asked(folder, settings, facts, payload):
    """Send one message to a node; return what it says."""
    config = {"partition-id": 0, "data": str(folder / "data"), "state": str(folder / "state")}
    grid = LoopGrid({1: Node(client_app(), 1, settings, **config)})
    about = {"run": "r", "client": 0, "kept": "", "schema": "", **facts}
    kind = messages.HELLO if payload is None else messages.SERVE
    (ask,) = grid.push_messages([messages.Message(messages.pack(about, payload), 1, kind)])
    (reply,) = grid.pull_messages([ask])
    return messages.unpack(reply.content)[0]


def main():
    folder = Path(sys.argv[1])
    prepare(folder)
    assert asked(folder, SETTINGS, {}, None)["client"] == 0  # a run that is allowed, for what is imported once
    study, _ = study_of(SETTINGS)
    weights = limits.participant(study, rows.own(study, 0, str(folder / "data")), 0, Most()).initial
    request = encode(Message(dict(weights), None, {"phase": "train", "round": 1}))
    assert asked(folder, SETTINGS, {}, request) == {"lost": False}
    log, events, watching = Seen(), [], [False]
    logging.getLogger("flwr").addHandler(log)
    logging.getLogger("flwr").propagate = False

    def hook(event, given):
        if watching[0] and event.startswith(WATCHED):
            events.append([event, [str(one) for one in given]])

    sys.addaudithook(hook)
    link = folder / "data" / "link.npz"
    for code, name, settings, facts, payload in [*tries(folder), ("data", "a link out of the folder", {}, {}, None)]:
        if "link" in name:
            link.symlink_to(folder / "secret" / "rows.npz")
        events.clear()
        log.lines.clear()
        before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        watching[0] = True
        said = asked(folder, {**SETTINGS, **settings}, facts, payload)
        watching[0] = False
        cost = time.process_time() - before[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before[1]
        sys.stdout.write(json.dumps({
            "try": name, "expected": code, "said": said, "log": log.lines, "events": events, "seconds": cost[0],
            "memory": cost[1] * 1024, "modules": [module for module in sys.modules if module.startswith("trap_")],
        }) + "\n")  # fmt: skip
    assert (folder / "data" / "rows.npz").exists()


if __name__ == "__main__":
    main()
