"""secateur on Flower: a ServerApp that runs a study and a ClientApp that serves it, with the same settings.

The run configuration of a Flower app holds a study's settings by their paths (``method``, ``training.lr``,
``schedule.sparsity``). Flower overrides only settings that an app declares, so that ``set`` holds more of them in one
text. Three settings are for the server: ``out``, ``deadline``, ``wait``. A node's own configuration has the number of
its client as ``partition-id``, the folder of its own data as ``data``, the folder of state that outlives a restart as
``state``, what a run may name beyond this package as ``allow`` (see ``policy``), and whether the node takes frozen
tensors from the server as ``base`` (see ``bases``).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import secrets
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from secateur.data import Source
from secateur.data.shards import Shape, Shards, open_shards
from secateur.errors import CheckpointError, ConfigError, EngineError, SecateurError
from secateur.federation import checkpoint, prepare, records, server, trial
from secateur.federation.client import Participant
from secateur.federation.folder import STUDY, new_folder, read_study, reserve
from secateur.flower import bases, policy, tables
from secateur.flower.engine import (
    HELLO,
    LOG,
    SERVE,
    About,
    Array,
    ArrayRecord,
    ClientApp,
    Context,
    FlowerEngine,
    Grid,
    Message,
    ServerApp,
    pack,
    unpack,
)
from secateur.learning.task import TASKS
from secateur.streams import kept_globals
from secateur.study.runtime import Runtime
from secateur.study.study import Study, assign, parse_study, where_nobody_is_known
from secateur.wire import head

_SERVERS = ("out", "deadline", "wait")
_RUN_ID = "flower-run"
_LONGEST, _SHORT = 300, 80  # characters of an error, of a setting in it
_SHOWN = 8  # settings that the node's log names


def study_of(run_config: Mapping[str, Any]) -> tuple[Study, dict[str, Any]]:
    """Return the study of a Flower run configuration, and the settings of the server.

    Raises:
        ConfigError: a setting is unknown or out of bounds.
    """
    study = parse_study(_settings(run_config))
    if not study.data.clients:
        raise ConfigError("data.clients: say how many nodes there are, such as data.clients=4")
    return study, {name: run_config[name] for name in _SERVERS if run_config.get(name)}


def _settings(run_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the study's settings as nested mappings, without importing or opening anything that they name."""
    values: dict[str, Any] = {}
    for path, value in run_config.items():
        if path not in {*_SERVERS, "set"}:
            assign(values, f"{path}={value}")
    for setting in shlex.split(str(run_config.get("set", ""))):
        assign(values, setting)
    return where_nobody_is_known(values)


# ---- the server


def server_app() -> ServerApp:
    """Return a ServerApp that runs the study of its run configuration into the folder ``out``.

    A stopped run of the same study in that folder is resumed. It has the same bits as an undisturbed one if the nodes
    still have their states.
    """
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator, unused-ignore]
    def main(grid: Grid, context: Context) -> None:
        try:
            serve(grid, context.run_config)
        except SecateurError as broken:
            LOG.error("%s", broken)
            raise SystemExit(2) from None

    return app


def serve(grid: Grid, run_config: Mapping[str, Any]) -> dict[str, Any]:
    """Run a study on the nodes of a grid; return its summary.

    Raises:
        SecateurError: the settings do not fit, the folder holds another study, or no node can take part.
    """
    study, own = study_of(run_config)
    if study.compute.together > 1:
        raise ConfigError(f"compute.together = {study.compute.together}: nodes train each by itself; set it to 1")
    folder = _folder(study, own.get("out"))
    runtime = Runtime(workers=0, deadline=float(own["deadline"]) if "deadline" in own else None)
    engine = FlowerEngine(grid, clients=study.data.clients, run=_run_id(folder), wait=float(own.get("wait", 120)))
    LOG.info("study %s (%s) into %s", study.hash(), study.method, folder)
    _wait_for_folder(folder, engine.wait)
    tables.recall(engine, folder)
    engine.members.check(_versions)
    engine.meet(engine.clients())
    rows = tables.agree(engine, study, folder) if tables.any_in(engine) else _rows(study, engine.members.about)
    with rows as shards:
        ours = _about(Participant(study, open_shards(shards)))
        engine.members.check(lambda about: _versions(about) or _unlike(about, ours, bool(engine.members.schema[0])))
        if not engine.members.nodes:
            raise EngineError(f"no node is left that can take part{engine.members.why()}")
        reserve(folder, study)
        return server.resume(folder, runtime, shards=shards, watch=_log, open_engine=lambda *_: engine)


