"""How a run may go on or end: what its checkpoint must agree with, and what is written of a run without a result."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from secateur.contract.ask import Ask
from secateur.errors import CheckpointError, NoResultError, SecateurError
from secateur.federation import checkpoint, ledger, seals
from secateur.federation.agreement import PHASE as AGREEMENT
from secateur.federation.checkpoint import MODEL, Saved
from secateur.federation.folder import FAILED, FAILURE, LOG, ROUNDS, STUDY, open_log, read_records
from secateur.federation.origin import changes
from secateur.federation.records import short, summarise
from secateur.study.study import Study
from secateur.wire.message import specs_of

Made = TypeVar("Made")


def check_same(folder: Path, saved: Saved, made_of: Mapping[str, Any], *, accept: bool) -> list[str]:
    """Refuse to go on from a checkpoint if data, study, package or code are no longer those of the run.

    Args:
        folder: the run's folder.
        saved: its checkpoint.
        made_of: the fingerprint of the data, and the origin (``origin.Origin``).
        accept: go on though the origin differs, as long as the model is the same.

    Returns:
        What differs and was accepted, as remarks.

    Raises:
        CheckpointError: they differ; the text says which, and what to do.
    """
    if saved.extra["data"] != made_of["data"]:
        raise CheckpointError(
            f"the data of {folder} is no longer what the run began with (rows, labels or partition differ): "
            f"bring it back, or start again with: secateur run --config {folder / STUDY}"
        )
    changed = changes(saved.extra["origin"], made_of["origin"])
    if changed and not accept:
        raise CheckpointError(
            f"{folder} did not begin with what it would go on with: {'; '.join(changed)}. Bring back what was, or go "
            f"on with the change, which the summary will tell: secateur resume {folder} --accept-changes"
        )
    if changed and specs_of(saved.state.weights) != dict(saved.state.setting.specs):
        raise CheckpointError(f"the model of {folder} is another than it began with: no change of it can be accepted")
    return [f"from round {saved.state.round + 1} on {text} changed, and was accepted" for text in changed]


def check_new(folder: Path) -> list[str]:
    """Refuse to begin a run where exchanges of it were recorded: its checkpoint is missing.

    Returns:
        A remark, if one exchange was: it may have been stopped before its checkpoint was written, and is made again.

    Raises:
        CheckpointError: more were, or the run was finished.
    """
    if not any((folder / name).exists() for name in (ROUNDS, MODEL)):
        return []
    rows = ledger.read(folder / ROUNDS) if seals.read(folder) is not None else []
    asked = [row for row in rows if row["phase"] != AGREEMENT]
    if len(asked) > 1 or (folder / MODEL).exists():
        raise CheckpointError(
            f"{folder / checkpoint.NAME} is missing, though {len(asked)} exchanges of the run are recorded: bring it "
            f"back from a copy, or start again in another folder: secateur run --config {folder / STUDY} --out ANOTHER"
        )
    return [f"the run begins again: it had {len(asked)} exchange recorded and no checkpoint"] if asked else []


def called(
    verb: Callable[..., Made], at: Ask | int, *given: object, told: str = f"; its traceback is in {LOG}"
) -> Made:
    """Return what a verb of a method makes of what it is given; let what it raises end the run in one line.

    Args:
        verb: a bound method of a ``Method``.
        at: the ask that it is about, or the round.
        given: its arguments.
        told: what else is said of a failure.

    Raises:
        NoResultError: it raised anything but an error that already says what to mend; that is its cause.
    """
    try:
        return verb(*given)
    except SecateurError:
        raise
    except Exception as broken:
        where = f"round {at}" if isinstance(at, int) else f"phase {at.phase!r} of round {at.round}"
        whose = type(getattr(verb, "__self__", None)).__name__
        line = short(f"{type(broken).__name__}: {broken}")
        raise NoResultError(f"method {whose}: {verb.__name__} failed in {where}: {line}{told}") from broken


def write_failure(folder: Path, study: Study, failed: NoResultError) -> None:
    """Write ``failure.json``: the summary of a run so far, and what ended it; to the log, the traceback of its cause.

    Raises:
        CheckpointError: it cannot be written.
    """
    path = folder / ROUNDS
    rows = read_records(folder) if path.exists() and path.stat().st_size else []
    summary = {**summarise(study, rows, {}), FAILED: str(failed)}
    checkpoint.put(folder, FAILURE, json.dumps(summary, indent=1).encode())
    if failed.__cause__ is not None:
        log = logging.getLogger(f"{__name__}.{folder}")
        handler = open_log(log, folder)
        try:
            log.error("%s", failed, exc_info=failed.__cause__)
        finally:
            log.removeHandler(handler)
            handler.close()
