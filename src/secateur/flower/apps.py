"""secateur on Flower: a ServerApp that runs a study, beside a ClientApp that serves it with the same settings.

The run configuration of a Flower app holds a study's settings by their paths (``method``, ``training.lr``,
``schedule.sparsity``). Flower overrides only settings that an app declares, so that ``set`` holds more of them in one
text. Four settings are for the server: ``out``, ``deadline``, ``wait``, ``link``. A node's own configuration has the
number of its client as ``partition-id``; what else its owner says there, or in a file, is told in ``site``.
"""

from __future__ import annotations

import contextlib
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.bandwidth import Bandwidth
from secateur.data.shards import open_shards
from secateur.errors import CheckpointError, ConfigError, EngineError, SecateurError
from secateur.federation import checkpoint, prepare, records, server
from secateur.federation.client import Participant
from secateur.federation.folder import STUDY, new_folder, read_study, reserve
from secateur.flower import keys, tables
from secateur.flower.engine import FlowerEngine
from secateur.flower.greeting import Greeting, Rows, facts_of, most_say, unlike
from secateur.flower.memory import cache
from secateur.flower.messages import LOG, Context, Grid, look_often
from secateur.flower.settings import study_of
from secateur.learning.task import TASKS
from secateur.study.runtime import Runtime
from secateur.study.study import Study

_RUN_ID = "flower-run"


def main(grid: Grid, context: Context) -> None:
    """Run the study of a run configuration into the folder ``out``.

    A stopped run of the same study in that folder is resumed. It has the same bits as an undisturbed one if the nodes
    still have their states.

    Raises:
        SystemExit: with 2, after one line in the log: it cannot.
    """
    try:
        serve(grid, context.run_config)
    except SecateurError as broken:
        LOG.error("%s", broken)
        raise SystemExit(2) from None


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
    engine = FlowerEngine(
        grid, clients=study.data.clients, run=_run_id(folder), wait=float(own.get("wait", 120)),
        owners=keys.Owners(folder / keys.KEYS), links=Bandwidth.parse(str(own["link"])) if "link" in own else None,
    )  # fmt: skip
    look_often()
    LOG.info("study %s (%s) into %s", study.hash(), study.method, folder)
    _wait_for_folder(folder, engine.wait)
    tables.recall(engine, folder)
    engine.meet(engine.clients())
    data = most_say({client: said.data for client, said in engine.members.about.items()}, "what their data is")
    engine.members.check(lambda said: _other(said, data))
    with tables.agree(engine, study, folder) if data == "a table" else _rows(study, engine.members.about) as shards:
        if data != "a table":
            ours = Rows.model_validate(facts_of(Participant(study, open_shards(shards))))
            engine.members.check(lambda said: _other(said, data) or unlike(said.rows, ours))
        engine.hear()  # whoever claimed a number that one of these had taken
        if not engine.members.nodes:
            raise EngineError(f"no node is left that can take part{engine.members.why()}")
        engine.members.settle()
        reserve(folder, study)
        return server.resume(folder, runtime, shards=shards, watch=_log, open_engine=lambda *_: engine)


def _other(said: Greeting, data: str) -> str | None:
    return None if said.data == data else f"its data is {said.data}, {data} is expected (data.source, or data= there)"


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
def _rows(study: Study, members: Mapping[int, Greeting]) -> Iterator[Path]:
    """Yield the server's shards: those of the simulated federation, or empty ones if nodes have data of their own."""
    if not any(said.own for said in members.values()):
        yield prepare.simulated(study, cache())
        return
    said = {client: rows.told for client, member in members.items() if (rows := member.rows) is not None}
    told = most_say(said, "the shape of their rows")
    rows = next(m.rows for m in members.values() if m.rows is not None and m.rows.told == told)
    if rows.task not in {*TASKS, study.data.task}:  # a node must not name code that this server imports
        raise EngineError(f"the nodes' rows are of task {rows.task!r}: if you trust it, set data.task to it")
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        yield prepare.bare(study, rows.shape, Path(folder))


def _log(row: records.Row) -> None:
    if row["event"] == "row":
        LOG.info("%s", records.line(row))
    elif row["event"] == "end":
        LOG.info("done: %s", {k: v for k, v in row["final"].items() if isinstance(v, float)})
