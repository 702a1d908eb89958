"""Gathering: clients are served in a worker, and their replies are reduced there."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from secateur.contract.fold import Node, nodes
from secateur.contract.reducer import Folding, Sums
from secateur.contract.reply import Reply, Sent
from secateur.contract.spool import Spool
from secateur.data.shards import open_shards
from secateur.engines.pipes import one_line
from secateur.errors import ConfigError, WireError
from secateur.federation.base import KeptInFolder
from secateur.federation.claims import Claims, unknown
from secateur.federation.client import Answer, LackingError, Participant
from secateur.federation.held_masks import name_of
from secateur.federation.intake import SECONDS, Intake, Job
from secateur.federation.parcels import Account, Parcel
from secateur.study.study import Study
from secateur.wire.head import context_of

Asked = tuple[int, bytes, bytes | None]
_NOWHERE = Spool()


class Gatherer:
    """Serves any client of a study, and reduces the replies of several; each worker has one.

    Args:
        participant: serves single clients.
    """

    def __init__(self, participant: Participant) -> None:
        self.participant = participant
        shards = participant.shards
        self._claims = Claims(unknown if shards.empty else shards.count)
        self._guards = participant.study.build_guards()

    def __call__(self, client: int, request: bytes, state: bytes | None) -> tuple[bytes, bytes | None]:
        """Serve one client; see ``Participant``."""
        return self.participant(client, request, state)

    def together(self, asked: Sequence[Asked]) -> Sequence[tuple[bytes, bytes | None] | Exception]:
        """Serve several clients, which train together; see ``Participant``."""
        return self.participant.together(asked)

    def gather(
        self, job: Job, first: int, asked: Sequence[Asked]
    ) -> tuple[list[bytes | memoryview], list[bytes | None]]:
        """Serve neighbours in an ask and reduce their replies; return a parcel, and the clients' new states.

        What a client would send is written and counted and, where it is lossy, read back. If some of the clients lack
        what their requests refer to, nobody is served.

        Args:
            job: what becomes of the replies.
            first: the place of the first client in the ask.
            asked: each client, its request, and what it keeps.
        """
        try:
            return self._gathered(job, first, asked)
        except LackingError:
            lacking = {client: self.participant.lacks(client, request, state) for client, request, state in asked}
            found = {client: lacks for client, lacks in lacking.items() if lacks is not None}
            again = [client for client, _, _ in asked]
            return Parcel(lacking=found, again=again).write(), [None] * len(asked)
        except ConfigError as broken:
            return Parcel(broken=str(broken)).write(), [None] * len(asked)
        finally:
            gc.collect(1)  # answers stand in cycles, each with a model's tensors, which Python would collect much later

    def _gathered(
        self, job: Job, first: int, asked: Sequence[Asked]
    ) -> tuple[list[bytes | memoryview], list[bytes | None]]:
        intake = Intake(job, self.participant.study.wire, self.participant.setting, self._guards)
        accounts, states = list[Account](), list[bytes | None]()
        answered = iter(zip(asked, self._answers(intake.job, asked), strict=True))
        if not job.sums or (len(asked) == 1 and not job.alone):
            replies = list[Reply]()
            for one, done in answered:
                account, reply, _, state = self._served(intake, one, done)
                accounts.append(account)
                states.append(state)
                replies += [reply] if reply else []
            return Parcel(accounts, replies=replies).write(), states
        sums = list[tuple[Node, Sums | None]]()
        for node in nodes(first, len(asked), job.total):
            received = dict[int, Sent]()
            count = min(node.most, job.total - node.first)
            folding = Folding(job.reduce, count, _NOWHERE, received.__getitem__)
            for place, (one, done) in enumerate(itertools.islice(answered, count)):
                account, reply, received[one[0]], state = self._served(intake, one, done)
                accounts.append(account)
                states.append(state)
                folding.put(Node(0, place), reply)
            sums.append((node, folding.sums()))
        return Parcel(accounts, sums).write(), states

    def _answers(self, job: Job, asked: Sequence[Asked]) -> Iterator[Answer | Exception]:
        """Yield each client's answer, or what its code raised; in stacks, all are served before the first comes.

        Raises:
            LackingError: a client lacks what its request refers to.
        """
        writes = {client: job.written is None or client in job.written for client, _, _ in asked}
        if self.participant.study.compute.stacks:
            tasks = [partial(self.participant.answer, *one, writes=writes[one[0]]) for one in asked]
            yield from self.participant.batched.answers(tasks)
            return
        for one in asked:
            alone = self.participant.alone
            try:
                yield self.participant.answer(*one, alone, time.perf_counter, writes=writes[one[0]])
            except Exception as error:  # noqa: BLE001 -- what a client's code raises costs that client its place only
                yield error

    def _served(
        self, intake: Intake, one: Asked, done: Answer | Exception
    ) -> tuple[Account, Reply | None, Sent, bytes | None]:
        """Return the account of a client that was served, its reply if it counts, its request, and its new state."""
        client, request, _ = one
        if isinstance(done, LackingError):
            raise done
        if isinstance(done, Exception):
            return Account(client, failed=one_line(done).decode()), None, _sent(self.participant, None), None
        sent, written = _sent(self.participant, done), done.written
        try:
            reply = self._taken(intake, client, done, sent, context_of(request))
        except WireError as broken:
            return Account.refusing(client, len(written), written.sizes, broken), None, sent, done.state
        own = "" if reply.mask is None or reply.mask is done.received.mask else name_of(reply.mask)
        account = Account(
            client, len(written), written.sizes, {**reply.scalars, SECONDS: done.seconds}, own=own,
            written=bool(written.buffers), rows=reply.rows, facts=reply.facts, bounded=reply.bounded,
        )  # fmt: skip
        return account, reply, sent, done.state

    def _taken(self, intake: Intake, client: int, done: Answer, sent: Sent, context: int) -> Reply:
        """Return the reply that counts.

        Raises:
            WireError: it is refused.
        """
        received = done.received
        reply = intake.read(
            client, done.written, sent, known=received.mask, context=context, base=lambda: received.tensors
        )
        self._claims.check_all(client, intake.job.phase, reply.scalars)
        return reply


def _sent(participant: Participant, done: Answer | None) -> Sent:
    """Return a request as its client read it; None: it read none."""
    return Sent(participant.setting, lambda: (done.received.tensors, done.received.mask) if done else ({}, None))


def build(study: str, folder: str, kept: str = "") -> Gatherer:
    """Return what a worker process serves clients with.

    Args:
        study: its JSON.
        folder: of its shards.
        kept: a folder that all workers share, for frozen and constant tensors that come; empty: none are taken.

    One torch thread: the split of a reduction over threads would change its last bits.
    """
    torch.set_num_threads(1)
    shared = KeptInFolder(Path(kept), own=False) if kept else None
    return Gatherer(Participant(Study.model_validate_json(study), open_shards(Path(folder)), shared, hostile=True))
