"""What a node says of a failure: one of a few codes, and a short detail that holds nothing of its rows or its machine.

An exception's text may hold the value of a cell, or a path. It stays in the node's own log; what travels is a code, by
which the server words a reason.
"""

from __future__ import annotations

import builtins
import traceback
from collections.abc import Mapping
from typing import Any

from secateur.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MissingExtraError,
    ModelError,
    NobodyTrainedError,
    SecateurError,
    WireError,
    plain,
)
from secateur.federation.base import FrozenError
from secateur.flower.messages import LOG

ERROR, DETAIL = "error", "detail"
"""The names under which a node says a code and its detail."""

LONGEST = 80
"""The most characters of a detail, before what is not printable in it is escaped."""

FAILED = "failed"
_LOGGED, _TRACED = 2000, 8000  # characters of a failure in the node's log, without and with its traceback

CODES: Mapping[str, str] = {
    "allow": "not allowed by the node's owner: {}",
    "answers": "the node's owner lets it answer no request of this kind: {}",
    "base": (
        "it has other frozen tensors ({}), and takes none: give both sides the same model.name, pretrained file and "
        "torch"
    ),
    "client": "{}: start this SuperNode with --node-config 'partition-id=K', K from 0 and below data.clients",
    "data": "its own data cannot be used; the node's own log says why",
    "disk": "it cannot keep what it must: its disk is full, or its state folder cannot be written",
    "limit": "it would cost more than the node's owner lets a request cost: {}",
    "memory": "its memory does not suffice",
    "missing": "it lacks a package that the run needs; the node's own log names it",
    "model": "the run's model cannot be built there, or is another one; the node's own log says why",
    "policy": "its own configuration is wrong; the node's own log says how",
    "request": "it cannot read the request, which is damaged, or of another model; the node's own log says more",
    "settings": "the run's settings are refused there; the node's own log says which",
    "training": (
        "no first step of training can be taken: lower training.lr or set training.clip, and let the node's owner look "
        "for values in its rows that are missing, infinite or huge, or not scaled; the node's own log says more"
    ),
    FAILED: "its code raised {}; the node's own log says more",
}
"""All that a node may say of a failure, and what the server makes of it; a detail stands for the braces."""

_BY_TYPE: tuple[tuple[type[BaseException], str], ...] = (
    (NobodyTrainedError, "training"), (MissingExtraError, "missing"), (ModelError, "model"), (DataError, "data"),
    (WireError, "request"), (CheckpointError, "disk"), (ConfigError, "settings"), (MemoryError, "memory"),
)  # fmt: skip


class RefusedError(SecateurError):
    """A node does not do what it is asked.

    Args:
        code: one of ``CODES``.
        why: the reason, for the node's own log.
        detail: what the server may know of it.
    """

    def __init__(self, code: str, why: str, detail: str = "") -> None:
        super().__init__(why)
        self.code, self.detail = code, detail


def code_of(broken: BaseException) -> tuple[str, str]:
    """Return the code and the detail of an exception.

    Of an unknown one the detail is its type, if that is one of Python's own.
    """
    if isinstance(broken, RefusedError):
        return broken.code, broken.detail[:LONGEST]
    if isinstance(broken, FrozenError):
        return "base", f"{broken.made or 'none'}, not {broken.wanted or 'none'}"
    if type(broken).__name__ == "OutOfMemoryError":  # of torch, on an accelerator
        return "memory", ""
    code = next((code for kind, code in _BY_TYPE if isinstance(broken, kind)), FAILED)
    name = type(broken).__name__
    return code, (name if hasattr(builtins, name) else "an error of its own") if code == FAILED else ""


def said(broken: BaseException) -> dict[str, str]:
    """Return what a node says of an exception."""
    code, detail = code_of(broken)
    return {ERROR: code, DETAIL: detail}


def refused(broken: BaseException) -> dict[str, str]:
    """Write a failure to the node's log, as one line; return what the server is told of it.

    Where no error of the package's own explains it, the line holds the traceback.
    """
    told = said(broken)
    line, most = str(broken), _LOGGED
    if told[ERROR] == FAILED:
        line, most = "".join(traceback.format_exception(broken)), _TRACED
    LOG.error("refused (%s): %s", told[ERROR], plain(line, most))
    return told


def heard(about: Mapping[str, Any]) -> str:
    """Return the reason that a node's facts give for a failure, as one bounded line; empty: they give none.

    Whatever is no code is shown escaped, and short.
    """
    if ERROR not in about:
        return ""
    code, detail = about[ERROR], about.get(DETAIL, "")
    if not isinstance(code, str) or code not in CODES:
        return f"it says {_shown(code)}, which this version does not know"
    return CODES[code].format(_shown(detail) or "no detail")


def _shown(said: object) -> str:
    return plain(said, LONGEST) if isinstance(said, str) else f"a value of type {type(said).__name__}"
