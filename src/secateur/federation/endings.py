"""How a run may go on or end: what its checkpoint must agree with, and what is written of a run without a result."""

from __future__ import annotations

import json
from pathlib import Path

from secateur.errors import CheckpointError, NoResultError
from secateur.federation import checkpoint
from secateur.federation.checkpoint import Saved
from secateur.federation.folder import FAILED, FAILURE, ROUNDS, STUDY, read_records
from secateur.federation.records import summarise
from secateur.study.study import Study


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


def write_failure(folder: Path, study: Study, failed: NoResultError) -> None:
    """Write ``failure.json``: the summary of a run so far, and what ended it.

    Raises:
        CheckpointError: it cannot be written.
    """
    rows = read_records(folder) if (folder / ROUNDS).exists() else []
    summary = {**summarise(study, rows, {}), FAILED: str(failed)}
    checkpoint.write(folder / FAILURE, json.dumps(summary, indent=1).encode())
