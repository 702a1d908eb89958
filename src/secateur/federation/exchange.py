"""The exchange of one ask: requests are encoded, replies are checked and reduced, and carried bytes are counted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

from secateur.contract.ask import Ask
from secateur.contract.guard import Guard, medians
from secateur.contract.reducer import Reduced, Reducer
from secateur.contract.reply import Reply, Sent
from secateur.contract.spool import Spool
from secateur.contract.state import Setting, State
from secateur.contract.suspects import SUSPECTED
from secateur.engines import Engine, Failure, Gathered, Gathering, Relaying, Task
from secateur.errors import ConfigError, EngineError, NotFiniteError, WireError
from secateur.federation.attackers import Attackers, check_engine
from secateur.federation.books import Books
from secateur.federation.collusion import Collusion
from secateur.federation.held_masks import name_of
from secateur.federation.intake import Intake, Job
from secateur.federation.parcels import Account, Parcel, sampled_sizes
from secateur.federation.records import BLAMELESS, BOUNDED, MEDIANS, short
from secateur.federation.requests import TENSORS, Requests, Slice
from secateur.federation.shares import divided
from secateur.federation.waiting import Waiting
from secateur.study.study import Study
from secateur.wire.codec import is_lost, lost, part_sizes
from secateur.wire.message import Masks, Scalar

_LATE = "asked for {}, too late to send it within the deadline"


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
        blameless: those whose replies are not finite, where these are most: what they were sent is to blame.
        reply_scalars: the scalars of each accepted reply, in the order of the ask.
        rows: by how many rows each client counts whose reply was accepted.
        bounded: what guards cut accepted replies down to, by client.
        carried: the bytes carried down and up, by client.
        suspected: the clients that a robust rule left out of the result, each with the reason.
        sampled: how many replies were written, and their least and most bytes, where the others' are their mean.
        macs: the result of ``macs_of`` for the slice of each client whose reply was accepted.
        relayed: with relays, their number, the bytes between the server and them, how many sums and replies they sent.
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
    blameless: list[dict[str, Any]] = field(default_factory=list)
    reply_scalars: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[int, int] = field(default_factory=dict)
    bounded: dict[int, Mapping[str, float]] = field(default_factory=dict)
    carried: dict[int, list[int]] = field(default_factory=dict)
    macs: dict[int, tuple[int, int]] = field(default_factory=dict)
    relayed: Counter[str] = field(default_factory=Counter)
    sampled: dict[str, int] = field(default_factory=dict)
    suspected: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for guard in self.guards:
            guard.check(self.ask)
        self._read, self._answered = False, dict[int, bool]()
        self._attackers = Attackers.of(self.study, self.setting)
        check_engine(self._attackers, self.engine)
        relayed = isinstance(self.engine, Relaying)
        study, seen = self.study, self.books.medians
        job = Job.of(self.ask, study.wire, self.bounds, study.seed, guards=self.guards, medians=seen)
        self._job = replace(job, alone=relayed)
        self._facts, self._not_finite = dict[int, Mapping[str, float]](), set[int]()
        self._intake = Intake(self._job, self.study.wire, self.setting, self.guards)
        self._received: dict[int, Sent] = {}
        # what trains in a stack passes a relay as it is
        single = self._attackers.collude or (relayed and study.compute.stacks)
        gathers = isinstance(self.engine, Gathering) and not single
        self._gathers = cast("Gathering", self.engine) if gathers else None
        if self._job.written is not None and not gathers:
            raise ConfigError(
                f"wire.count = {self.study.wire.count}: only a simulation knows sizes of what is not written, and none "
                "that trains in stacks below relays, or whose attackers collude; set wire.count=encoded"
            )
        self._unwritten, self._sizes = list[Account](), list[Mapping[str, int]]()
        self._requests = Requests(self.ask, self.study, self.books, trains=self._job.trains, reads=not gathers)
        self._collusion = Collusion(self.ask, self._job, self.study, self._attackers, self._requests, self._carried)

    def replies(self) -> Iterator[tuple[int, Reply | None]]:
        """Yield each client with its checked reply, as replies arrive; None if it failed or was refused.

        Raises:
            EngineError: the replies were read before.
        """
        self._begin()
        for answered, (who, reply) in enumerate(self._collusion.answers(self._arrivals()), start=1):
            if isinstance(self.engine, Relaying) and not isinstance(reply, Failure):
                self.relayed["single"] += 1
            self.notify(answered, len(self.ask.clients))
            yield who, self._check(who, reply)
        self._settle()

    def _begin(self) -> None:
        """Note that the replies are read.

        Raises:
            EngineError: they were read before.
        """
        if self._read:
            raise EngineError(f"the replies to {self.ask.phase!r} were read already: they come once")
        self._read = True

    def _left(self, begun: float) -> float | None:
        """Return the seconds that are left of an exchange; None: there is no deadline."""
        return None if self.deadline is None else self.deadline - (time.monotonic() - begun)

    def _settle(self) -> None:
        """Put what was noted as answers came into the order of the ask; note who holds the mask that was sent."""
        place = {client: number for number, client in enumerate(self.ask.clients)}
        for rows in (self.reply_scalars, self.left_out):
            rows.sort(key=lambda row: place[row["client"]])
        answers = {who: self._answered[who] for who in self.ask.clients if who in self._answered}
        if len(self._not_finite) > max(1, len(self.reply_scalars)):
            self.blameless = [entry for entry in self.left_out if entry["client"] in self._not_finite]
            self.left_out = [entry for entry in self.left_out if entry["client"] not in self._not_finite]
        if self.ask.message.mask is not None:
            self.books.masks.confirm(answers, self.ask.message.mask)
        if isinstance(self.engine, Relaying):
            carried = self.engine.traffic()
            counts = {"sums": self.relayed["sums"], "single": self.relayed["single"]}
            self.relayed = Counter({"relays": self.engine.relays, "down": carried.down, "up": carried.up, **counts})

    def counted(self) -> dict[str, Any]:
        """Return, for a record, what is not there in every exchange: relays, samples, bounds, suspects, attackers."""
        bounded = [[who, dict(self.bounded[who])] for who in self.ask.clients if who in self.bounded]
        found: dict[str, Any] = {"sampled": dict(self.sampled), "relayed": dict(self.relayed)}
        found |= {BLAMELESS: self.blameless, BOUNDED: bounded, MEDIANS: self.compared(), SUSPECTED: self.suspected}
        return {n: counts for n, counts in found.items() if counts} | self._attackers.named(self.ask.clients)

    def compared(self) -> dict[str, float]:
        """Return the medians of what guards measured, for the next exchange."""
        return medians(self._facts[who] for who in self.ask.clients if who in self._facts)

    def reduce(self, state: State, spool: Spool) -> Reduced:
        """Return the reduced replies; ``spool`` stores those that must stay single."""
        reducer = Reducer(self.ask, state.setting, spool, self._sent_to)
        waiting = Waiting(spool) if self._job.medians is None else None
        into = waiting or reducer
        if self._gathers is not None:
            self._gather(self._gathers, into)
        else:
            for who, reply in self.replies():
                into.skip(who) if reply is None else into.add(reply)
        if waiting is not None:
            self._judge(waiting, reducer)
        reduced = reducer.finish(state)
        self.suspected = [{"client": who, "reason": short(why)} for who, why in reduced.suspected.items()]
        return reduced

    def _judge(self, waiting: Waiting, reducer: Reducer) -> None:
        """Let the guards compare the replies that waited, and reduce what they let count."""
        found = self.compared()
        for reply in waiting.replies(self.ask.clients):
            who, sent = reply.client, self._sent_to(reply.client)
            try:
                judged = self._intake.judged(reply, sent, found)
            except WireError as broken:
                self.left_out.append({"client": who, "reason": short(str(broken))})
                self.reply_scalars = [row for row in self.reply_scalars if row["client"] != who]
                self._facts.pop(who, None)
                reducer.skip(who)
                continue
            self._received[who] = sent
            self._measured(judged.client, judged.rows, judged.facts, judged.bounded)
            reducer.add(judged)

    def _measured(self, who: int, rows: int, facts: Mapping[str, float], bounded: Mapping[str, float]) -> None:
        """Note what guards made of a reply that counts."""
        self.rows[who], self._facts[who] = rows, facts
        if bounded:
            self.bounded[who] = bounded

    def _gather(self, engine: Gathering, reducer: Reducer | Waiting) -> None:
        """Have the engine reduce the replies, and take what it made of them."""
        self._begin()
        begun, done, asked = time.monotonic(), 0, len(self.ask.clients)
        again: list[int] = []
        for answer in engine.gather(self._tasks(engine), self._job, self.deadline):
            lacking = self._take(answer, reducer)
            again += lacking
            done += 1 if isinstance(answer, Failure) else len(answer.clients) - len(lacking)
            self.notify(done, asked)
        left = self._left(begun)
        if again and left is not None and left <= 0:
            for who in again:
                self._fail(Failure(who, _LATE.format("what its request referred to")))
        elif again:
            for answer in engine.gather(self._tasks(engine, frozenset(again)), self._job, left):
                for who in self._take(answer, reducer):
                    self._fail(Failure(who, "it lacks what it was sent"))
                    reducer.skip(who)
                done += 1
                self.notify(done, asked)
        self._fill_in()
        self._settle()

    def _tasks(self, engine: Gathering, again: frozenset[int] | None = None) -> Iterator[Task]:
        """Yield the requests as tasks; those to clients that are asked again, one by one unless a relay adds up."""
        stacks = self.study.compute.stacks  # a stack's bits depend on who is in it
        late = self.deadline is not None
        for first, count in divided(self.ask, self.study.compute, engine, sums=self._job.sums, late=late):
            members = self.ask.clients[first : first + count]
            if again is None or (again.issuperset(members) and isinstance(engine, Relaying)):
                yield Task(first, [(who, self._requests.to(who)) for who in members], whole=int(stacks))
                continue
            for place, who in enumerate(members, first):
                if who in again:
                    yield Task(place, [(who, self._requests.to(who))])

    def _take(self, answer: Gathered | Failure, reducer: Reducer | Waiting) -> list[int]:
        """Book what became of a task and add it to the others; return the clients that must be asked again."""
        if isinstance(answer, Failure):
            if answer.sent:
                self._carried(answer.client, down=True)
            self._part(answer.client)
            self._fail(answer)
            reducer.skip(answer.client)
            return []
        parcel = Parcel.read(answer.made)
        if parcel.broken:
            raise ConfigError(parcel.broken)
        for who, tensors in parcel.lacking.items():
            said = lost(b"", tensors=tensors)
            self._carried(who, down=True, up=len(said))
            self.up.update(part_sizes(said))
            self._lack(who, tensors=tensors)
        self._add(parcel, reducer)
        return list(parcel.again)

    def _add(self, parcel: Parcel, reducer: Reducer | Waiting) -> None:
        answers, single = {}, {account.client for account in parcel.accounts}
        for account in parcel.accounts:
            if self._book(account):
                answers[account.client] = account.rows, account.scalars
                self._measured(account.client, account.rows, account.facts, account.bounded)
        replies = {reply.client: reply for reply in parcel.replies}
        if isinstance(self.engine, Relaying):
            self.relayed.update(sums=len(parcel.sums), single=len(replies))
        for node, sums in parcel.sums:
            members = self.ask.clients[node.first : node.first + node.most]
            cast("Reducer", reducer).merge(node, sums, {who: answers[who] for who in members if who in answers})
            single.difference_update(members)
        for who in (account.client for account in parcel.accounts if account.client in single):
            if who in replies:
                reducer.add(replies[who])
            else:
                reducer.skip(who)

    def _book(self, account: Account) -> bool:
        """Note what a client's answer cost; return whether it counts."""
        who = account.client
        if account.sent:
            self._carried(who, down=True)
        part = self._part(who)
        if account.failed:
            self._fail(Failure(who, account.failed))
            return False
        if account.refused:
            self._carried(who, up=account.length)
            self.up["refused"] += account.length
            self._refuse(who, account.refused, finite=account.finite)
            return False
        if account.written or self.study.wire.count == "computed":
            self._carried(who, up=account.length)
            self._sizes.append(account.parts)
            self._count(who, account.parts, account.scalars, part, account.own)
        else:
            self._unwritten.append(account)
            self._count(who, {}, account.scalars, part, account.own)
        return True

    def _fill_in(self) -> None:
        """Take replies that were not written to be as large as those that were are on average."""
        if self.study.wire.count != "sampled":
            return
        mean, self.sampled = sampled_sizes(self._sizes, self._unwritten)
        for account in self._unwritten:
            self.up.update(mean)
            self._carried(account.client, up=sum(mean.values()))

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
        left = self._left(begun)
        if left is not None and left <= 0:
            yield from ((who, Failure(who, _LATE.format(lacking))) for who, lacking in again.items())
        elif again:
            yield from self._carry(tuple(again), left)

    def _lacking(self, who: int, reply: bytes | Failure) -> str:
        """Return what a client says that it lacks of what its request referred to, and note it; empty: nothing."""
        sent = self._requests.sent.get(who)
        if sent is None or not isinstance(reply, bytes):
            return ""
        found = next((w for w in sent.refers if is_lost(reply, sent.context, tensors=w == TENSORS)), "")
        if found:
            self.up.update(part_sizes(reply))
            self._lack(who, tensors=found == TENSORS)
        return found

    def _lack(self, who: int, *, tensors: bool) -> None:
        """Note that a client lacks the mask that it was thought to hold, or the tensors that were named."""
        self.books.masks.note(who, None)
        if tensors:
            self.books.bases[who] = ""

    def _carry(self, clients: tuple[int, ...], deadline: float | None) -> Iterator[tuple[int, bytes | Failure]]:
        for who, reply in self.engine.exchange(((k, self._requests.to(k)) for k in clients), deadline):
            if not isinstance(reply, Failure):
                self._carried(who, up=len(reply))
            if not isinstance(reply, Failure) or reply.sent:
                self._carried(who, down=True)
            yield who, reply

    def _carried(self, who: int, *, down: bool = False, up: int = 0) -> None:
        """Count bytes that were carried: a client's request, or some of its reply."""
        carried = self.carried.setdefault(who, [0, 0])
        carried[1] += up
        if down:
            self.down.update(self._requests.sent[who].parts)
            carried[0] += self._requests.sent[who].size
            self._answered[who] = False

    def _check(self, who: int, reply: bytes | Failure) -> Reply | None:
        part = self._part(who)
        if isinstance(reply, Failure):
            self._fail(reply)
            return None
        known = self.ask.expects.known if part is None else part.mask()
        base = self._requests.base_of(who)
        self._received[who] = sent = Sent(self.setting, partial(self._requests.read_by, who, base))
        context = self._requests.sent[who].context
        try:
            taken = self._intake.read(who, reply, sent, known=known, context=context, base=lambda: base)
            self.books.claims.check_all(who, self.ask.phase, taken.scalars)
        except WireError as broken:
            self.up["refused"] += len(reply)
            self._refuse(who, str(broken), finite=not isinstance(broken, NotFiniteError))
            return None
        self._measured(who, taken.rows, taken.facts, taken.bounded)
        if self._job.medians is None:  # what the client read would stay in memory for as long as the reply waits
            self._received.pop(who, None)
        own = part is not None and taken.mask is not None and taken.mask is not known
        self._count(who, part_sizes(reply, checked=True), taken.scalars, part, name_of(taken.mask or {}) if own else "")
        return taken

    def _part(self, who: int) -> Slice | None:
        """Return the part of the model that a client was sent, which it must not be thought to hold until it counts."""
        part = self._requests.slices.pop(who, None)
        if part is not None and who in self._answered:
            self.books.masks.note(who, None)
        return part

    def _refuse(self, who: int, why: str, *, finite: bool) -> None:
        self.left_out.append({"client": who, "reason": short(why)})
        if not finite:
            self._not_finite.add(who)

    def _fail(self, failure: Failure) -> None:
        self._refuse(failure.client, failure.reason, finite=True)

    def _count(
        self, who: int, parts: Mapping[str, int], scalars: Mapping[str, Scalar], part: Slice | None, own: str
    ) -> None:
        """Book a reply that counts."""
        self.up.update(parts)
        self._answered[who] = True
        self.books.confirm_base(who)
        if part is not None:
            self.macs[who] = self.macs_of(part.mask())
            self.books.masks.note(who, own or part.name)
        self.reply_scalars.append({"client": who, **scalars})

    def _sent_to(self, who: int) -> Sent:
        """Return a request as its client read it."""
        return self._received.pop(who, None) or Sent(self.setting, partial(self._requests.read_by, who, None))
