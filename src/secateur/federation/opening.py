"""Opening an engine for a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from secateur.engines import Engine, Serve
from secateur.engines.local import LocalEngine
from secateur.engines.store import StateStore
from secateur.engines.workers import CLIENT
from secateur.study.runtime import Runtime

OpenEngine = Callable[..., Engine]


def open_local(
    make_serve: Callable[[], Serve], clients: int, runtime: Runtime, folder: Path, together: int = 1
) -> Engine:
    """Return the default engine: worker processes on this machine, with clients' states in the run's folder."""
    store = StateStore(folder / "clients", runtime.state_budget)
    return LocalEngine(
        make_serve, clients=clients, workers=runtime.workers, store=store, preload=CLIENT, together=together
    )
