"""Books: what the server remembers beside its method's state, and how both become durable together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.contract.state import State
from secateur.engines import States
from secateur.federation import checkpoint, store
from secateur.federation.archive import Archive
from secateur.federation.checkpoint import Saved
from secateur.federation.claims import KINDS, Claims, Known, unknown
from secateur.federation.held_masks import HeldMasks
from secateur.federation.store import Store
from secateur.wire.message import Spec, Tensors

_ARCHIVE, _MASKS, _STATES = "archive", "masks", "clients"


class Books:
    """What the server remembers of single clients and of its requests; what grows with the clients is on disk.

    Args:
        folder: of the run.
        specs: of the model's tensors.
        known: says how many rows a client has, where the server knows.
        base: the digest of the model's tensors that never travel; empty: it has none. The study makes them.

    Attributes:
        store: facts about single clients.
        archive: tensors of single clients, for the method's state.
        masks: who holds which mask.
        claims: how many rows each client has.
        base: as given.
        residual: what the last training request left out of the weights; it is added to the next one.
    """

    def __init__(self, folder: Path, specs: Mapping[str, Spec], known: Known = unknown, *, base: str = "") -> None:
        self.base = base
        self._folder, self._specs = folder, specs
        self.store = Store(folder / store.NAME)
        self.archive = Archive(folder / _ARCHIVE, self.store.facts(_ARCHIVE))
        self._versions = Archive(folder / _MASKS, self.store.facts("version"))
        self.masks = HeldMasks(specs)
        self.claims = Claims(known, {kind: self.store.facts(f"{kind} rows") for kind in KINDS})
        self.residual: Tensors = {}

    def begin(self) -> None:
        """Begin a run.

        Raises:
            CheckpointError: the folder holds one whose checkpoint is missing.
        """
        self._open(None, [])

    def restore(self, saved: Saved) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointError: what lies beside it is missing, damaged or of another moment.
        """
        self.residual = saved.tensors.get("residual", {})
        self._open(saved.extra["store"], saved.extra["masks"])

    def _open(self, mark: Mapping[str, int | str] | None, order: list[str]) -> None:
        self.store.open(mark)
        self.masks = HeldMasks(self._specs, self.store.facts("mask"), self._versions, order)
        self.archive.check()
        self._versions.check()

    def attach(self, states: States) -> None:
        """Let what clients keep go on from here."""
        states.restore(self.store.facts(_STATES))

    def save(self, state: State, extra: dict[str, Any], states: States) -> None:
        """Make an exchange durable: what lies beside the checkpoint, then the checkpoint; then drop what it replaced.

        Raises:
            CheckpointError: something cannot be written; the checkpoint before is untouched.
        """
        parts = (states, self.archive, self._versions)
        for part in parts:
            part.commit()
        extra = {**extra, "store": self.store.commit(), "masks": self.masks.order}
        checkpoint.save(self._folder, state, extra, {"residual": self.residual})
        for part in parts:
            part.collect()

    def close(self) -> None:
        """Release the files; what was not saved is lost."""
        self.store.close()
