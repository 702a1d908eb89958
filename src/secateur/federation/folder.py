"""A run's folder: the names of its files, making a new folder, and reading its study, records and summary."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path

from secateur.errors import CheckpointError, ConfigError
from secateur.federation import checkpoint
from secateur.federation.records import Row
from secateur.study.study import Study, parse_study, read_toml

STUDY = "study.toml"
ROUNDS = "rounds.jsonl"
PLAN = "plan.json"
SUMMARY = "summary.json"
FAILURE = "failure.json"
LOG = "run.log"

FAILED = "failed"
"""The key, in ``failure.json``, of what ended a run without a result; all else is as in a summary."""


def new_folder(study: Study, out: Path | None) -> Path:
    """Return the folder of a new run: ``out``, or runs/METHOD-HASH, with a number if that exists.

    Raises:
        ConfigError: ``out`` is a file or a folder that is not empty.
    """
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"--out {out} is not an empty folder: give another, or: secateur resume {out}")
        return out
    base = Path("runs") / f"{study.method.rpartition('.')[2]}-{study.hash()}"
    taken = itertools.takewhile(Path.exists, (base if n == 1 else Path(f"{base}-{n}") for n in itertools.count(1)))
    count = sum(1 for _ in taken)
    return base if count == 0 else Path(f"{base}-{count + 1}")


def reserve(folder: Path, study: Study) -> None:
    """Make a run's folder and write its complete study into it, which ``resume`` reads.

    Raises:
        ConfigError: the folder cannot be made.
        CheckpointError: the study cannot be written.
    """
    if not (folder / STUDY).exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as broken:
            raise ConfigError(f"cannot make the run folder {folder}: {broken.strerror}") from broken
        checkpoint.write(folder / STUDY, study.to_toml().encode())


def read_study(folder: Path) -> Study:
    """Return the study of a run folder.

    Raises:
        CheckpointError: the folder holds no run.
    """
    if not (folder / STUDY).exists():
        raise CheckpointError(f"{folder} holds no run: {folder / STUDY} is missing")
    return parse_study(read_toml(folder / STUDY))


def read_records(folder: Path) -> list[Row]:
    """Return the records of a run: one row for each exchange, in order.

    Raises:
        CheckpointError: the folder holds no records.
    """
    path = folder / ROUNDS
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    if not lines:
        raise CheckpointError(
            f"{folder} holds no records of a run yet: {path} is {'empty' if path.exists() else 'missing'}"
        )
    return [json.loads(line) for line in lines]


def read_summary(folder: Path) -> Row | None:
    """Return the summary of a finished run; None if the run has not ended."""
    path = folder / SUMMARY
    return dict(json.loads(path.read_text("utf-8"))) if path.exists() else None


def read_failure(folder: Path) -> Row | None:
    """Return the summary of a run that ended without a result, and has not been gone on with; None: it is no such."""
    path = folder / FAILURE
    return dict(json.loads(path.read_text("utf-8"))) if path.exists() else None


class _LogFile(logging.FileHandler):
    """A log file whose write errors are ignored; the records hold what counts, and their errors are raised."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 -- logging's name
        """Ignore the error."""


def open_log(log: logging.Logger, folder: Path) -> logging.Handler:
    """Log to a file in a run's folder from now on; return the handler, which the caller removes and closes.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = folder / LOG
    try:
        handler = _LogFile(path, encoding="utf-8")
    except OSError as broken:
        raise CheckpointError(
            f"cannot write {path}: {broken.strerror}; free some space or mend permissions"
        ) from broken
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(handler)
    return handler
