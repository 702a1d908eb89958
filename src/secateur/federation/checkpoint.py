"""Checkpoints: the server's state on disk, replaced atomically after every exchange; and the shipped model.

One safetensors file holds the state; its header holds the rest as JSON, with a digest of itself and one of the tensors.
Data that grow with the number of clients are in other files (``store``, ``archive``); the checkpoint says to which
exchange these must belong.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors

from secateur.contract.state import Setting, State
from secateur.errors import CheckpointError
from secateur.federation import seals
from secateur.pruning.mask import Mask, Tensors

NAME = "checkpoint.safetensors"
MODEL = "model.safetensors"
_LOCK, _ABOUT = ".lock", "about"
_FORMAT = 3


def write(path: Path, data: bytes) -> None:
    """Replace a file atomically: a reader or a crash finds the old bytes or the new ones, never a mixture.

    Raises:
        CheckpointError: the disk is full or not writable; the old file is untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as broken:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {path}: {broken.strerror or broken}; what was there before is untouched. "
            f"Free some space or mend the folder's permissions, then: secateur resume {path.parent}"
        ) from broken


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock a run's folder against other processes inside the block; the lock also ends with this process.

    Raises:
        CheckpointError: another process has locked the folder.
    """
    with (folder / _LOCK).open("a") as lock:
        try:
            _lock(lock.fileno())
        except OSError as taken:
            raise CheckpointError(f"another process is at work on {folder}; stop it, or give another folder") from taken
        yield


def _lock(handle: int) -> None:
    if sys.platform == "win32":
        import msvcrt  # noqa: PLC0415 -- there is no fcntl there

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl  # noqa: PLC0415

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@dataclass(frozen=True)
class Saved:
    """The content of a checkpoint: the method's state, and what the run itself needs to go on.

    Attributes:
        state: the method's state.
        extra: small facts, such as the length of the run's records.
        tensors: further tensors, in named groups.
    """

    state: State
    extra: dict[str, Any]
    tensors: Mapping[str, Tensors] = field(default_factory=dict)


def save(folder: Path, state: State, extra: dict[str, Any], groups: Mapping[str, Tensors] | None = None) -> None:
    """Write the checkpoint of ``folder``; ``extra`` and ``groups`` become ``extra`` and ``tensors`` of ``Saved``.

    Raises:
        CheckpointError: a name has a slash, or the file cannot be written.
    """
    slashed = [name for name in (*state.memory, *(groups or {})) if "/" in name]
    if slashed:
        raise CheckpointError(f"State.memory[{slashed[0]!r}]: a name with a slash cannot be read back; use another")
    tensors = {f"weights/{n}": t for n, t in state.weights.items()}
    tensors |= {f"mask/{n}": t for n, t in (state.mask or {}).items()}
    tensors |= {f"memory/{k}/{n}": t for k, group in state.memory.items() for n, t in group.items()}
    tensors |= {f"beside/{k}/{n}": t for k, group in (groups or {}).items() for n, t in group.items()}
    head = {
        "format": _FORMAT, "round": state.round, "masked": state.mask is not None, "notes": dict(state.notes),
        "order": list(tensors), "extra": extra, "tensors": _digest_of(tensors),
    }  # fmt: skip
    head["digest"] = _digest(head)
    try:
        data = safetensors.save(_apart(tensors), {"secateur": json.dumps(head)})
    except SafetensorError as broken:
        raise CheckpointError(f"the state of round {state.round} cannot be written: {broken}") from broken
    write(folder / NAME, data)


def load(folder: Path, setting: Setting, archive: MutableMapping[str, Tensors] | None = None) -> Saved:
    """Return the content of the checkpoint of ``folder``; ``archive`` becomes the state's archive.

    Raises:
        CheckpointError: there is none, it is damaged or from another version of secateur; the text says what to do.
    """
    path = folder / NAME
    if not path.exists():
        raise CheckpointError(
            f"no checkpoint in {folder}: the run had not finished its first exchange; {_again(folder)}"
        )
    head = _head(folder)
    try:
        loaded = safetensors.load_file(path)
        tensors = {name: loaded[name] for name in head["order"]}
    except (SafetensorError, KeyError, ValueError, OSError) as broken:
        raise CheckpointError(f"checkpoint {path} cannot be read: {broken}; {_again(folder)}") from broken
    if _digest_of(tensors) != head["tensors"]:
        raise _damaged(folder)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        group, _, inner = rest.partition("/") if kind in {"memory", "beside"} else ("", "", rest)
        parts.setdefault(f"{kind}/{group}", {})[inner] = tensor
    memory, groups = (
        {k.removeprefix(kind): v for k, v in parts.items() if k.startswith(kind)} for kind in ("memory/", "beside/")
    )
    mask = parts.get("mask/", {}) if head["masked"] else None
    kept: MutableMapping[str, Tensors] = {} if archive is None else archive
    state = State(setting, head["round"], parts["weights/"], mask, memory, head["notes"], kept)
    return Saved(state, head["extra"], groups)


def about(folder: Path) -> dict[str, Any] | None:
    """Return what the checkpoint of ``folder`` keeps besides the state, without reading that; None: there is none.

    Raises:
        CheckpointError: as ``load``.
    """
    extra: dict[str, Any] | None = _head(folder)["extra"] if (folder / NAME).exists() else None
    return extra


def _head(folder: Path) -> dict[str, Any]:
    """Return the header of the checkpoint of ``folder``, undamaged.

    Raises:
        CheckpointError: it is damaged, or from another version of secateur.
    """
    path, again = folder / NAME, _again(folder)
    try:
        with safe_open(path, framework="pt") as file:
            head: dict[str, Any] = json.loads((file.metadata() or {})["secateur"])
        found, known, same = head["format"], head["digest"], _digest(head)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as broken:
        raise CheckpointError(f"checkpoint {path} cannot be read: {broken}; {again}") from broken
    if found != _FORMAT:
        raise CheckpointError(
            f"checkpoint {path} is of format {found}, and this version of secateur goes on from format "
            f"{_FORMAT} only: finish the run with the version that began it, or {again}; it can still be reported"
        )
    if same != known:
        raise _damaged(folder)
    return head


def _again(folder: Path) -> str:
    return f"start again with: secateur run --config {folder / 'study.toml'}"


def _damaged(folder: Path) -> CheckpointError:
    return CheckpointError(f"checkpoint {folder / NAME} is damaged (its digest differs); {_again(folder)}")


BASE = "base"
"""The header entry with the names of shipped tensors that were never trained, a JSON list; absent if there are none."""


def ship(folder: Path, model: Tensors, mask: Mask | None, about: Mapping[str, str]) -> None:
    """Write the final model: dense with zeros at pruned entries, masks as uint8 ``mask/NAME``; header ``about``.

    The header is one entry, because safetensors writes several in no fixed order, and equal runs must give equal files.
    """
    tensors = {name: tensor.contiguous() for name, tensor in model.items()}
    tensors |= {f"mask/{name}": part.to(torch.uint8) for name, part in (mask or {}).items()}
    put(folder, MODEL, safetensors.save(tensors, {_ABOUT: json.dumps(dict(about), sort_keys=True)}))


def shipped(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, str]]:
    """Return what ``ship`` wrote: the model's tensors, its mask (empty if nothing is pruned) and the header.

    Raises:
        CheckpointError: the folder holds no finished run, or the file is damaged.
    """
    path = folder / MODEL
    if not path.exists():
        raise CheckpointError(f"{path} is missing: the run is not finished; go on with: secateur resume {folder}")
    data = seals.checked(folder, MODEL)
    try:
        tensors = safetensors.load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
        about = json.loads(header.get(_ABOUT, "{}"))
    except (SafetensorError, ValueError) as broken:
        raise CheckpointError(f"{path} cannot be read: {broken}") from broken
    mask = {n.removeprefix("mask/"): t.bool() for n, t in tensors.items() if n.startswith("mask/")}
    return {n: t for n, t in tensors.items() if not n.startswith("mask/")}, mask, about


def _apart(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return tensors that share no memory with each other, because safetensors refuses views."""
    separate: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.contiguous()
        separate[name] = own.clone() if own.untyped_storage().data_ptr() in seen else own
        seen.add(separate[name].untyped_storage().data_ptr())
    return separate


