"""How many rows each client says that it has: its first word counts, and the truth where the server knows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Literal, get_args

from secateur.errors import WireError

Kind = Literal["train", "test", "validation"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Known = Callable[[int, Kind], int | None]


def unknown(client: int, kind: Kind) -> int | None:
    """Know nothing: rows lie where clients are."""
    del client, kind
    return None


class Claims:
    """Rows by kind and client, pinned when a client is first heard of; weights of means come from them.

    Args:
        known: the true number, where the server simulates its clients; None where it does not know.
        pinned: for each kind what clients said first, by client.
    """

    def __init__(self, known: Known = unknown, pinned: Mapping[Kind, MutableMapping[int, int]] | None = None) -> None:
        self._known = known
        self.pinned = {kind: {} for kind in KINDS} if pinned is None else pinned

    def check(self, client: int, kind: Kind, count: int) -> None:
        """Pin a client's first word, or hold a later one against it.

        Raises:
            WireError: the client says something else than before, or than the server knows.
        """
        true = self._known(client, kind)
        if true is not None and count != true:
            raise WireError(f"it says that it has {count} {kind} rows, and has {true}")
        first = count if true is not None else self.pinned[kind].setdefault(client, count)
        if count != first:
            raise WireError(f"it says that it has {count} {kind} rows, and said {first} when it was first heard")
