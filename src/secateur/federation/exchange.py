"""One ask on its way: encode the request for each client, check each reply, count what the engine carried."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from secateur.contract.method import TRAIN, Ask
from secateur.engines import Engine, Failure
from secateur.errors import ConfigError, WireError
from secateur.federation import client, link
from secateur.federation.link import Links
from secateur.federation.records import short
from secateur.pruning.mask import apply
from secateur.streams import derive
from secateur.study.study import Study
from secateur.wire.codec import Outgoing, context_of, decode, is_lost, part_sizes
from secateur.wire.message import Expected, Masks, Message, Scalar, Tensors

_MOST_SAMPLES = 2**40
_COUNTED = dict.fromkeys(("samples", "processed", "validation_samples", *client.TOLD), (0, _MOST_SAMPLES))
_LATE = "asked for the full mask, too late to send it within the deadline"


@dataclass
class Books:
    """What the server remembers of its links from one exchange to the next; part of a checkpoint.

    Attributes:
        links: who holds which mask.
        error: what the last training request left out of the weights; it is added to the next one.
        base: the digest of the model's tensors that never travel; empty: it has none. Not part of a checkpoint: the
            study makes them.
    """

    links: Links
    error: Tensors = field(default_factory=dict)
    base: str = ""


@dataclass(frozen=True)
class _Sent:
    context: int
    parts: Mapping[str, int]
    refers: bool


@dataclass
class Exchange:
    """One ask under way.

    Attributes:
        ask: what is asked of whom.
        engine: carries it.
        study: says how values travel.
        books: read and brought up to date.
        deadline: seconds for all replies; None: no limit.
        bounds: least and most of scalars, by name; a reply beyond them costs its sender the place.
        notify: called with (answered, asked).
        down, up: bytes carried, by part.
        left_out: who, and why.
        told: the scalars of each reply that counts.
        each: bytes carried down and up, by client.
    """

    ask: Ask
    engine: Engine
    study: Study
    books: Books
    deadline: float | None = None
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    notify: Callable[[int, int], None] = lambda _done, _total: None
    down: Counter[str] = field(default_factory=Counter)
    up: Counter[str] = field(default_factory=Counter)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)
    each: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sent: dict[int, _Sent] = {}
        self._answered: dict[int, bool] = {}
        self._trains = self.ask.phase == TRAIN and not self.ask.plain
        self._expects = self._expected()
        self._bases: dict[int, Tensors] = {}
        self._outgoing: Outgoing | None = None
        self._written: tuple[str | None, bytes] | None = None
        self._base: Tensors = {}
        if self.ask.slices is None and not self.ask.own:
            self._outgoing, self._base = self._prepare()

    def _expected(self) -> Expected:
        expects = self.ask.expects
        expects = replace(expects, scalars={**(expects.scalars or {}), **client.TOLD})
        if not self._trains or self.study.wire.replies != "topk":
            return expects
        if expects.mask in {"optional", "required"}:
            raise ConfigError("wire.replies = topk: this method's clients send masks of their own; use updates")
        floats = frozenset(n for n, spec in expects.tensors.items() if spec.dtype == torch.float32)
        return replace(expects, mask="required", maskable=floats, within=expects.mask == "same")

    def _prepare(self) -> tuple[Outgoing, Tensors]:
        """Return the request, and the weights that a client reads in it."""
        message, wire = self.ask.message, self.study.wire
        feeds = self._trains and wire.feedback and wire.values != "fp32"
        if feeds:
            message = link.add(message, self.books.error)
        outgoing = self._write(message)
        arrived = self._arrived(message, outgoing)
        if feeds:
            self.books.error = link.left_out(message, arrived)
        return outgoing, arrived.tensors

    def _write(self, message: Message, *who: int) -> Outgoing:
        ask, wire = self.ask, self.study.wire
        scalars: dict[str, Scalar] = {**message.scalars, "phase": ask.phase, "round": ask.round}
        if ask.plain:
            scalars[client.PLAIN] = True
        if self.books.base:
            scalars[client.BASE] = self.books.base
        seed = derive(self.study.seed, "wire", ask.phase, ask.round, *who)
        message = replace(message, scalars=scalars)
        return Outgoing(message, values=wire.values, template=self.books.links.specs, seed=seed)

    def _arrived(self, message: Message, outgoing: Outgoing) -> Message:
        """Return a request as its receiver reads it."""
        if self.study.wire.values == "fp32":
            return message
        return decode(outgoing.bytes(), Expected.of(message.tensors, mask="optional"))

    def _held(self, who: int) -> Masks | None:
        return self.ask.message.mask if self.ask.slices is None else self.ask.slices[who]

    def _slice(self, who: int) -> tuple[Outgoing, Masks | None]:
        """Return the request of a client with a part of its own, and its mask; what rounding leaves out is lost."""
        whole, mask = self.ask.message, self._held(who)
        message = replace(whole, tensors=apply(self.ask.tensors(who), mask), mask=mask)
        outgoing = self._write(message, who)
        if self.study.wire.replies != "weights":
            self._bases[who] = self._arrived(message, outgoing).tensors
        return outgoing, mask

    def replies(self) -> Iterator[tuple[int, Message]]:
        """Yield checked replies in the order of the ask, whatever order they arrive in."""
        waiting: dict[int, bytes | Failure] = {}
        order = list(self.ask.clients)
        for answered, (who, reply) in enumerate(self._arrivals(), start=1):
            waiting[who] = reply
            self.notify(answered, len(self.ask.clients))
            while order and order[0] in waiting:
                first = order.pop(0)
                message = self._check(first, waiting.pop(first))
                if message is not None:
                    yield first, message
        if self.ask.message.mask is not None:
            self.books.links.confirm(self._answered, self.ask.message.mask)
        for who, answered in self._answered.items() if self.ask.slices else ():
            self.books.links.confirm({who: answered}, (self.ask.slices or {})[who])

    def _arrivals(self) -> Iterator[tuple[int, bytes | Failure]]:
        """Yield each client's answer; who has lost the mask that the request refers to is asked once more."""
        begun = time.monotonic()
        again: list[int] = []
        for who, reply in self._carry(self.ask.clients, self.deadline):
            sent = self._sent.get(who)
            if sent and sent.refers and isinstance(reply, bytes) and is_lost(reply, sent.context):
                self.up.update(part_sizes(reply))
                self.books.links.held.pop(who, None)
                again.append(who)
            else:
                yield who, reply
        left = None if self.deadline is None else self.deadline - (time.monotonic() - begun)
        if left is not None and left <= 0:
            yield from ((who, Failure(who, _LATE)) for who in again)
        elif again:
            yield from self._carry(tuple(again), left)

    def _carry(self, clients: tuple[int, ...], deadline: float | None) -> Iterator[tuple[int, bytes | Failure]]:
        for who, reply in self.engine.exchange(((k, self._request(k)) for k in clients), deadline):
            if not isinstance(reply, Failure):
                self.each.setdefault(who, [0, 0])[1] += len(reply)
            if not isinstance(reply, Failure) or reply.sent:
                self.down.update(self._sent[who].parts)
                self.each.setdefault(who, [0, 0])[0] += sum(self._sent[who].parts.values())
                self._answered[who] = False
            yield who, reply

    def _request(self, who: int) -> bytes:
        outgoing, mask = (self._outgoing, self.ask.message.mask) if self._outgoing else self._slice(who)
        version = self.books.links.held.get(who) if mask is not None else None
        # who holds what the client before held is sent the very same bytes, which an engine need not carry twice
        if self._outgoing is None or self._written is None or self._written[0] != version:
            held = None if version is None else self.books.links.mask(who)
            self._written = version, outgoing.bytes(held)
        request = self._written[1]
        self._sent[who] = _Sent(context_of(request), part_sizes(request, checked=True), version is not None)
        return request

    def _check(self, who: int, reply: bytes | Failure) -> Message | None:
        if isinstance(reply, Failure):
            self.left_out.append({"client": who, "reason": short(reply.reason)})
            return None
        try:
            known = self._expects.known if self.ask.slices is None else self.ask.slices[who]
            message = decode(reply, replace(self._expects, known=known, context=self._sent[who].context))
            _sane(message.scalars, {**_COUNTED, **self.bounds})
            message = self._restore(message, self._bases.pop(who, self._base), known)
        except WireError as broken:
            self.up["refused"] += len(reply)
            self.left_out.append({"client": who, "reason": short(str(broken))})
            return None
        self.up.update(part_sizes(reply, checked=True))
        self._answered[who] = True
        self.told.append({"client": who, **message.scalars})
        return message

    def _restore(self, message: Message, base: Tensors, known: Masks | None) -> Message:
        """Return the weights that a reply to ``base`` stands for."""
        replies = self.study.wire.replies
        if not self._trains or replies == "weights":
            return message
        if replies == "topk":
            message = replace(message, mask=known if self.ask.expects.mask == "same" else None)
        return link.from_update(message, base)


def _sane(scalars: Mapping[str, Scalar], bounds: Mapping[str, tuple[float, float]]) -> None:
    for name, value in scalars.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise WireError(f"scalar {name!r} is {value}; a finite number is expected")
        least, most = bounds.get(name, (-math.inf, math.inf))
        if not isinstance(value, str) and not least <= value <= most:
            raise WireError(f"scalar {name!r} is {value}; {least} to {most} is expected")
