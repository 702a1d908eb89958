"""secateur on Flower: apps that run a whole study, and pruning for an existing app.

Names are looked up when they are first used, so that the process that Flower starts for each message imports no more
than it needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.flower.clientapp import client_app, server_app
    from secateur.flower.mod import keep_pruned, prune
    from secateur.flower.strategy import Pruned

__all__ = ["Pruned", "client_app", "keep_pruned", "prune", "server_app"]

_FROM = {
    "Pruned": "strategy", "client_app": "clientapp", "keep_pruned": "mod", "prune": "mod", "server_app": "clientapp",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FROM[name]}"), name)
