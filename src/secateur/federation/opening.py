"""Opening an engine for a run, and what is refused before."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path

import torch

from secateur.contract.method import Method
from secateur.contract.state import Setting
from secateur.data.shards import Shards
from secateur.engines import Engine, Serve
from secateur.engines.local import LocalEngine
from secateur.engines.relays import RelayEngine
from secateur.engines.store import StateStore
from secateur.engines.workers import CLIENT
from secateur.errors import ConfigError
from secateur.federation import attackers, relays
from secateur.pruning.mask import Tensors
from secateur.study.runtime import Runtime
from secateur.study.study import Study

OpenEngine = Callable[..., Engine]
_RELAY = (*CLIENT, "secateur.federation.relays")


def open_local(
    make_serve: Callable[[], Serve], clients: int, runtime: Runtime, folder: Path, together: int = 1,
    start: BaseContext | None = None,
) -> Engine:  # fmt: skip
    """Return the default engine: processes on this machine, with clients' states in the run's folder.

    Args:
        make_serve: see ``LocalEngine``.
        clients: how many there are.
        runtime: how many workers and relays.
        folder: the run's folder.
        together: clients that a worker serves at once.
        start: how workers are started; None: as this system does it best.
    """
    store = StateStore(folder / "clients", runtime.state_budget)
    if not runtime.relays:
        return LocalEngine(
            make_serve, clients=clients, workers=runtime.workers, store=store, preload=CLIENT, together=together,
            start=start,
        )  # fmt: skip
    workers = -(-runtime.workers // runtime.relays)
    make_relay = partial(relays.build, make_serve, clients, workers, together)
    return RelayEngine(
        make_relay, clients=clients, relays=runtime.relays, workers=workers, store=store, preload=_RELAY,
        together=together,
    )  # fmt: skip


def forking() -> BaseContext | None:
    """Return how processes start that find this process's objects: as copies of it; None: that is not safe here.

    A copy computes in one thread, and takes no lock that a thread of this process may hold. Torch refuses gradients in
    copies of a process that drives a GPU, and the libraries of macOS break in copies.
    """
    if not sys.platform.startswith("linux") or torch.cuda.is_available():
        return None
    return multiprocessing.get_context("fork")


def check_begin(
    study: Study, runtime: Runtime, method: Method, setting: Setting, shards: Shards, weights: Tensors
) -> None:
    """Refuse what cannot be played, before any client is asked.

    Args:
        study: the study.
        runtime: how it is computed.
        method: its method.
        setting: the federation.
        shards: the clients' rows.
        weights: theta_0.

    Raises:
        ConfigError: there are more relays than clients, or the study's attack cannot be played; see ``attackers``.
    """
    if runtime.relays > setting.clients:
        raise ConfigError(
            f"relays = {runtime.relays}: there are {setting.clients} clients; a relay must have one at least"
        )
    attackers.check(study, method, setting, shards, weights)
