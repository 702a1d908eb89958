"""A node keeps frozen and constant tensors that a server sent it, so that they come once.

They lie in the folder ``state`` of the node's configuration, for all its runs, or in Flower's Context, which ends with
the Flower run. With ``base = "own"`` in its configuration a node takes none but those that its own model makes.
"""

from __future__ import annotations

from secateur.federation.base import NAME, Kept, KeptInFolder
from secateur.flower.asked import Node
from secateur.flower.site import Site

_KEY = "secateur-base"


class KeptInContext:
    """The last that came of one kind, in Flower's Context; see ``Kept``.

    Args:
        node: which keeps it.
        key: of the record.
    """

    own = True

    def __init__(self, node: Node, key: str = _KEY) -> None:
        self._records, self._key = node.kept, key

    def __contains__(self, digest: str) -> bool:
        """Return whether it is kept."""
        return digest in self._records.get(self._key, {})

    def get(self, digest: str) -> bytes | None:
        """Return what was kept."""
        return self._records.get(self._key, {}).get(digest)

    def put(self, digest: str, data: bytes | memoryview) -> None:
        """Keep it in place of what was kept before."""
        self._records[self._key] = {digest: bytes(data)}


def kept(node: Node, site: Site) -> Kept | None:
    """Return where a node keeps what comes; None: its owner takes nothing."""
    if site.base == "own":
        return None
    return KeptInContext(node) if site.folder is None else KeptInFolder(site.folder / NAME, own=True)