def _folder(study: Study, out: object) -> Path:
    folder = Path(str(out)).expanduser() if out else new_folder(study, None)
    folder = folder.absolute()
    if (folder / STUDY).exists() and read_study(folder).hash() != study.hash():
        raise ConfigError(f"out = {folder} holds a run of another study; give another folder")
    return folder


def _wait_for_folder(folder: Path, seconds: float) -> None:
    """Wait until an earlier ServerApp, which may outlive its SuperLink, has released the folder."""
    end = time.monotonic() + seconds
    while True:
        try:
            with checkpoint.alone(folder):
                return
        except CheckpointError:
            if time.monotonic() >= end:
                raise
            time.sleep(1)


def _run_id(folder: Path) -> str:
    """Return the name of this run for its nodes, which is the same after a restart."""
    path = folder / _RUN_ID
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write(path, secrets.token_hex(8).encode())
    return path.read_text("ascii")


@contextlib.contextmanager
def _rows(study: Study, members: Mapping[int, About]) -> Iterator[Path]:
    """Yield the server's shards: those of the simulated federation, or empty ones if nodes have data of their own."""
    own = {bool(about["own"]) for about in members.values()}
    if len(own) > 1:
        raise EngineError("some nodes have data of their own (data= in their node configuration), others have not")
    if own == {False}:
        yield prepare.simulated(study, _cache())
        return
    first = members[min(members)]
    if first["task"] not in {*TASKS, study.data.task}:  # a node must not name code that this server imports
        raise EngineError(f"the nodes' rows are of task {first['task']!r}: if you trust it, set data.task to it")
    inputs = tuple(int(size) for size in first["inputs"])
    shape = Shape(inputs, **{name: first[name] for name in ("outputs", "kind", "scale", "task", "classes")})
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        yield prepare.bare(study, shape, Path(folder))


# What a node says of itself: facts that must be there before any of them is used, with their types.
_FACTS: Mapping[str, type | tuple[type, ...]] = {
    "own": bool, "inputs": list, "outputs": int, "kind": str, "scale": (int, float), "task": str, "model": str,
    "classes": str,
}  # fmt: skip
_LARGEST_SIZE, _MOST_SIZES = 2**20, 9


def _versions(about: About) -> str | None:
    if about.get("wire") != head.VERSION:
        return (
            f"it has secateur {about.get('secateur')} (wire version {about.get('wire')}), this server "
            f"{importlib.metadata.version('secateur')} ({head.VERSION}): install the same on both"
        )
    if about.get("table") is True:  # what such a node holds is agreed on later
        return None if isinstance(about.get(tables.HOLDS), bool) else "its introduction is of another type"
    wrong = [name for name, kind in _FACTS.items() if not isinstance(about.get(name), kind)]
    if wrong:
        return f"its introduction lacks {wrong[0]!r}, or it is of another type"
    sizes = [*about["inputs"], about["outputs"]]
    if not all(isinstance(size, int) and 1 <= size <= _LARGEST_SIZE for size in sizes) or len(sizes) > _MOST_SIZES:
        return f"its rows cannot have the shape {str(about['inputs'])[:_LONGEST]} and {about['outputs']} outputs"
    return None


def _unlike(about: About, ours: About, table: bool) -> str | None:  # noqa: FBT001 -- private
    if table or about.get("table"):
        kinds = {True: "a table", False: "no table"}
        own = bool(about.get("table"))
        return None if own == table else f"its data is {kinds[own]}, {kinds[table]} is expected (data.source)"
    differs = [name for name in _FACTS if name != "own" and about[name] != ours[name]]
    if not differs:
        return None
    what = "digest of the names of classes" if differs[0] == "classes" else differs[0]
    return f"its {what} is {about[differs[0]]}, {ours[differs[0]]} is expected (another model or other data)"


