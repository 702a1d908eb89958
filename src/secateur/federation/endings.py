"""How a run may go on or end: what its checkpoint must agree with, and what is written of a run without a result."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from secateur.contract.ask import Ask
from secateur.errors import CheckpointError, NoResultError, SecateurError
from secateur.federation import checkpoint
from secateur.federation.checkpoint import Saved
from secateur.federation.folder import FAILED, FAILURE, LOG, ROUNDS, STUDY, open_log, read_records
from secateur.federation.records import short, summarise
from secateur.study.study import Study

Made = TypeVar("Made")


def check_same(folder: Path, saved: Saved, *, study: str, data: str) -> None:
    """Refuse to go on from a checkpoint if study, data or records are no longer those of the run.

    Args:
        folder: the run's folder.
        saved: its checkpoint.
        study: the hash of the study.
        data: the fingerprint of the data.

    Raises:
        CheckpointError: they differ; the text says which, and what to do.
    """
    if saved.extra["study"] != study:
        raise CheckpointError(
            f"{folder / STUDY} was changed since the run began (its study is {study}, the "
            f"checkpoint's {saved.extra['study']}): bring it back, or start a new run with it"
        )
    if saved.extra["data"] != data:
        raise CheckpointError(
            f"the data of {folder} is no longer what the run began with (rows, labels or partition differ): "
            f"bring it back, or start again with: secateur run --config {folder / STUDY}"
        )
    rows = folder / ROUNDS
    if not rows.exists() or rows.stat().st_size < saved.extra["records"]:
        raise CheckpointError(f"{rows} is shorter than its checkpoint says; the records of this run are lost")


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
    rows = read_records(folder) if (folder / ROUNDS).exists() else []
    summary = {**summarise(study, rows, {}), FAILED: str(failed)}
    checkpoint.write(folder / FAILURE, json.dumps(summary, indent=1).encode())
    if failed.__cause__ is not None:
        log = logging.getLogger(f"{__name__}.{folder}")
        handler = open_log(log, folder)
        try:
            log.error("%s", failed, exc_info=failed.__cause__)
        finally:
            log.removeHandler(handler)
            handler.close()
