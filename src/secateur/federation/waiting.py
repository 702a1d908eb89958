"""Replies that wait: where a guard compares clients, the first replies of a kind are kept until all are measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from secateur.contract.reply import Reply
from secateur.contract.spool import Spool


class Waiting:
    """Single replies of one exchange, on disk where they are many; it takes the place of a reducer until they go on.

    Args:
        spool: stores their tensors and masks.
    """

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._held: dict[int, tuple[Reply, int, int | None]] = {}

    def add(self, reply: Reply) -> None:
        """Keep a reply."""
        mask = None if reply.mask is None else self._spool.put(reply.mask)
        bare = replace(reply, tensors={}, mask=None, borrowed=False)
        self._held[reply.client] = bare, self._spool.put(reply.tensors), mask

    def skip(self, client: int) -> None:
        """Do nothing: who has no reply is not waited for."""

    def replies(self, clients: Sequence[int]) -> Iterator[Reply]:
        """Yield the replies, in the order of the clients of the ask; each is read when it is wanted."""
        for client in clients:
            if client in self._held:
                bare, tensors, mask = self._held.pop(client)
                held = None if mask is None else self._spool.get(mask)
                yield replace(bare, tensors=self._spool.get(tensors), mask=held)
