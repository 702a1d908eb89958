"""Opening an engine for a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from secateur.engines import Engine, Serve
from secateur.engines.local import LocalEngine
from secateur.engines.relays import RelayEngine
from secateur.engines.store import StateStore
from secateur.engines.workers import CLIENT
from secateur.errors import ConfigError
from secateur.federation import relays
from secateur.study.runtime import Runtime

OpenEngine = Callable[..., Engine]
_RELAY = (*CLIENT, "secateur.federation.relays")


def open_local(
    make_serve: Callable[[], Serve], clients: int, runtime: Runtime, folder: Path, together: int = 1
) -> Engine:
    """Return the default engine: processes on this machine, with clients' states in the run's folder."""
    store = StateStore(folder / "clients", runtime.state_budget)
    if not runtime.relays:
        return LocalEngine(
            make_serve, clients=clients, workers=runtime.workers, store=store, preload=CLIENT, together=together
        )
    workers = -(-runtime.workers // runtime.relays)
    make_relay = partial(relays.build, make_serve, clients, workers, together)
    return RelayEngine(
        make_relay, clients=clients, relays=runtime.relays, workers=workers, store=store, preload=_RELAY,
        together=together,
    )  # fmt: skip


def check_relays(runtime: Runtime, clients: int) -> None:
    """Refuse more relays than clients.

    Raises:
        ConfigError: there are.
    """
    if runtime.relays > clients:
        raise ConfigError(f"relays = {runtime.relays}: there are {clients} clients; a relay must have one at least")
