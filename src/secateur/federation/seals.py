"""Seals: the digests of a run's files, in one file beside them, by which whoever reads a file knows it is undamaged.

A run that was made before there were seals has none: its files are read unchecked, and reports say so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from secateur.errors import CheckpointError

NAME = "digests.json"
UNCHECKED = f"its files are unchecked: they have no {NAME}, so that damage would go unnoticed"

_FILES, _DIGEST = "files", "digest"
_SIZE = 16
_MADE_AGAIN = (
    "take it from a copy; of a finished run, delete its summary.json, and it is made again by: secateur resume {}"
)
_AGAIN = {
    "study.toml": "bring it back or, if the change is meant, go on with: secateur resume {} --accept-changes",
    "rounds.jsonl": "take it from a copy, or start again in another folder with its study.toml: secateur run --config",
}


def digest(data: bytes) -> str:
    """Return the digest of a file's bytes."""
    return hashlib.blake2b(data, digest_size=_SIZE).hexdigest()


def read(folder: Path) -> dict[str, str] | None:
    """Return the digests of a folder's files by their names; None if it has none.

    Raises:
        CheckpointError: the file of digests is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_bytes())
        files: dict[str, str] = document[_FILES]
        sound = document[_DIGEST] == _of(files)
    except (ValueError, KeyError, TypeError):
        sound = False
    except OSError as broken:
        raise CheckpointError(f"cannot read {path}: {broken.strerror or broken}") from broken
    if not sound:
        raise CheckpointError(
            f"{path} is damaged, so that the files beside it cannot be checked: take it from a copy, or delete it to "
            "have them read unchecked"
        )
    return files


def written(folder: Path, files: Mapping[str, bytes]) -> bytes:
    """Return what the file of digests must hold once these files are written."""
    known = (read(folder) or {}) | {name: digest(data) for name, data in files.items()}
    return json.dumps({_FILES: known, _DIGEST: _of(known)}, indent=1).encode()


def check(folder: Path, name: str, data: bytes) -> None:
    """Refuse the bytes of a file that are not what was written; nothing is known of files without any digests.

    Raises:
        CheckpointError: the file, or the file of digests, is damaged; the text says what to do.
    """
    known = read(folder)
    if known is not None and known.get(name) != digest(data):
        again = _AGAIN.get(name, _MADE_AGAIN).format(folder)
        raise CheckpointError(f"{folder / name} was changed since the run wrote it, or is damaged: {again}")


def checked(folder: Path, name: str) -> bytes:
    """Return the bytes of a file, undamaged.

    Raises:
        CheckpointError: it is missing, cannot be read, or is damaged.
    """
    path = folder / name
    try:
        data = path.read_bytes()
    except OSError as broken:
        raise CheckpointError(f"cannot read {path}: {broken.strerror or broken}") from broken
    check(folder, name, data)
    return data


def document(folder: Path, name: str) -> dict[str, object]:
    """Return the JSON object that a file holds, undamaged.

    Raises:
        CheckpointError: as ``checked``, or it is no such object.
    """
    data = checked(folder, name)
    try:
        found = json.loads(data)
    except ValueError as broken:
        raise CheckpointError(f"{folder / name} is damaged: {broken}; {_MADE_AGAIN.format(folder)}") from broken
    if not isinstance(found, dict):
        raise CheckpointError(f"{folder / name} is damaged: it holds no JSON object; {_MADE_AGAIN.format(folder)}")
    return found


def check_all(folder: Path) -> None:
    """Check each file of a folder whose digest is known.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    for name in read(folder) or {}:
        checked(folder, name)


def _of(files: Mapping[str, str]) -> str:
    return digest(json.dumps(files, sort_keys=True).encode())