def _log(row: records.Row) -> None:
    if row["event"] == "row":
        LOG.info("%s", records.line(row))
    elif row["event"] == "end":
        LOG.info("done: %s", {k: v for k, v in row["final"].items() if isinstance(v, float)})


# ---- the client


def client_app() -> ClientApp:
    """Return a ClientApp that serves the study of its run configuration."""
    app = ClientApp()

    @app.query(HELLO.partition(".")[2])  # type: ignore[untyped-decorator, unused-ignore]
    def hello(message: Message, context: Context) -> Message:
        wanted = str(unpack(message.content)[0].get("schema", ""))
        return _answered(message, lambda: pack(_introduce(context, wanted)))

    @app.train(SERVE.partition(".")[2])  # type: ignore[untyped-decorator, unused-ignore]
    def train(message: Message, context: Context) -> Message:
        return _answered(message, lambda: _serve(message, context))

    return app


def _answered(message: Message, make: Any) -> Message:
    try:
        content = make()
    except Exception as broken:  # noqa: BLE001 -- logged here and sent to the server, which leaves this client out
        line = " ".join(str(broken).split())
        line = line if isinstance(broken, SecateurError) else f"{type(broken).__name__}: {line}"
        LOG.error("%s", line[: tables.LOGGED])
        content = pack({"error": line[:_LONGEST]})
    return Message(content, reply_to=message)


def _introduce(context: Context, wanted: str = "") -> About:
    """Return what a node says of itself, after a trial of its first steps; see ``federation.trial``.

    A node with a table tries them when it is sent the schema, by which its rows are made.
    """
    client, study, source = _place(context)
    if source is not None and source.table is not None:
        return {"client": client, "own": True, **tables.about(context, wanted)}
    rows = _shards(context, client, study)
    for remark in rows.meta.remarks:
        LOG.info("%s", remark)
    participant = _participant(study.model_dump_json(), rows)
    trial.check(participant, (client,))
    return {"client": client, "own": "data" in context.node_config, **_about(participant)}


def _about(participant: Participant) -> About:
    """Return the facts that must agree on all nodes; ``model`` is a hash of tensors' names, shapes and dtypes."""
    shape, specs = Shape.of(participant.shards), participant.setting.specs
    text = ";".join(f"{name} {specs[name].shape} {specs[name].dtype}" for name in sorted(specs))
    return {
        "secateur": importlib.metadata.version("secateur"), "wire": head.VERSION,
        "inputs": list(shape.input_shape), "outputs": shape.outputs, "kind": shape.kind, "scale": shape.scale,
        "task": shape.task, "model": hashlib.sha256(text.encode()).hexdigest()[:16], "classes": shape.classes,
    }  # fmt: skip


def _place(context: Context) -> tuple[int, Study, Source | None]:
    """Return the number of this node's client, its study, and its own data, if it has any."""
    study = _permitted(context)
    number = context.node_config.get("partition-id")
    if not isinstance(number, int) or not 0 <= number < study.data.clients:
        raise ConfigError(
            f"partition-id = {number!r}: start this SuperNode with --node-config 'partition-id=K', "
            f"K from 0 to {study.data.clients - 1}"
        )
    data = context.node_config.get("data")
    with tables.unsaid(number):
        return number, study, None if data is None else prepare.own_source(study, number, str(data))


def _shards(context: Context, client: int, study: Study) -> Shards:
    """Return the rows of a node that are not made by a schema."""
    data = context.node_config.get("data")
    if data is None:
        return _opened(prepare.simulated(study, _cache()))
    with tables.unsaid(client):
        return prepare.own(study, client, str(data))


