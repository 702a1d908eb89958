"""What a node keeps between requests: the states of a client, by run, and the cache of simulated rows."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from secateur.federation import checkpoint
from secateur.flower.asked import Node
from secateur.flower.codes import RefusedError
from secateur.flower.site import Site

_LONGEST, _RUNS = 64, 16


class Memory:
    """The states of a client in a run, by name: in the folder ``state`` of the node configuration, or in the Context.

    Two states are kept, the one before a request and the one after it, in case the reply gets lost; in the folder, of
    the 16 newest runs, so that no server can fill a node's disk with runs.
    """

    def __init__(self, node: Node, site: Site, run: str, client: int) -> None:
        self._folder = None if site.folder is None else site.folder / f"{_plain(run)}-{client}"
        self._records = node.kept
        self._key = f"secateur-{run}"

    def get(self, name: str) -> bytes | None:
        """Return the state of a name; None: there is none, or it is damaged."""
        if not name:
            return None
        if self._folder is not None:
            path = self._folder / _plain(name)
            data = path.read_bytes() if path.exists() else None
            # a damaged state is a lost one: its name is the digest of what was written
            return data if data is not None and self._name(data) == name else None
        return self._records.get(self._key, {}).get(name)

    @staticmethod
    def _name(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()[:16]

    def put(self, data: bytes, *, after: str) -> str:
        """Keep a state beside the one before it, and return its name."""
        name = self._name(data)
        if self._folder is not None:
            if not self._folder.exists():
                self._folder.mkdir(parents=True)
                _drop_oldest(self._folder.parent)
            checkpoint.write(self._folder / name, data)
            for path in self._folder.iterdir():
                if path.name not in {name, after}:
                    path.unlink()
            return name
        before = self.get(after)
        self._records[self._key] = {name: data} if before is None else {after: before, name: data}
        return name


def _plain(name: str) -> str:
    """Return a name that came over the wire, if it is safe as a file name."""
    if not name.isalnum() or not name.isascii() or len(name) > _LONGEST:
        raise RefusedError("request", f"{name[:40]!r} does not name a run or a state")
    return name


def _drop_oldest(state: Path) -> None:
    """Delete the states of all but the newest runs."""
    runs = [path for path in state.iterdir() if path.is_dir() and path.name.rpartition("-")[2].isdigit()]
    for path in sorted(runs, key=lambda path: path.stat().st_mtime_ns)[:-_RUNS]:
        shutil.rmtree(path)


def cache() -> Path:
    """Return the folder in which the rows of simulated clients are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secateur"
