"""The exchange of one ask: requests are encoded, replies are checked and reduced, and carried bytes are counted."""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from secateur.contract.ask import EVALUATE, TRAIN, Ask
from secateur.contract.guard import Guard, Passage
from secateur.contract.reducer import Reduced, Reducer
from secateur.contract.reply import Reply, Sent
from secateur.contract.spool import Spool
from secateur.contract.state import Setting, State
from secateur.engines import Engine, Failure
from secateur.errors import ConfigError, EngineError, WireError
from secateur.federation import client, feedback
from secateur.federation.books import Books
from secateur.federation.claims import Kind
from secateur.federation.held_masks import name_of
from secateur.federation.records import short
from secateur.pruning.mask import apply
from secateur.streams import derive
from secateur.study.study import Study
from secateur.wire import masks as packing
from secateur.wire.codec import Outgoing, context_of, decode, is_lost, part_sizes
from secateur.wire.message import Expected, Masks, Message, Scalar, Spec, Tensors, specs_of

_MOST_SAMPLES = 2**40
_COUNTED = dict.fromkeys(("samples", "processed", "validation_samples", *client.COST_SCALARS), (0, _MOST_SAMPLES))
_TRAINED: Mapping[str, Kind] = {"samples": "train"}
_HELD_OUT: Mapping[str, Kind] = {"samples": "test", "validation_samples": "validation"}
_WRITTEN = 64 * 2**20
_LATE = "asked for {}, too late to send it within the deadline"
_MASK, _TENSORS = "the full mask", "the frozen tensors"


@dataclass(frozen=True)
class _Sent:
    context: int
    parts: Mapping[str, int]
    refers: frozenset[str]


@dataclass(frozen=True)
class _Slice:
    """The mask of a client that is sent its own part of the model, read once and packed until the client answers."""

    packed: Tensors
    specs: Mapping[str, Spec]
    name: str

    @classmethod
    def of(cls, mask: Masks) -> _Slice:
        return cls(packing.pack(mask), specs_of(mask), name_of(mask))

    def mask(self) -> Masks:
        return packing.unpack(self.packed, self.specs)


