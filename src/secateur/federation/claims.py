"""Claims: how many rows each client says it has; its first claim holds, or the true number if the server knows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Literal, get_args

from secateur.contract.ask import EVALUATE
from secateur.errors import WireError
from secateur.wire.message import Scalar

Kind = Literal["train", "test", "validation"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TRAINED: Mapping[str, Kind] = {"samples": "train"}
HELD_OUT: Mapping[str, Kind] = {"samples": "test", "validation_samples": "validation"}
"""The scalars of a reply that claim rows, to ``EVALUATE`` and to any other ask."""

Known = Callable[[int, Kind], int | None]


def unknown(client: int, kind: Kind) -> int | None:
    """Return None: the server does not know its clients' rows."""
    del client, kind
    return None


class Claims:
    """The rows of each client by kind, pinned at its first reply; they are the weights of means.

    Args:
        known: returns the true number of a client's rows if the server simulates its clients, otherwise None.
        pinned: the first claim of each client, by kind and client.
    """

    def __init__(self, known: Known = unknown, pinned: Mapping[Kind, MutableMapping[int, int]] | None = None) -> None:
        self._known = known
        self.pinned = {kind: {} for kind in KINDS} if pinned is None else pinned

    def check(self, client: int, kind: Kind, count: int) -> None:
        """Pin a client's first claim, or compare a later one with it.

        Raises:
            WireError: the claim differs from the first one, or from the true number.
        """
        true = self._known(client, kind)
        if true is not None and count != true:
            raise WireError(f"it says that it has {count} {kind} rows, and has {true}")
        first = count if true is not None else self.pinned[kind].setdefault(client, count)
        if count != first:
            raise WireError(f"it says that it has {count} {kind} rows, and said {first} when it was first heard")

    def check_all(self, client: int, phase: str, scalars: Mapping[str, Scalar]) -> None:
        """Check every claim in the scalars of a reply.

        Raises:
            WireError: see ``check``.
        """
        for name, kind in (HELD_OUT if phase == EVALUATE else TRAINED).items():
            if name in scalars:
                self.check(client, kind, int(scalars[name]))
