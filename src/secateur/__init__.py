"""secateur prunes neural networks while they train across a federation.

The public names are imported when they are first used, so that ``import secateur`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Ask": "contract.ask",
    "Client": "contract.client",
    "Comparison": "api.compare",
    "Composition": "methods.kit.composition",
    "Guard": "contract.guard",
    "Message": "wire.message",
    "Method": "contract.method",
    "Reduced": "contract.reducer",
    "Reduction": "contract.reduction",
    "Result": "api.result",
    "Runtime": "study.runtime",
    "SecateurError": "errors",
    "Setting": "contract.state",
    "State": "contract.state",
    "Study": "study.study",
    "compare": "api.compare",
    "load": "export.export",
    "run": "api.run",
}

__all__ = sorted(_HOME)  # noqa: PLE0605 -- a sorted list of names, made from the table above


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    return getattr(importlib.import_module(f"secateur.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