@dataclass
class Exchange:
    """The exchange of one ask between the server and its clients.

    Attributes:
        ask: the ask.
        engine: carries requests and replies.
        study: says how values travel.
        books: the server's notes of single clients, which are updated.
        setting: the federation.
        guards: the guards of the study, in their order at a client.
        deadline: the seconds for all replies; None: no limit.
        bounds: least and most of scalars, by name; a reply beyond them is refused.
        notify: called with the numbers of clients answered and asked.
        macs_of: returns the MACs of an example under a mask, on surviving weights and with units cut.
        down, up: the bytes carried, by part of the payload.
        left_out: the clients that were left out, each with the reason.
        reply_scalars: the scalars of each accepted reply, in the order of the ask.
        carried: the bytes carried down and up, by client.
        macs: the result of ``macs_of`` for the slice of each client whose reply was accepted.
    """

    ask: Ask
    engine: Engine
    study: Study
    books: Books
    setting: Setting
    guards: Sequence[Guard] = ()
    deadline: float | None = None
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    notify: Callable[[int, int], None] = lambda _done, _total: None
    macs_of: Callable[[Masks | None], tuple[int, int]] = lambda _mask: (0, 0)
    down: Counter[str] = field(default_factory=Counter)
    up: Counter[str] = field(default_factory=Counter)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    reply_scalars: list[dict[str, Any]] = field(default_factory=list)
    carried: dict[int, list[int]] = field(default_factory=dict)
    macs: dict[int, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for guard in self.guards:
            guard.check(self.ask)
        self._read = False
        self._sent: dict[int, _Sent] = {}
        self._answered: dict[int, bool] = {}
        self._trains = self.ask.phase == TRAIN and not self.ask.plain
        self._expects = self._expected()
        self._bases: dict[int, Tensors] = {}
        self._slices: dict[int, _Slice] = {}
        self._name = "" if self.ask.message.mask is None else name_of(self.ask.message.mask)
        self._outgoing: Outgoing | None = None
        self._written: OrderedDict[tuple[str | None, bool], tuple[bytes, _Sent]] = OrderedDict()
        self._base: Tensors = {}
        if self.ask.slices is None and not self.ask.own:
            self._outgoing, self._base = self._prepare()

    def _expected(self) -> Expected:
        expects = self.ask.expects
        scalars = {**(expects.scalars or {}), **client.COST_SCALARS}
        expects = replace(expects, scalars=scalars, values=self.study.wire.values)
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
            message = feedback.add(message, self.books.residual)
        outgoing = self._write(message)
        arrived = self._arrived(message, outgoing)
        if feeds:
            self.books.residual = feedback.residual(message, arrived)
        return outgoing, arrived.tensors

    def _write(self, message: Message, *who: int) -> Outgoing:
        ask, wire = self.ask, self.study.wire
        scalars: dict[str, Scalar] = {**message.scalars, "phase": ask.phase, "round": ask.round}
        if ask.plain:
            scalars[client.PLAIN] = True
        seed = derive(self.study.seed, "wire", ask.phase, ask.round, *who)
        message = replace(message, scalars=scalars)
        return Outgoing(message, values=wire.values, template=self.books.masks.specs, seed=seed)

    def _arrived(self, message: Message, outgoing: Outgoing) -> Message:
        """Return a request as its receiver reads it."""
        if self.study.wire.values == "fp32":
            return message
        return decode(outgoing.bytes(), Expected.of(message.tensors, mask="optional"))

    def _slice(self, who: int) -> tuple[Outgoing, Masks | None, str]:
        """Return the request to a client with its own part of the model, its mask and the mask's name.

        There is no error feedback for such a request.
        """
        whole, mask, name = self.ask.message, self.ask.message.mask, self._name
        if self.ask.slices is not None:
            mask = self.ask.slices[who]
            self._slices[who] = _Slice.of(mask)
            name = self._slices[who].name
        message = replace(whole, tensors=apply(self.ask.tensors(who), mask), mask=mask)
        outgoing = self._write(message, who)
        if self.study.wire.replies != "weights":
            self._bases[who] = self._arrived(message, outgoing).tensors
        return outgoing, mask, name

    def replies(self) -> Iterator[tuple[int, Reply | None]]:
        """Yield each client with its checked reply, as replies arrive; None if it failed or was refused.

        Raises:
            EngineError: the replies were read before.
        """
        if self._read:
            raise EngineError(f"the replies to {self.ask.phase!r} were read already: they come once")
        self._read = True
        for answered, (who, reply) in enumerate(self._arrivals(), start=1):
            self.notify(answered, len(self.ask.clients))
            yield who, self._check(who, reply)
        place = {client: number for number, client in enumerate(self.ask.clients)}
        for rows in (self.reply_scalars, self.left_out):
            rows.sort(key=lambda row: place[row["client"]])
        answers = {who: self._answered[who] for who in self.ask.clients if who in self._answered}
        if self.ask.message.mask is not None:
            self.books.masks.confirm(answers, self.ask.message.mask)

    def reduce(self, state: State, spool: Spool) -> Reduced:
        """Return the reduced replies; ``spool`` stores those that must stay single."""
        reducer = Reducer(self.ask, state.setting, spool)
        for who, reply in self.replies():
            if reply is None:
                reducer.skip(who)
            else:
                reducer.add(reply)
        return reducer.finish(state)

    def _arrivals(self) -> Iterator[tuple[int, bytes | Failure]]:
        """Yield each client's answer; one that lacks what its request refers to is asked once more, and sent it."""
        begun = time.monotonic()
        again: dict[int, str] = {}
        for who, reply in self._carry(self.ask.clients, self.deadline):
            lacking = self._lacking(who, reply)
            if lacking:
                again[who] = lacking
            else:
                yield who, reply
        left = None if self.deadline is None else self.deadline - (time.monotonic() - begun)
        if left is not None and left <= 0:
            yield from ((who, Failure(who, _LATE.format(lacking))) for who, lacking in again.items())
        elif again:
            yield from self._carry(tuple(again), left)

    def _lacking(self, who: int, reply: bytes | Failure) -> str:
        """Return what a client says that it lacks of what its request referred to, and note it; empty: nothing."""
        sent = self._sent.get(who)
        if sent is None or not isinstance(reply, bytes):
            return ""
        found = next((w for w in sent.refers if is_lost(reply, sent.context, tensors=w == _TENSORS)), "")
        if found:
            self.up.update(part_sizes(reply))
            self.books.masks.note(who, None)
        if found == _TENSORS:
            self.books.bases[who] = ""
        return found

    def _carry(self, clients: tuple[int, ...], deadline: float | None) -> Iterator[tuple[int, bytes | Failure]]:
        for who, reply in self.engine.exchange(((k, self._request(k)) for k in clients), deadline):
            if not isinstance(reply, Failure):
                self.carried.setdefault(who, [0, 0])[1] += len(reply)
            if not isinstance(reply, Failure) or reply.sent:
                self.down.update(self._sent[who].parts)
                self.carried.setdefault(who, [0, 0])[0] += sum(self._sent[who].parts.values())
                self._answered[who] = False
            yield who, reply

    def _request(self, who: int) -> bytes:
        shared = self._outgoing
        outgoing, mask, name = (shared, self.ask.message.mask, self._name) if shared else self._slice(who)
        held = None if mask is None else self.books.masks.name(who, at_hand=name)
        base = self.books.named(who)
        carries = base is not None and len(base.carried) > 0
        # clients that hold the same mask are sent the very same bytes, which an engine need not carry twice
        written = self._written.get((held, carries)) if shared else None
        if written is None:
            known = None if held is None else mask if held == name else self.books.masks.mask(held)
            request = outgoing.bytes(known, base)
            refers = {_MASK: held is not None, _TENSORS: base is not None and not carries}
            named = frozenset(what for what, does in refers.items() if does)
            written = request, _Sent(context_of(request), part_sizes(request, checked=True), named)
            self._remember((held, carries), written)
        request, self._sent[who] = written
        return request

    def _remember(self, to: tuple[str | None, bool], written: tuple[bytes, _Sent]) -> None:
        """Keep the last encoded requests, within a budget of bytes."""
        if self._outgoing is not None:
            self._written[to] = written
            while len(self._written) > 1 and len(self._written) * len(written[0]) > _WRITTEN:
                self._written.popitem(last=False)

    def _check(self, who: int, reply: bytes | Failure) -> Reply | None:
        part = self._slices.pop(who, None)
        if part is not None and who in self._answered:
            self.books.masks.note(who, None)  # until its reply counts
        if isinstance(reply, Failure):
            self.left_out.append({"client": who, "reason": short(reply.reason)})
            return None
        try:
            known = self._expects.known if part is None else part.mask()
            message = decode(reply, replace(self._expects, known=known, context=self._sent[who].context))
            _sane(message.scalars, {**_COUNTED, **self.bounds})
            message = self._restore(message, self._bases.pop(who, self._base), known)
            counted = self._guarded(who, message)
            self._check_claims(who, message.scalars)
        except WireError as broken:
            self.up["refused"] += len(reply)
            self.left_out.append({"client": who, "reason": short(str(broken))})
            return None
        self.up.update(part_sizes(reply, checked=True))
        self._answered[who] = True
        self.books.confirm_base(who)
        if part is not None:
            self.macs[who] = self.macs_of(known)
            own = message.mask is not None and message.mask is not known
            self.books.masks.note(who, name_of(message.mask or {}) if own else part.name)
        self.reply_scalars.append({"client": who, **message.scalars})
        return counted

    def _check_claims(self, who: int, scalars: Mapping[str, Scalar]) -> None:
        """Hold a client to the rows that it has had since a reply of its first counted."""
        for name, kind in (_HELD_OUT if self.ask.phase == EVALUATE else _TRAINED).items():
            if name in scalars:
                self.books.claims.check(who, kind, int(scalars[name]))

    def _guarded(self, who: int, message: Message) -> Reply:
        """Return what the guards let the server count of a reply."""
        rows = int(message.scalars.get("samples", 0))
        reply = Reply(who, rows, message.tensors, message.mask, message.scalars)
        sent = Sent(self.setting, partial(self.ask.request, who))
        passage = Passage(self.ask.phase, self.ask.round, who, self.setting, self.study.wire)
        for guard in reversed(self.guards) if self.ask.phase != EVALUATE else ():
            reply = guard.arriving(reply, sent, passage)
            if not isinstance(reply, Reply):
                raise ConfigError(f"guard {type(guard).__name__}: arriving returned {reply!r}, and no reply")
        if reply.tensors is not message.tensors:
            _finite(reply.tensors)
        return reply

    def _restore(self, message: Message, base: Tensors, known: Masks | None) -> Message:
        """Return the weights that a reply to ``base`` stands for."""
        replies = self.study.wire.replies
        if not self._trains or replies == "weights":
            return message
        if replies == "topk":
            message = replace(message, mask=known if self.ask.expects.mask == "same" else None)
        return feedback.from_update(message, base)


def _finite(tensors: Tensors) -> None:
    """Refuse what guards made of a reply if it is not finite; decoding has refused the reply itself otherwise."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise WireError(f"tensor {name!r}: what the guards made of it holds NaN or infinity")


def _sane(scalars: Mapping[str, Scalar], bounds: Mapping[str, tuple[float, float]]) -> None:
    for name, value in scalars.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise WireError(f"scalar {name!r} is {value}; a finite number is expected")
        least, most = bounds.get(name, (-math.inf, math.inf))
        if not isinstance(value, str) and not least <= value <= most:
            raise WireError(f"scalar {name!r} is {value}; {least} to {most} is expected")
