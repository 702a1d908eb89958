"""A client's answer as reductions and guards see it, and the request that it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from secateur.contract.state import Setting
from secateur.pruning.mask import Mask, Tensors
from secateur.wire.message import Scalar


@dataclass(frozen=True)
class Reply:
    """One client's answer, after its checks.

    Attributes:
        client: the sender.
        rows: n_k, pinned by the server when it first heard from the client, and no more than guards believe; its
            weight in a mean by rows.
        tensors: the reply's tensors, by name.
        mask: the reply's mask; None: it has none.
        scalars: the reply's scalars, by name.
        borrowed: whether the memory of its tensors is used for something else later, so that what is kept must be
            copied.
        facts: what guards measured of it, by name, to be compared with the cohort's; see ``contract.guard``.
        bounded: what guards cut it down to, by name; empty: nothing.
    """

    client: int
    rows: int
    tensors: Tensors
    mask: Mask | None
    scalars: Mapping[str, Scalar]
    borrowed: bool = False
    facts: Mapping[str, float] = field(default_factory=dict)
    bounded: Mapping[str, float] = field(default_factory=dict)

    def own(self) -> Reply:
        """Return the same reply in memory of its own."""
        if not self.borrowed:
            return self
        mask = None if self.mask is None else {name: part.clone() for name, part in self.mask.items()}
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, mask=mask, borrowed=False)


class Sent:
    """The request that a reply answers, before any rounding on the wire; it is read only if a reduction uses it.

    Args:
        setting: the federation.
        read: returns the request's tensors and mask.
    """

    def __init__(self, setting: Setting, read: Callable[[], tuple[Tensors, Mask | None]]) -> None:
        self.setting = setting
        self._make = read

    @cached_property
    def _read(self) -> tuple[Tensors, Mask | None]:
        return self._make()

    @property
    def tensors(self) -> Tensors:
        """Return the tensors that the client was sent, under its mask."""
        return self._read[0]

    @property
    def mask(self) -> Mask | None:
        """Return the mask that the client was sent; None: no weight is pruned."""
        return self._read[1]


@dataclass(frozen=True)
class Stack:
    """Several replies to one request, stacked along a new first dimension, on the device where they were made.

    Attributes:
        clients: the senders, in the order of the ask.
        rows: n_k of each sender.
        tensors: by name, shape (clients, ...).
        mask: by name, shape (clients, ...); None: the replies have none.
        scalars: the scalars of each reply.
    """

    clients: Sequence[int]
    rows: Sequence[int]
    tensors: Tensors
    mask: Mask | None
    scalars: Sequence[Mapping[str, Scalar]]

    def replies(self) -> Iterator[Reply]:
        """Yield the replies one by one; their tensors are views of the stack."""
        for place, client in enumerate(self.clients):
            mask = None if self.mask is None else {n: m[place] for n, m in self.mask.items()}
            tensors = {n: t[place] for n, t in self.tensors.items()}
            yield Reply(client, self.rows[place], tensors, mask, self.scalars[place])