def _permitted(context: Context) -> Study:
    """Return the study of a run, after checking that it names nothing that the node's owner has not allowed.

    Raises:
        ConfigError: it names such a thing, or its settings are wrong. The error names the first such setting; the
            node's log names all, and says how its owner would allow them.
    """
    values, node = _settings(context.run_config), context.node_config
    owners = policy.allowed(str(node.get(policy.ALLOW, ""))) | policy.allowed(os.environ.get(policy.ENVIRONMENT, ""))
    refused = policy.refused(values, owners, own="data" in node)
    names = [f"{path}={value}" for path, value in refused]
    for name in names[:_SHOWN]:
        LOG.error(
            "not allowed here: %r. Of itself a node takes what is secateur's own, and opens its own data folder only; "
            "name what else you trust in --node-config '%s=\"PATH=VALUE ...\"', or in the environment's %s",
            name[:_LONGEST], policy.ALLOW, policy.ENVIRONMENT,
        )  # fmt: skip
    if names:
        raise ConfigError(f"not allowed by the node's owner: {names[0][:_SHORT]!r}")
    return parse_study(values)


def _serve(message: Message, context: Context) -> Any:
    client, study, source = _place(context)
    about, request = unpack(message.content)
    if request is None or about.get("client") != client:
        raise ConfigError(f"a request for client {about.get('client')} came to client {client}")
    if source is None or source.table is None:
        rows = _shards(context, client, study)
    elif not about.get("schema"):
        return pack({"lost": False}, tables.answer(context, study, client, request))
    elif (made := tables.rows(context, study, client, str(about["schema"]))) is not None:
        rows = made
    else:
        return pack({tables.LACKS: True})
    memory = _Memory(context, str(about["run"]), client)
    wanted = str(about["kept"])
    state = memory.get(wanted)
    participant = _participant(study.model_dump_json(), rows)
    participant.kept = bases.kept(context)
    with kept_globals():
        reply, kept = participant(client, request, state)
    answer: About = {"lost": bool(wanted) and state is None}
    if kept is not None:
        answer["kept"] = memory.put(kept, after=wanted)
    return pack(answer, reply)


@functools.lru_cache(maxsize=1)
def _participant(study: str, rows: Shards) -> Participant:
    # one torch thread: the split of a reduction over threads would change its last bits
    torch.set_num_threads(1)
    return Participant(Study.model_validate_json(study), rows)


@functools.lru_cache(maxsize=1)
def _opened(folder: Path) -> Shards:
    return open_shards(folder)


class _Memory:
    """The states of a client in a run, by name: in the folder ``state`` of the node configuration, or in the Context.

    Two states are kept, the one before a request and the one after it, in case the reply gets lost.
    """

    def __init__(self, context: Context, run: str, client: int) -> None:
        place = context.node_config.get("state")
        self._folder = None if place is None else Path(str(place)).expanduser() / f"{_plain(run)}-{client}"
        self._records = context.state
        self._key = f"secateur-{run}"

    def get(self, name: str) -> bytes | None:
        if not name:
            return None
        if self._folder is not None:
            path = self._folder / _plain(name)
            data = path.read_bytes() if path.exists() else None
            # a damaged state is a lost one: its name is the digest of what was written
            return data if data is not None and self._name(data) == name else None
        held = self._records.get(self._key)
        array = held.get(name) if isinstance(held, ArrayRecord) else None
        return None if array is None else array.data

    @staticmethod
    def _name(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()[:16]

    def put(self, data: bytes, *, after: str) -> str:
        name = self._name(data)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write(self._folder / name, data)
            for path in self._folder.iterdir():
                if path.name not in {name, after}:
                    path.unlink()
            return name
        before = self.get(after)
        kept = {name: data} if before is None else {after: before, name: data}
        self._records[self._key] = ArrayRecord(
            {n: Array("uint8", (len(d),), "secateur.state", d) for n, d in kept.items()}
        )
        return name


def _plain(name: str) -> str:
    """Return a name that came over the wire, if it is safe as a file name."""
    if not name.isalnum() or not name.isascii():
        raise ConfigError(f"{name[:40]!r} does not name a run or a state")
    return name


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secateur"
