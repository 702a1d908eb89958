"""Books: what the server remembers besides the method's state, and how both are saved together."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from secateur.contract.state import State
from secateur.engines import States
from secateur.federation import checkpoint, claims, store
from secateur.federation.archive import Archive
from secateur.federation.checkpoint import Saved
from secateur.federation.claims import KINDS, Claims, unknown
from secateur.federation.held_masks import HeldMasks
from secateur.federation.store import Store
from secateur.wire.carried import Group
from secateur.wire.known import Known
from secateur.wire.message import Spec, Tensors

_ARCHIVE, _MASKS, _STATES = "archive", "masks", "clients"


class Books:
    """What the server remembers of single clients and of its requests; data that grow with the clients are on disk.

    Args:
        folder: the run's folder.
        specs: the shape and dtype of the model's tensors.
        known: returns the number of a client's rows if the server knows it.
        base: the model's frozen and constant tensors; each client makes them too, or is sent them once.

    Attributes:
        store: facts about single clients.
        archive: tensors of single clients, for the method's state.
        masks: which client holds which mask.
        claims: the number of each client's rows.
        base: as given, for clients that lack these tensors.
        bases: the digest of the base that each client holds; empty if it said that it lacks the base and has not been
            heard of since.
        medians: of what guards measured of the last cohort's replies, by name; see ``contract.guard``.
        residual: the part of the weights that rounding left out of the last training request; it is added to the next.
    """

    def __init__(
        self, folder: Path, specs: Mapping[str, Spec], known: claims.Known = unknown, *, base: Tensors | None = None
    ) -> None:
        self.base = Group(base or {})
        self._folder, self._specs = folder, specs
        self.store = Store(folder / store.NAME)
        self.archive = Archive(folder / _ARCHIVE, self.store.facts(_ARCHIVE))
        self._versions = Archive(folder / _MASKS, self.store.facts("version"))
        self.masks = HeldMasks(specs)
        self.claims = Claims(known, {kind: self.store.facts(f"{kind} rows") for kind in KINDS})
        self.bases: MutableMapping[int, str] = self.store.facts("base")
        self.medians: dict[str, float] = {}
        self.residual: Tensors = {}

    def begin(self) -> None:
        """Begin a run.

        Raises:
            CheckpointError: the folder holds a run whose checkpoint is missing.
        """
        self._open(None, [])

    def restore(self, saved: Saved) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointError: a file of the run is missing, damaged or belongs to another exchange.
        """
        self.residual = saved.tensors.get("residual", {})
        self.medians = saved.extra.get("medians", {})
        self._open(saved.extra["store"], saved.extra["masks"])

    def _open(self, mark: Mapping[str, int | str] | None, order: list[str]) -> None:
        self.store.open(mark)
        self.masks = HeldMasks(self._specs, self.store.facts("mask"), self._versions, order)
        self.archive.check()
        self._versions.check()

    def attach(self, states: States) -> None:
        """Connect the engine's states of clients with the store."""
        states.restore(self.store.facts(_STATES))

    def named(self, client: int) -> Known | None:
        """Return what a request says of the base: its digest, and all of it to a client that lacks it."""
        held = self.bases.get(client) if self.base.digest else None
        return self.base.named(carried=held is not None and held != self.base.digest)

    def confirm_base(self, client: int) -> None:
        """Note that a client holds the base: it has answered a request that named it."""
        if self.base.digest:
            self.bases[client] = self.base.digest

    def save(self, state: State, extra: dict[str, Any], states: States) -> None:
        """Save an exchange: first the other files, then the checkpoint; then delete the files that it replaced.

        Raises:
            CheckpointError: a file cannot be written; the last checkpoint is untouched.
        """
        parts = (states, self.archive, self._versions)
        for part in parts:
            part.commit()
        extra = {**extra, "store": self.store.commit(), "masks": self.masks.order}
        extra |= {"medians": self.medians} if self.medians else {}
        checkpoint.save(self._folder, state, extra, {"residual": self.residual})
        for part in parts:
            part.collect()

    def close(self) -> None:
        """Close the files; changes that were not saved are lost."""
        self.store.close()
