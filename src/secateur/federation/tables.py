"""Rows of tables: sites agree on a schema, by which their tables become the rows of a federation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from secateur.data.raw_table import RawTable
from secateur.data.schema import Schema
from secateur.data.shards import SCHEMA, split
from secateur.data.sources import Source
from secateur.errors import DataError
from secateur.federation import checkpoint
from secateur.federation.agreement import PHASE, Agreed, Site, settle
from secateur.federation.records import Row
from secateur.learning import task as tasks
from secateur.study.study import Study

_RECORDS = "agreement.json"


def simulated(study: Study, source: Source, table: RawTable, parts: Sequence[np.ndarray]) -> tuple[Source, Agreed]:
    """Return the rows of a simulated federation, and what its clients agreed on.

    The server's test rows are those of all clients. Requests and replies are encoded as anywhere.

    Args:
        study: the study.
        source: of the table.
        table: its rows.
        parts: the rows of each client.

    Raises:
        DataError: nothing is held out for a test, or a client's table does not fit.
    """
    if not study.data.test_fraction:
        raise DataError("a table has no test part of its own: set data.test_fraction above 0")
    held = held_out(study, parts)
    sites = {who: Site(table.take(held["train"][who]), table.take(rows)) for who, rows in enumerate(parts)}

    def carry(requests: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        return ((who, sites[who].answer(request)) for who, request in requests)

    agreed = settle(tuple(sites), carry, seed=study.seed, classes=classes(study))
    left = {entry["client"]: entry["reason"] for row in agreed.rows for entry in row["left_out"]}
    if left:
        who = min(left)
        raise DataError(f"client {who} ({_sites(table, table.ids[parts[who]])}): {left[who]}")
    made = made_by(agreed.schema, source, table, study)
    test = np.concatenate(held["local"])
    return replace(made, x_test=made.x_train[test], y_test=made.y_train[test]), agreed


def _sites(table: RawTable, ids: np.ndarray) -> str:
    return ", ".join(table.sites[place] for place in np.unique(ids).tolist())


def held_out(study: Study, parts: Sequence[np.ndarray]) -> Mapping[str, list[np.ndarray]]:
    """Return which of its rows each client trains on and holds out; the same as in ``make_shards``."""
    section = study.data
    return split(
        parts, test_fraction=section.test_fraction, validation_fraction=section.validation_fraction, seed=study.seed
    )


def made_by(schema: Schema, source: Source, table: RawTable, study: Study) -> Source:
    """Return a source with the rows that a schema makes of a table; there is no test part.

    Raises:
        DataError: the table does not fit the schema.
    """
    x, y = schema.rows(schema.raw(table)), schema.targets(table)
    return replace(
        source, x_train=x, y_train=y, x_test=x[:0], y_test=y[:0], outputs=schema.outputs,
        task=study.data.task or schema.task, target_scale=schema.target_scale, unit=schema.unit, table=None,
        remarks=(*source.remarks, *schema.remarks),
    )  # fmt: skip


def classes(study: Study) -> bool | None:
    """Return whether the study's task learns one of several classes; None if it names none."""
    return tasks.find(study.data.task).classes if study.data.task else None


def write(folder: Path, schema: Schema, rows: Sequence[Row]) -> None:
    """Write a schema, and the records of the asks that led to it, beside the rows that it made."""
    (folder / SCHEMA).write_text(schema.to_json(), "utf-8")
    (folder / _RECORDS).write_text(json.dumps(list(rows)), "utf-8")


def with_resent(row: Row, resent: Mapping[int, tuple[int, int]]) -> Row:
    """Return a record with the bytes by which clients were sent the schema beside its exchange."""
    if not resent:
        return row
    each = {who: [who, down, up] for who, down, up in row["each"]}
    for who, (down, up) in resent.items():
        _, *before = each.get(who, [who, 0, 0])
        each[who] = [who, before[0] + down, before[1] + up]
    down, up = (sum(part[way] for part in resent.values()) for way in (0, 1))
    return row | {
        "bytes_down": row["bytes_down"] + down, "bytes_up": row["bytes_up"] + up,
        "down": {**row["down"], PHASE: down}, "up": {**row["up"], PHASE: up},
        "each": [each[who] for who in sorted(each)],
    }  # fmt: skip


def begin(rows: Path, run: Path) -> list[Row]:
    """Copy the schema that lies beside some rows to a run's folder; return the records of the asks that led to it.

    Raises:
        CheckpointError: it cannot be written.
    """
    if not (rows / SCHEMA).exists():
        return []
    checkpoint.put(run, SCHEMA, (rows / SCHEMA).read_bytes())
    return list(json.loads((rows / _RECORDS).read_text("utf-8")))
