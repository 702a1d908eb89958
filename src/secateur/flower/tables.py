"""Tables on Flower: nodes with tables of their own agree on a schema, keep it, and are sent it again if they lost it.

A node keeps the schema where it keeps the server's frozen tensors: in the folder ``state`` of its configuration, or in
Flower's Context.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from secateur.data.schema import Schema
from secateur.data.shards import SCHEMA, Shape, Shards
from secateur.errors import DataError
from secateur.federation import agreement, checkpoint, prepare, seals, tables, trial
from secateur.federation.base import Kept, KeptInFolder
from secateur.federation.records import Row
from secateur.flower import limits
from secateur.flower.asked import Node
from secateur.flower.bases import KeptInContext
from secateur.flower.engine import FlowerEngine
from secateur.flower.site import Site
from secateur.study.study import Study

HOLDS, LACKS = "holds", "lacks"
"""What a node says of the schema that it is asked for: whether it holds it; in a reply, that it lacks it."""

_KEY = "secateur-schema"
_LONGEST = 64  # characters of a digest


def holds(node: Node, site: Site, wanted: str) -> bool:
    """Return whether a node holds the schema that it is asked for."""
    return _schema(node, site, wanted) is not None


def rows(node: Node, site: Site, study: Study, client: int, digest: str) -> Shards | None:
    """Return a node's rows, made by the schema of this digest; None if it no longer has the schema."""
    schema = _schema(node, site, digest)
    return None if schema is None else prepare.own(study, client, str(site.data), schema)


def answer(node: Node, site: Site, study: Study, client: int, request: bytes) -> bytes:
    """Return a node's reply to an ask of the agreement."""
    folder = str(site.data)
    table = prepare.own_source(study, client, folder).table
    if table is None:
        raise DataError(f"client {client}: it was asked about a table, and its data is none")
    everything = np.arange(len(table.ids))
    train = tables.held_out(study, prepare.alone(study, client, everything))["train"][client]

    def take(schema: Schema) -> str:
        rows = prepare.own(study, client, folder, schema)  # a table that does not fit is refused here
        trial.check(limits.participant(study, rows, client, site.most), (client,))
        _kept(node, site).put(schema.digest, schema.to_json().encode())
        return ""

    return agreement.Site(table.take(train), table, take).answer(request)


def _schema(node: Node, site: Site, digest: str) -> Schema | None:
    """Return the schema that a node keeps; None if it has none of this digest, or it is damaged."""
    data = _kept(node, site).get(digest) if digest.isalnum() and len(digest) <= _LONGEST else None
    if data is None or hashlib.sha256(data).hexdigest()[: len(digest)] != digest:
        return None
    return Schema.from_json(data.decode())


def _kept(node: Node, site: Site) -> Kept:
    if site.folder is None:
        return KeptInContext(node, _KEY)
    return KeptInFolder(site.folder / "schema", own=True)


def recall(engine: FlowerEngine, run: Path) -> None:
    """Let nodes be sent the schema of a run that goes on; a new run has none yet.

    Raises:
        CheckpointError, DataError: it is missing or damaged.
    """
    if (run / checkpoint.NAME).exists() and (run / SCHEMA).exists():
        schema = Schema.from_json(seals.checked(run, SCHEMA).decode(errors="replace"))
        engine.members.teach(schema.digest, agreement.last_request(schema))


@contextlib.contextmanager
def agree(engine: FlowerEngine, study: Study, run: Path) -> Iterator[Path]:
    """Let nodes agree on a schema, or read the one of a run that goes on; yield shards without rows by it.

    Raises:
        SecateurError: they do not agree, or too few answered.
    """
    if engine.members.schema[0]:
        schema, records = Schema.from_json(seals.checked(run, SCHEMA).decode()), list[Row]()
    else:
        clients = tuple(sorted(engine.members.nodes))
        agreed = agreement.settle(
            clients, engine.exchange, seed=study.seed, classes=tables.classes(study), notify=engine.members.leave_out
        )
        schema, records = agreed.schema, list(agreed.rows)
        engine.members.teach(schema.digest, agreement.last_request(schema))
    inputs, task = (len(schema.inputs),), study.data.task or schema.task
    shape = Shape(inputs, schema.outputs, "tabular", 1.0, task, schema.target_scale, schema.unit)
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        prepare.bare(study, shape, Path(folder))
        tables.write(Path(folder), schema, records)
        yield Path(folder)
