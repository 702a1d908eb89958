"""The base: tensors of a model that training leaves alone, frozen and constant. They travel once at most.

Both sides make them from the study's model. Where a client's are others, such as where a pretrained file lies at the
server only, it is sent the server's: it lacks what the first request names by a digest, says so, and keeps what comes.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import nn

from secateur.errors import CheckpointError, ModelError, WireError
from secateur.learning import resident
from secateur.pruning.mask import Tensors
from secateur.pruning.roles import roles
from secateur.wire import carried, known
from secateur.wire.codec import known_in
from secateur.wire.known import Known
from secateur.wire.message import specs_of

NAME = "base"
"""The folder of a run in which its workers keep what came."""

_COMING = "coming-"


class FrozenError(ModelError):
    """A request is for a model with other frozen tensors than the one here.

    Attributes:
        wanted, made: the digests of these in the request, and here; empty: none.
    """

    def __init__(self, client: int, wanted: str, made: str) -> None:
        super().__init__(
            f"client {client}: the request is for a model with frozen tensors {wanted or 'none'}, the model here has "
            f"{made or 'none'}: give both sides the same model.name, pretrained file and torch"
        )
        self.wanted, self.made = wanted, made


class Kept(Protocol):
    """What is kept of bases that came, by their digests."""

    @property
    def own(self) -> bool:
        """Return whether all of it came to the very client that is served; False: it is shared by several."""

    def __contains__(self, digest: str) -> bool:
        """Return whether there is something by this digest."""

    def get(self, digest: str) -> bytes | None:
        """Return what was kept; None: nothing, or it cannot be read."""

    def put(self, digest: str, data: bytes | memoryview) -> None:
        """Keep something."""


class KeptInFolder:
    """Bases as files of a folder, each named by its digest.

    Args:
        folder: made when the first base comes.
        own: see ``Kept``.
        most: how many are kept; the oldest are dropped.
    """

    def __init__(self, folder: Path, *, own: bool, most: int = 4) -> None:
        self.folder, self._own, self._most = folder, own, most

    @property
    def own(self) -> bool:
        """Return what was given."""
        return self._own

    def __contains__(self, digest: str) -> bool:
        """Return whether there is such a file."""
        return (self.folder / digest).exists()

    def get(self, digest: str) -> bytes | None:
        """Return a file's bytes."""
        try:
            return (self.folder / digest).read_bytes()
        except OSError:  # gone or unreadable: the client lacks it, and is sent it again
            return None

    def put(self, digest: str, data: bytes | memoryview) -> None:
        """Write a file; several processes may write the same at once.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=_COMING, dir=self.folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                Path(temporary).replace(self.folder / digest)
            finally:
                Path(temporary).unlink(missing_ok=True)
        except OSError as broken:
            raise CheckpointError(
                f"cannot keep the frozen tensors that came in {self.folder}: {broken.strerror or broken}; "
                "free some space or mend the folder's permissions"
            ) from broken
        self._drop_oldest()

    def _drop_oldest(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # another process drops them too
            digests = (path for path in self.folder.iterdir() if not path.name.startswith(_COMING))
            files = sorted(digests, key=lambda path: path.stat().st_mtime_ns)
            for path in files[: -self._most]:
                path.unlink(missing_ok=True)


class Base:
    """The base of a resident model: the one made here, or one that came.

    Args:
        model: the resident model.
        make: makes the study's model anew.

    Attributes:
        made: the digest of the base made here; empty: the model has none.
        loaded: the digest of the base that is in the resident model.
    """

    def __init__(self, model: nn.Module, make: Callable[[], nn.Module]) -> None:
        self._model, self._make = model, make
        base = resident.base_of(model)
        self.made = self.loaded = known.digest(base)
        self._specs = specs_of(base)
        self._constant = frozenset(name for name, role in roles(model).items() if role == "constant")
        self._came: bytes | None = None

    @property
    def came(self) -> str:
        """Return the digest of the base in the resident model if it came; empty: it was made here."""
        return "" if self.loaded == self.made else self.loaded

    def load(self, client: int, request: bytes, noted: str, kept: Kept | None) -> bool:
        """Load the base that a request names; return whether its client has it.

        Args:
            client: whose request.
            request: it may carry the base, which is checked, kept and loaded then.
            noted: the digest of the base that the client noted when it came.
            kept: what is kept of bases that came; None: this side takes none but its own.

        Raises:
            ModelError: the model here has no such tensors, this side takes none, or those that came are not those that
                were announced; nothing of them is kept or loaded.
            WireError: the request ends within the base.
        """
        given = known_in(request)
        wanted = given.digest if given else ""
        if wanted == self.made:
            if self.loaded != self.made:
                self._use(self.made, resident.base_of(self._make()))
            return True
        if given is None or kept is None or not self.made:
            raise FrozenError(client, wanted, self.made)
        if given.carried:
            self._take(client, request, given, kept)
            return True
        self._came = None  # as large as the base
        if wanted not in kept or (noted != wanted and not kept.own):
            return False
        return self.loaded == wanted or self._load_kept(wanted, kept)

    def _take(self, client: int, request: bytes, given: Known, kept: Kept) -> None:
        """Check, keep and load what a request carries; what came just before to another client is not read twice."""
        if request is self._came and self.loaded == given.digest and given.digest in kept:
            return
        try:
            tensors = carried.read(given, self._specs, self._constant)
        except WireError as broken:
            raise ModelError(f"client {client}: the frozen tensors that came are refused: {broken}") from broken
        kept.put(given.digest, given.carried)
        self._use(given.digest, tensors)
        self._came = request

    def _load_kept(self, wanted: str, kept: Kept) -> bool:
        data = kept.get(wanted)
        if data is None:
            return False
        try:
            self._use(wanted, carried.read(Known(wanted, data), self._specs, self._constant))
        except WireError:  # damaged on the disk: the client lacks it, and is sent it again
            return False
        return True

    def _use(self, digest: str, tensors: Tensors) -> None:
        resident.load(self._model, tensors)
        self.loaded = digest
