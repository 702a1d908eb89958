"""Relays: each asks its share of a cohort's clients, adds up their replies and hands on one message.

What becomes of replies is a sum in a fixed tree (``contract.fold``), so a relay can add up the nodes of its share, and
the server the relays' sums, without changing a bit. What is not a sum passes a relay as it is.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch

from secateur.contract.fold import ARITY, Node, nodes
from secateur.contract.reducer import Folding, Sums
from secateur.contract.reply import Reply, Sent
from secateur.contract.spool import Spool
from secateur.engines import Failure, Serve, Task
from secateur.engines.local import LocalEngine
from secateur.engines.pipes import Buffer
from secateur.engines.relays import Errand, packed
from secateur.engines.store import StateStore
from secateur.engines.workers import CLIENT
from secateur.errors import EngineError, SecateurError
from secateur.federation.intake import Job
from secateur.federation.parcels import Account, Parcel
from secateur.federation.shares import pieces

Asked = tuple[int, bytes, bytes | None]
_NOWHERE = Spool()


class Relay:
    """Has the requests of a share served by workers of its own, and adds up what they made of the replies.

    Args:
        make_serve: picklable; makes what a worker serves clients with.
        clients: how many clients there are: 0..clients-1.
        workers: processes; 0 serves inside this process.
        together: clients that a worker serves at once where replies are handed on as they are.
    """

    def __init__(self, make_serve: Callable[[], Serve], clients: int, workers: int, together: int) -> None:
        forks = "fork" in multiprocessing.get_all_start_methods()
        # this process was forked from a clean one itself, and has what workers import
        start = multiprocessing.get_context("fork") if forks else None
        # what clients keep is held for the time of a share: the folder is never made
        self._states = StateStore(Path(tempfile.gettempdir()) / "secateur-relay", sys.maxsize)
        self._engine = LocalEngine(
            make_serve, clients=clients, workers=workers, store=self._states, preload=CLIENT, together=together,
            start=start,
        )  # fmt: skip

    def __call__(self, client: int, request: bytes, state: bytes | None) -> tuple[bytes, bytes | None]:
        """Have one client served; see ``Serve``.

        Raises:
            EngineError: it does not answer.
        """
        self._hold([(client, request, state)])
        ((_, reply),) = self._engine.exchange([(client, request)])
        if isinstance(reply, Failure):
            raise EngineError(reply.reason)
        return reply, self._states.get(client)

    def gather(self, errand: Errand, first: int, asked: Sequence[Asked]) -> tuple[list[Buffer], list[bytes | None]]:
        """Have the clients of a share served, and reduce their replies; return a parcel, and the new states.

        Args:
            errand: what to do; without a job the replies are handed on as they are, see ``engines.relays.packed``.
            first: the place of the first client in the ask.
            asked: each client, its request, and what it keeps.

        Raises:
            EngineError: its workers cannot serve.
        """
        self._hold(asked)
        requests = [(client, request) for client, request, _ in asked]
        made = list[Buffer]()
        try:
            if errand.job is None:
                made += packed(self._engine.exchange(requests, errand.left))
            else:
                made += self._gathered(errand, first, requests).write(thin=True)
        except SecateurError as broken:  # of its workers: nothing that a client does raises here
            raise EngineError(str(broken)) from broken
        return made, [self._states.get(client) for client, _, _ in asked]

    def leave(self, *_signal: object) -> None:
        """End this process, after its workers; as a handler of signals."""
        for pid in self._engine.pids():
            os.kill(pid, signal.SIGKILL)
        os._exit(1)

    def _hold(self, asked: Sequence[Asked]) -> None:
        """Forget what clients of earlier shares keep, and note what these do."""
        self._states.restore({})
        for client, _, state in asked:
            if state is not None:
                self._states.put(client, state)

    def _gathered(self, errand: Errand, first: int, requests: Sequence[tuple[int, bytes]]) -> Parcel:
        """Return one parcel of all that workers made.

        If some of the clients lack what their requests refer to, all must be asked again.
        """
        job = cast("Job", errand.job)
        share = _Share(job, first, [client for client, _ in requests])
        # who is late must not cost others their place
        single = not job.sums or errand.left is not None
        divided = pieces(first, len(requests), self._engine.workers, single=single)
        tasks = (Task(place, requests[place - first : place - first + count]) for place, count in divided)
        with contextlib.closing(self._engine.gather(tasks, job, errand.left)) as answers:
            for answer in answers:
                if isinstance(answer, Failure):
                    share.fail(answer)
                    continue
                parcel = Parcel.read(answer.made)
                if parcel.broken:
                    return Parcel(broken=parcel.broken)
                if parcel.again:
                    self._hold([])
                    return Parcel(lacking=parcel.lacking, again=share.clients)
                share.add(parcel)
        return share.parcel()


class _Share:
    """What workers made of a relay's share: sums by node, or single replies, and what is said of each client."""

    def __init__(self, job: Job, first: int, clients: Sequence[int]) -> None:
        self.clients = clients
        self._places = {client: first + k for k, client in enumerate(clients)}
        self._accounts = dict[int, Account]()
        self._replies = list[Reply]()
        self._whole = dict[int, Sums | None]()
        self._sums = job.sums
        self._tops = list(nodes(first, len(clients), job.total)) if job.sums else []
        sizes = [min(top.most, job.total - top.first) for top in self._tops]
        self._foldings = [Folding(job.reduce, size, _NOWHERE, _unread) for size in sizes]

    def add(self, parcel: Parcel) -> None:
        """Add what was made of a task."""
        self._accounts |= {account.client: account for account in parcel.accounts}
        self._replies += [reply.own() for reply in parcel.replies]
        for node, sums in parcel.sums:
            self._put(node, sums)

    def fail(self, failure: Failure) -> None:
        """Note a client that did not answer."""
        who = failure.client
        self._accounts[who] = Account(who, failed=failure.reason, sent=failure.sent)
        if self._sums:
            self._put(Node(0, self._places[who]), None)

    def _put(self, node: Node, sums: Sums | None) -> None:
        number = bisect_right([top.first for top in self._tops], node.first) - 1
        top = self._tops[number]
        if node == top:
            self._whole[number] = None if sums is None else sums.own()
            return
        # a node is numbered among those under its top
        under = node.index - top.index * ARITY ** (top.level - node.level)
        self._foldings[number].put(Node(node.level, under), sums)

    def parcel(self) -> Parcel:
        """Return all of it."""
        accounts = [self._accounts[who] for who in self.clients if who in self._accounts]
        sums = [
            (top, self._whole[number] if number in self._whole else self._foldings[number].sums())
            for number, top in enumerate(self._tops)
        ]
        return Parcel(accounts, sums, self._replies)


def _unread(client: int) -> Sent:
    raise EngineError(f"client {client}: a relay reads no request")


def build(make_serve: Callable[[], Serve], clients: int, workers: int, together: int) -> Relay:
    """Return what a relay process serves with; see ``Relay``.

    It ends its workers when it is asked to end.
    """
    torch.set_num_threads(1)
    relay = Relay(make_serve, clients, workers, together)
    signal.signal(signal.SIGTERM, relay.leave)
    return relay
