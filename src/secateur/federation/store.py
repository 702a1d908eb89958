"""The store: small facts about single clients, in one SQLite file of a run that goes together with its checkpoint.

The facts are which mask a client holds, how many rows it claimed, the name of the state it keeps and the digests of its
entries in the archive. They grow with the number of clients that were ever asked. The checkpoint is written anew after
each exchange and must not grow with them; in the store only those facts are written that an exchange changed.

Each exchange is one transaction, committed just before its checkpoint is written. What it overwrote stays until the
next one, so that a run which was killed between the two goes on from the checkpoint of the exchange before.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from secateur.errors import CheckpointError

NAME = "clients.sqlite"

Key = TypeVar("Key", int, str)
Value = TypeVar("Value", int, str)

# Pages are small because what an exchange changes lies scattered: each changed fact costs one page, twice.
_SETTINGS = """
PRAGMA page_size = 512;
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_mode = WAL;
PRAGMA wal_autocheckpoint = 8192;
PRAGMA synchronous = FULL;
"""
_TABLES = """
BEGIN;
CREATE TABLE IF NOT EXISTS facts (key, kind TEXT, value, PRIMARY KEY (key, kind)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS undo (key, kind TEXT, value, PRIMARY KEY (key, kind)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS done (exchange INTEGER NOT NULL);
INSERT INTO done SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM done);
COMMIT;
"""
_SIZE = 16


class Facts(MutableMapping[Key, Value], Generic[Key, Value]):
    """The facts of one kind, by the number of a client or by a name; see ``Store.facts``."""

    def __init__(self, store: Store, kind: str) -> None:
        self._store, self._kind = store, kind

    def __getitem__(self, key: Key) -> Value:
        """Return a fact."""
        value: Value | None = self._store.get(self._kind, key)
        if value is None:
            raise KeyError(key)
        return value

    def __setitem__(self, key: Key, value: Value) -> None:
        """Write or replace a fact."""
        self._store.put(self._kind, key, value)

    def __delitem__(self, key: Key) -> None:
        """Delete a fact."""
        if key not in self:
            raise KeyError(key)
        self._store.put(self._kind, key, None)

    def __contains__(self, key: object) -> bool:
        """Return whether there is a fact of this key."""
        return self._store.get(self._kind, key) is not None

    def __iter__(self) -> Iterator[Key]:
        """Iterate over the keys, ascending; the whole store is read for it."""
        return iter(self._store.keys(self._kind))

    def __len__(self) -> int:
        """Return the number of facts of the kind; the whole store is read for it."""
        return sum(1 for _ in self._store.keys(self._kind))


class Store:
    """Facts by kind and key, in a file or, without a path, in memory.

    Facts can be read and changed between ``open`` and ``close``. What was changed since the last ``commit`` is lost at
    ``close``.

    Raises:
        CheckpointError: the file cannot be read or written; every method may raise it.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._database: sqlite3.Connection | None = None
        self._exchange, self._sum = 0, 0
        self._kinds: set[str] | None = None  # of which there are facts; None: not known yet
        if path is None:
            self._connect()

    def open(self, mark: Mapping[str, int | str] | None = None) -> None:
        """Go on from what ``commit`` returned for the checkpoint at hand; None: begin a new store.

        Raises:
            CheckpointError: the file is missing or damaged, or belongs to another checkpoint.
        """
        self.close()
        if mark is None:
            self._refuse_lost_checkpoint()
            for path in self._files():
                path.unlink(missing_ok=True)
        elif self.path is not None and not self.path.exists():
            raise CheckpointError(f"{self.path} is missing, without which its run cannot go on; {self._again}")
        self._connect()
        self._kinds = None
        self._return_to(int(mark["exchange"]) if mark else 0)
        self._sum = self._summed()
        if mark and self._digest() != mark["digest"]:
            raise CheckpointError(f"{self.path} is damaged (its digest differs from the checkpoint's); {self._again}")

    def facts(self, kind: str) -> Facts[Key, Value]:
        """Return the facts of a kind as a mapping that reads and writes the store."""
        return Facts(self, kind)

    def get(self, kind: str, key: object) -> Any:
        """Return a fact, None where there is none."""
        if self._kinds is not None and kind not in self._kinds:
            return None
        rows = self._run("SELECT value FROM facts WHERE key = ? AND kind = ?", key, kind)
        return rows[0][0] if rows else None

    def keys(self, kind: str) -> Iterator[Any]:
        """Iterate over the keys of a kind, ascending; the whole store is read for it."""
        with self._named() as database:
            for (key,) in database.execute("SELECT key FROM facts WHERE kind = ? ORDER BY key", (kind,)):
                yield key

    def put(self, kind: str, key: int | str, value: int | str | None) -> None:
        """Write or replace a fact; None: delete it."""
        before = self.get(kind, key)
        if before == value:
            return
        self._begin()
        self._run("INSERT OR IGNORE INTO undo VALUES (?, ?, ?)", key, kind, before)
        self._write(key, kind, before, value)

    def commit(self) -> dict[str, int | str]:
        """Make an exchange's changes durable; return the mark that its checkpoint keeps for ``open``."""
        self._begin()
        self._exchange += 1
        self._run("UPDATE done SET exchange = ?", self._exchange)
        self._run("COMMIT")
        return {"exchange": self._exchange, "digest": self._digest()}

    def close(self) -> None:
        """Close the file; changes that were not committed are lost."""
        if self._database is not None and self.path is not None:
            self._collected()
            self._database = None

    @property
    def _again(self) -> str:
        return f"start again with: secateur run --config {(self.path or Path()).parent / 'study.toml'}"

    def _files(self) -> list[Path]:
        return [] if self.path is None else [self.path.with_name(self.path.name + end) for end in ("", "-wal", "-shm")]

    def _connect(self) -> None:
        with self._errors_named():
            place = ":memory:" if self.path is None else self.path
            # whoever collects a store that was left open closes its database, in whatever thread
            self._database = sqlite3.connect(place, isolation_level=None, check_same_thread=False)
        self._collected = weakref.finalize(self, self._database.close)
        self._collected.atexit = False
        with self._named() as database:
            database.executescript(_SETTINGS + _TABLES)
            self._exchange = database.execute("SELECT exchange FROM done").fetchone()[0]

    def _refuse_lost_checkpoint(self) -> None:
        """Refuse to begin in the folder of an earlier run: a store of several exchanges had a checkpoint."""
        if self.path is None or not self.path.exists():
            return
        self._connect()
        done = self._exchange
        self.close()
        if done > 1:
            raise CheckpointError(
                f"the checkpoint beside {self.path} is missing, though {done} exchanges were complete: bring it back, "
                "or give another folder"
            )

    def _return_to(self, exchange: int) -> None:
        """Undo the last exchange if its checkpoint was never written; the next commit makes that durable."""
        if self._exchange == exchange + 1:
            self._run("BEGIN")
            for key, kind, value in self._run("SELECT key, kind, value FROM undo"):
                self._write(key, kind, self.get(kind, key), value)
            self._run("DELETE FROM undo")
            self._exchange = exchange
        if self._exchange != exchange:
            raise CheckpointError(
                f"{self.path} is of exchange {self._exchange} and the checkpoint beside it of {exchange}: they are not "
                f"of one moment; bring back those that are, or {self._again}"
            )

    def _begin(self) -> None:
        with self._named() as database:
            if not database.in_transaction:
                database.execute("BEGIN")
                database.execute("DELETE FROM undo")  # the checkpoint of the exchange before is written by now

    def _write(self, key: int | str, kind: str, before: int | str | None, value: int | str | None) -> None:
        if value is None:
            self._run("DELETE FROM facts WHERE key = ? AND kind = ?", key, kind)
        else:
            self._run("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", key, kind, value)
        if self._kinds is not None:
            self._kinds.add(kind)
        self._sum += _hashed(key, kind, value) - _hashed(key, kind, before)

    def _run(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with self._named() as database:
            return database.execute(statement, values).fetchall()

    def _summed(self) -> int:
        total, kinds = 0, set[str]()
        with self._named() as database:
            for key, kind, value in database.execute("SELECT key, kind, value FROM facts"):
                total += _hashed(key, kind, value)
                kinds.add(kind)
        self._kinds = kinds
        return total

    def _digest(self) -> str:
        """Return a digest of all facts, in whatever order they were noted: the sum of their hashes."""
        return f"{self._sum % 2 ** (8 * _SIZE):0{2 * _SIZE}x}"

    @contextlib.contextmanager
    def _named(self) -> Iterator[sqlite3.Connection]:
        if self._database is None:
            raise RuntimeError(f"the store {self.path} is not open")
        with self._errors_named():
            yield self._database

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Turn database errors inside the block into errors that name the file."""
        try:
            yield
        except sqlite3.OperationalError as broken:
            raise CheckpointError(
                f"cannot read or write {self.path}: {broken}; free some space or mend its permissions, then resume"
            ) from broken
        except sqlite3.DatabaseError as broken:
            raise CheckpointError(f"{self.path} is damaged ({broken}); {self._again}") from broken


def _hashed(key: object, kind: object, value: object) -> int:
    """Return the hash of a fact; 0 of none."""
    if value is None:
        return 0
    text = f"{kind}\0{key!r}\0{value!r}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=_SIZE).digest(), "big")
