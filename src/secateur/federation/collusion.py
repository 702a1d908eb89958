"""Collusion: what attackers send who need the replies of all others, which is made once these are at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from secateur.contract.ask import EVALUATE, Ask
from secateur.contract.attack import Cohort
from secateur.contract.reply import Sent
from secateur.engines import Failure
from secateur.errors import WireError
from secateur.federation.attackers import Attackers
from secateur.federation.client import Sending
from secateur.federation.feedback import WireMemory
from secateur.federation.intake import Intake, Job
from secateur.federation.requests import Requests
from secateur.streams import derive
from secateur.study.study import Study
from secateur.wire.message import Message

Arrival = tuple[int, bytes | Failure]


@dataclass(frozen=True)
class Collusion:
    """The attackers of one exchange, who read what all others send.

    Attributes:
        ask: the ask.
        job: what becomes of the replies.
        study: the study.
        attackers: the hostile clients.
        requests: what clients were sent.
        recount: called with a client and, as ``up``, the bytes by which its reply is longer than the honest one that
            was carried.
    """

    ask: Ask
    job: Job
    study: Study
    attackers: Attackers
    requests: Requests
    recount: Callable[..., None]

    def answers(self, arrivals: Iterable[Arrival]) -> Iterator[Arrival]:
        """Yield each answer: honest ones as they come and as they are, then those of attackers.

        A reply that cannot be read is seen by nobody, and yielded as it is.
        """
        if not self.attackers.collude or self.ask.phase == EVALUATE:
            yield from arrivals
            return
        honest, own = dict[int, Message](), dict[int, tuple[bytes, Sent, Message]]()
        for who, reply in arrivals:
            read = None if isinstance(reply, Failure) else self._read(who, reply)
            if read is None or isinstance(reply, Failure):
                yield who, reply
            elif who in self.attackers.who:
                own[who] = reply, *read
            else:
                honest[who] = read[1]
                yield who, reply
        inside = [(who, own[who]) for who in sorted(own)]
        cohort = Cohort([honest[who] for who in sorted(honest)], [message for _, (_, _, message) in inside])
        for who, (reply, sent, message) in inside:
            yield who, self._crafted(who, reply, sent, message, cohort)

    def _read(self, who: int, reply: bytes) -> tuple[Sent, Message] | None:
        """Return a client's request and its reply; None: the reply is refused."""
        part = self.requests.slices.get(who)
        known = self.ask.expects.known if part is None else part.mask()
        sent = Sent(self.attackers.setting, partial(self.requests.read_by, who, None))
        intake = Intake(self.job, self.study.wire, self.attackers.setting, ())
        context = self.requests.sent[who].context
        try:
            found = intake.read(who, reply, sent, known=known, context=context, base=lambda: sent.tensors)
        except WireError:
            return None
        return sent, Message(found.tensors, found.mask, found.scalars)

    def _crafted(self, who: int, reply: bytes, sent: Sent, message: Message, cohort: Cohort) -> bytes | Failure:
        """Return an attacker's payload."""
        request = Message(sent.tensors, sent.mask, self.ask.message.scalars)
        false = self.attackers.crafted(self.ask, who, request, message, cohort)
        seed = derive(self.study.seed, "wire", self.ask.phase, self.ask.round, who)
        context = self.requests.sent[who].context
        sending = Sending(
            self.study.wire, request, false, WireMemory(), context, seed, trains=self.job.trains, writes=True
        )
        try:
            payload = sending.encode({})[0].bytes()
        except WireError as broken:
            return Failure(who, str(broken))
        self.recount(who, up=len(payload) - len(reply))
        return payload
