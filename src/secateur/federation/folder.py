"""A run's folder: the names of its files, making a new folder, and reading its study, records and summary."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

from secateur.errors import CheckpointError, ConfigError, near
from secateur.federation import checkpoint, ledger, seals
from secateur.federation.records import Row
from secateur.study.own import reached
from secateur.study.study import Study, parse_study, read_toml

STUDY = "study.toml"
ROUNDS = "rounds.jsonl"
PLAN = "plan.json"
SUMMARY = "summary.json"
FAILURE = "failure.json"
LOG = "run.log"
DENSE = "dense"
"""The folder of a run's dense twin within the run's own."""

_SHOWN = 3

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
    return fresh(Path("runs") / f"{study.method.rpartition('.')[2]}-{study.hash()}")


def fresh(base: Path) -> Path:
    """Return a path that is not there yet: ``base``, with a number if that exists."""
    return next(p for p in (base if n == 1 else Path(f"{base}-{n}") for n in itertools.count(1)) if not p.exists())


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
        checkpoint.put(folder, STUDY, study.to_toml(folder).encode())


def read_study(folder: Path, *, edited: bool = False) -> Study:
    """Return the study of a run folder; the code of one's own that it names can be imported then.

    Args:
        folder: of the run.
        edited: also one that was changed since the run began.

    Raises:
        CheckpointError: the folder holds no run, or the study is damaged or was edited.
        ConfigError: a setting is wrong, or code of one's own is not where it was.
    """
    if not (folder / STUDY).exists():
        raise CheckpointError(f"{folder} holds no run: {folder / STUDY} is missing{_instead(folder)}")
    if not edited:
        seals.checked(folder, STUDY)
    return parse_study(reached(read_toml(folder / STUDY), folder))


def runs_in(folder: Path) -> list[Path]:
    """Return the folders of runs in a folder, by name."""
    return sorted(path.parent for path in folder.glob(f"*/{STUDY}"))


def _instead(folder: Path) -> str:
    """Return what to do about a folder that holds no run, as the end of a sentence."""
    if not folder.is_dir():
        return f"; there is no such folder{near(folder.name, (one.name for one in runs_in(folder.parent)))}"
    if found := runs_in(folder):
        more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        return f"; it holds runs, name one of them: {', '.join(map(str, found[:_SHOWN]))}{more}"
    if runs_in(folder / "runs"):
        return f"; it holds a comparison, whose runs are in {folder / 'runs'}"
    return ""


def read_records(folder: Path) -> list[Row]:
    """Return the records of a run: one row for each exchange, in order; those of an old run are not checked.

    Raises:
        CheckpointError: the folder holds no records, or they are damaged.
    """
    path = folder / ROUNDS
    if seals.read(folder) is None:
        lines = path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []
        rows = [ledger.parsed(path, number, line) for number, line in enumerate(lines, 1)]
    elif (folder / SUMMARY).exists():
        seals.checked(folder, ROUNDS)
        rows = ledger.read(path)
    else:
        # the checkpoint first: a run that goes on adds to its records before it writes the next one
        about = checkpoint.about(folder)
        rows = ledger.read(path, None if about is None else about["records"])
    if not rows:
        raise CheckpointError(
            f"{folder} holds no records of a run yet: {path} is {'empty' if path.exists() else 'missing'}"
        )
    return rows


def read_summary(folder: Path) -> Row | None:
    """Return the summary of a finished run; None if the run has not ended.

    Raises:
        CheckpointError: it is damaged.
    """
    return seals.document(folder, SUMMARY) if (folder / SUMMARY).exists() else None


def finished(folder: Path) -> Row | None:
    """Return the summary of a finished run, whose files are all undamaged; None if the run has not ended.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    if (summary := read_summary(folder)) is not None:
        seals.check_all(folder)
    return summary


def read_failure(folder: Path) -> Row | None:
    """Return the summary of a run that ended without a result, and has not been gone on with; None: it is no such.

    Raises:
        CheckpointError: it is damaged.
    """
    return seals.document(folder, FAILURE) if (folder / FAILURE).exists() else None


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