def _digest(head: Mapping[str, Any]) -> str:
    # JSON turns keys into texts, and the digest must be the same after reading
    about = json.loads(json.dumps({name: value for name, value in head.items() if name != "digest"}))
    return seals.digest(json.dumps(about, sort_keys=True).encode())


def _digest_of(tensors: Tensors) -> str:
    running = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        running.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        running.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return running.hexdigest()


def seal(folder: Path, name: str) -> None:
    """Note the digest of a file of a run's folder as it is now.

    Raises:
        CheckpointError: it cannot be read, or the digests cannot be written.
    """
    write(folder / seals.NAME, seals.written(folder, {name: read(folder / name)}))


def put(folder: Path, name: str, data: bytes, *, beside: Mapping[str, bytes] | None = None) -> None:
    """Write a file of a run's folder, and note its digest; ``beside``: of further files that lie there already.

    Raises:
        CheckpointError: it cannot be written, or the digests are damaged.
    """
    write(folder / seals.NAME, seals.written(folder, {**(beside or {}), name: data}))
    write(folder / name, data)


def read(path: Path) -> bytes:
    """Return a file's bytes.

    Raises:
        CheckpointError: the file is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as broken:
        raise CheckpointError(f"cannot read {path}: {broken.strerror or broken}") from broken


def append(path: Path, line: str) -> int:
    """Append a line durably; return the length of the file in bytes after it.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
            return file.tell()
    except OSError as broken:
        raise CheckpointError(
            f"cannot write {path}: {broken.strerror or broken}; the last checkpoint is untouched. "
            f"Free some space, then: secateur resume {path.parent}"
        ) from broken
