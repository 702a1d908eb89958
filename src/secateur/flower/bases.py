"""A node keeps frozen and constant tensors that a server sent it, so that they come once.

They lie in the folder ``state`` of the node's configuration, for all its runs, or in Flower's Context, which ends with
the Flower run. With ``base = "own"`` in its configuration a node takes none but those that its own model makes.
"""

from __future__ import annotations

from secateur.federation.base import NAME, Kept, KeptInFolder
from secateur.flower.messages import Array, ArrayRecord, Context
from secateur.flower.site import Site

_KEY, _STYPE = "secateur-base", "secateur.base"


class KeptInContext:
    """The last that came of one kind, in Flower's Context; see ``Kept``.

    Args:
        context: of the node.
        key: of the record.
        stype: what the record says of its bytes.
    """

    own = True

    def __init__(self, context: Context, key: str = _KEY, stype: str = _STYPE) -> None:
        self._records, self._key, self._stype = context.state, key, stype

    def __contains__(self, digest: str) -> bool:
        """Return whether it is kept."""
        held = self._records.get(self._key)
        return isinstance(held, ArrayRecord) and digest in held

    def get(self, digest: str) -> bytes | None:
        """Return what was kept."""
        held = self._records.get(self._key)
        array = held.get(digest) if isinstance(held, ArrayRecord) else None
        return None if array is None else array.data

    def put(self, digest: str, data: bytes | memoryview) -> None:
        """Keep it in place of what was kept before."""
        self._records[self._key] = ArrayRecord({digest: Array("uint8", (len(data),), self._stype, bytes(data))})


def kept(context: Context, site: Site) -> Kept | None:
    """Return where a node keeps what comes; None: its owner takes nothing."""
    if site.base == "own":
        return None
    return KeptInContext(context) if site.folder is None else KeptInFolder(site.folder / NAME, own=True)
