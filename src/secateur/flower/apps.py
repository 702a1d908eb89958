"""secateur on Flower: a ServerApp that runs a study, beside a ClientApp that serves it with the same settings.

The run configuration of a Flower app holds a study's settings by their paths (``method``, ``training.lr``,
``schedule.sparsity``). Flower overrides only settings that an app declares, so that ``set`` holds more of them in one
text. Three settings are for the server: ``out``, ``deadline``, ``wait``. A node's own configuration has the number of
its client as ``partition-id``, the folder of its own data as ``data``, the folder of state that outlives a restart as
``state``, what a run may name beyond this package as ``allow`` (see ``policy``), and whether the node takes frozen
tensors from the server as ``base`` (see ``bases``).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.data.shards import Shape, open_shards
from secateur.errors import CheckpointError, ConfigError, EngineError, SecateurError
from secateur.federation import checkpoint, prepare, records, server
from secateur.federation.client import Participant
from secateur.federation.folder import STUDY, new_folder, read_study, reserve
from secateur.flower import tables
from secateur.flower.engine import FlowerEngine
from secateur.flower.memory import cache
from secateur.flower.messages import LOG, About, Context, Grid, ServerApp
from secateur.flower.node import facts_of
from secateur.flower.settings import study_of
from secateur.learning.task import TASKS
from secateur.study.runtime import Runtime
from secateur.study.study import Study
from secateur.wire import head

_RUN_ID = "flower-run"
_LONGEST = 300  # characters of an error


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
        ours = facts_of(Participant(study, open_shards(shards)))
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
        yield prepare.simulated(study, cache())
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
