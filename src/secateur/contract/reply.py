"""A client's answer as reductions and guards see it, and the request that it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from secateur.contract.state import Setting
from secateur.pruning.mask import Mask, Tensors
from secateur.wire.message import Scalar


@dataclass(frozen=True)
class Reply:
    """One client's answer, checked.

    Attributes:
        client: who answered.
        rows: n_k, pinned by the server when the client was first seen; its weight in a mean by rows.
        tensors: by name.
        mask: the reply's mask; None: it has none.
        scalars: by name.
    """

    client: int
    rows: int
    tensors: Tensors
    mask: Mask | None
    scalars: Mapping[str, Scalar]


class Sent:
    """The request that a reply answers, as the server meant it; read from the server's store only where it is wanted.

    Args:
        setting: of the federation.
        read: returns the tensors and the mask.
    """

    def __init__(self, setting: Setting, read: Callable[[], tuple[Tensors, Mask | None]]) -> None:
        self.setting = setting
        self._make = read

    @cached_property
    def _read(self) -> tuple[Tensors, Mask | None]:
        return self._make()

    @property
    def tensors(self) -> Tensors:
        """Return the message's tensors, or the client's own, under its mask."""
        return self._read[0]

    @property
    def mask(self) -> Mask | None:
        """Return what the client held; None: everything."""
        return self._read[1]


@dataclass(frozen=True)
class Stack:
    """Several replies to one request, stacked along a first dimension, on whatever device they were made.

    Attributes:
        clients: who, in the order of the ask.
        rows: n_k of each.
        tensors: by name, shape (clients, ...).
        mask: by name, shape (clients, ...); None: the replies have none.
        scalars: of each.
    """

    clients: Sequence[int]
    rows: Sequence[int]
    tensors: Tensors
    mask: Mask | None
    scalars: Sequence[Mapping[str, Scalar]]

    def replies(self) -> Iterator[Reply]:
        """Yield the replies one by one; their tensors are views."""
        for place, client in enumerate(self.clients):
            mask = None if self.mask is None else {n: m[place] for n, m in self.mask.items()}
            tensors = {n: t[place] for n, t in self.tensors.items()}
            yield Reply(client, self.rows[place], tensors, mask, self.scalars[place])
