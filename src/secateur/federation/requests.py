"""Requests: what an ask sends to each client, encoded as often as needed and no more often."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from secateur.contract.ask import Ask
from secateur.federation import client, feedback
from secateur.federation.books import Books
from secateur.federation.held_masks import name_of
from secateur.pruning.mask import apply
from secateur.streams import derive
from secateur.study.study import Study
from secateur.wire import masks as packing
from secateur.wire.codec import Outgoing, decode, part_sizes
from secateur.wire.head import context_of
from secateur.wire.message import Expected, Masks, Message, Scalar, Spec, Tensors, specs_of

MASK, TENSORS = "the full mask", "the frozen tensors"
"""What a request may refer to that its client lacks."""

_WRITTEN = 64 * 2**20


@dataclass(frozen=True)
class Request:
    """What is remembered of a request that was sent.

    Attributes:
        context: the number that binds a reply to it.
        parts: its bytes by part of the payload.
        size: its bytes.
        refers: what it refers to, of ``MASK`` and ``TENSORS``.
    """

    context: int
    parts: Mapping[str, int]
    size: int
    refers: frozenset[str]


@dataclass(frozen=True)
class Slice:
    """The mask of a client that is sent its own part of the model, read once and packed until the client answers."""

    packed: Tensors
    specs: Mapping[str, Spec]
    name: str

    @classmethod
    def of(cls, mask: Masks) -> Slice:
        """Return a mask, packed."""
        return cls(packing.pack(mask), specs_of(mask), name_of(mask))

    def mask(self) -> Masks:
        """Return the mask."""
        return packing.unpack(self.packed, self.specs)


class Requests:
    """The requests of one ask.

    Args:
        ask: the ask.
        study: says how values travel.
        books: who holds which mask and which tensors; the residual is updated.
        trains: whether replies are trained weights.
        reads: whether replies are read by the caller, which may need what the clients read in their requests.

    Attributes:
        sent: what is remembered of each request.
        slices: the part of the model that a client was sent.
    """

    def __init__(self, ask: Ask, study: Study, books: Books, *, trains: bool, reads: bool) -> None:
        self._ask, self._study, self._books = ask, study, books
        self._reads = reads and (study.wire.replies != "weights" or study.wire.values != "fp32")
        self.sent: dict[int, Request] = {}
        self.slices: dict[int, Slice] = {}
        self._bases: dict[int, Tensors] = {}
        self._name = "" if ask.message.mask is None else name_of(ask.message.mask)
        self._written: OrderedDict[tuple[str | None, bool], tuple[bytes, Request]] = OrderedDict()
        self._outgoing: Outgoing | None = None
        self._base: Tensors = {}
        if ask.slices is None and not ask.own:
            self._outgoing, self._base = self._prepare(feeds=trains and study.wire.feedback)

    def _prepare(self, *, feeds: bool) -> tuple[Outgoing, Tensors]:
        """Return the request, and the weights that a client reads in it."""
        message = self._ask.message
        feeds = feeds and self._study.wire.values != "fp32"
        if feeds:
            message = feedback.add(message, self._books.residual)
        outgoing = self._write(message)
        arrived = self._arrived(message, outgoing)
        if feeds:
            self._books.residual = feedback.residual(message, arrived)
        return outgoing, arrived.tensors

    def _write(self, message: Message, *who: int) -> Outgoing:
        ask, wire = self._ask, self._study.wire
        scalars: dict[str, Scalar] = {**message.scalars, "phase": ask.phase, "round": ask.round}
        if ask.plain:
            scalars[client.PLAIN] = True
        seed = derive(self._study.seed, "wire", ask.phase, ask.round, *who)
        message = replace(message, scalars=scalars)
        return Outgoing(
            message, values=wire.values, template=self._books.masks.specs, seed=seed, packs=wire.packing == "planes"
        )

    def _arrived(self, message: Message, outgoing: Outgoing) -> Message:
        """Return a request as its receiver reads it."""
        if self._study.wire.values == "fp32":
            return message
        return decode(outgoing.bytes(), Expected.of(message.tensors, mask="optional"))

    def _own(self, who: int) -> Message:
        """Return the message to a client with its own part of the model, or its own tensors."""
        tensors, mask = self._ask.request(who)
        return replace(self._ask.message, tensors=apply(tensors, mask), mask=mask)

    def _slice(self, who: int) -> tuple[Outgoing, Masks | None, str]:
        """Return the request to a client with its own part of the model, its mask and the mask's name.

        There is no error feedback for such a request.
        """
        message, name = self._own(who), self._name
        if self._ask.slices is not None:
            self.slices[who] = Slice.of(message.mask or {})
            name = self.slices[who].name
        outgoing = self._write(message, who)
        if self._reads:
            self._bases[who] = self._arrived(message, outgoing).tensors
        return outgoing, message.mask, name

    def to(self, who: int) -> bytes:
        """Return the request to a client; clients that hold the same are sent the very same bytes."""
        shared = self._outgoing
        outgoing, mask, name = (shared, self._ask.message.mask, self._name) if shared else self._slice(who)
        held = None if mask is None else self._books.masks.name(who, at_hand=name)
        base = self._books.named(who)
        carries = base is not None and len(base.carried) > 0
        written = self._written.get((held, carries)) if shared else None
        if written is None:
            known = None if held is None else mask if held == name else self._books.masks.mask(held)
            request = outgoing.bytes(known, base)
            refers = {MASK: held is not None, TENSORS: base is not None and not carries}
            named = frozenset(what for what, does in refers.items() if does)
            parts = part_sizes(request, checked=True)
            written = request, Request(context_of(request), parts, len(request), named)
            self._remember((held, carries), written)
        request, self.sent[who] = written
        return request

    def _remember(self, to: tuple[str | None, bool], written: tuple[bytes, Request]) -> None:
        """Keep the last encoded requests, within a budget of bytes."""
        if self._outgoing is not None:
            self._written[to] = written
            while len(self._written) > 1 and len(self._written) * len(written[0]) > _WRITTEN:
                self._written.popitem(last=False)

    def base_of(self, who: int) -> Tensors:
        """Return the weights that a client read in its request, for the one time that they are needed."""
        return self._bases.pop(who, self._base)

    def read_by(self, who: int, base: Tensors | None) -> tuple[Tensors, Masks | None]:
        """Return the tensors and the mask that a client read in its request.

        Args:
            who: the client.
            base: the tensors, if they are at hand.
        """
        if self._outgoing is not None:
            return apply(self._base, self._ask.message.mask), self._ask.message.mask
        message = self._own(who)
        return base or self._arrived(message, self._write(message, who)).tensors, message.mask
