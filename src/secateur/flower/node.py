"""The client's side of secateur's app on Flower: what a node says of itself, and how it serves requests."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
from pathlib import Path
from typing import Any

import torch

from secateur.data import Source
from secateur.data.shards import Shape, Shards, open_shards
from secateur.errors import ConfigError, SecateurError
from secateur.federation import prepare, trial
from secateur.federation.client import Participant
from secateur.flower import bases, policy, tables
from secateur.flower.memory import Memory, cache
from secateur.flower.messages import HELLO, LOG, SERVE, About, ClientApp, Context, Message, pack, unpack
from secateur.flower.settings import settings_of
from secateur.streams import kept_globals
from secateur.study.study import Study, parse_study
from secateur.wire import head

_LONGEST, _SHORT = 300, 80  # characters of an error, of a setting in it
_SHOWN = 8  # settings that the node's log names


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
    return {"client": client, "own": "data" in context.node_config, **facts_of(participant)}


def facts_of(participant: Participant) -> About:
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
        return _opened(prepare.simulated(study, cache()))
    with tables.unsaid(client):
        return prepare.own(study, client, str(data))


def _permitted(context: Context) -> Study:
    """Return the study of a run, after checking that it names nothing that the node's owner has not allowed.

    Raises:
        ConfigError: it names such a thing, or its settings are wrong. The error names the first such setting; the
            node's log names all, and says how its owner would allow them.
    """
    values, node = settings_of(context.run_config), context.node_config
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
    memory = Memory(context, str(about["run"]), client)
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
