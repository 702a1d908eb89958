"""The relay engine: processes between the server and the workers, each of which serves its share of a cohort."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from secateur.engines import Closing, Failure, Gathered, ServeGathering, Task, Traffic, batches
from secateur.engines.local import LocalEngine
from secateur.engines.pipes import Buffer
from secateur.engines.store import StateStore

_AGAIN = 1
_NEVER_SPLIT = 2**31
_MARGIN, _MOST_MARGIN = 0.1, 1.0


@dataclass(frozen=True)
class Errand:
    """What a relay is asked to do with requests.

    Attributes:
        job: what its workers are given; see ``Gathering.gather``. None: the replies come back as they are.
        until: when it must have answered, on ``time.monotonic``'s clock, which all processes of a machine share; None:
            it has as long as it takes.
    """

    job: object
    until: float | None

    @property
    def left(self) -> float | None:
        """Return the seconds that are left; None: there is no limit."""
        return None if self.until is None else max(0.0, self.until - time.monotonic())


def packed(answers: Iterable[tuple[int, bytes | Failure]]) -> list[Buffer]:
    """Return answers as buffers, whose first one describes the others."""
    said, replies = list[list[object]](), list[Buffer]()
    for client, answer in answers:
        said.append([client, answer.reason, answer.sent] if isinstance(answer, Failure) else [client])
        replies.append(b"" if isinstance(answer, Failure) else answer)
    return [json.dumps(said).encode(), *replies]


def unpacked(buffers: Sequence[memoryview]) -> Iterator[tuple[int, bytes | Failure]]:
    """Yield the answers that were packed."""
    for (client, *failed), reply in zip(json.loads(bytes(buffers[0])), buffers[1:], strict=True):
        yield client, Failure(client, *failed) if failed else bytes(reply)


class RelayEngine(Closing):
    """Relays on this machine; see ``LocalEngine``, whose guarantees hold for relays as for workers.

    A relay that dies is replaced, and what it was asked is asked again of whichever relay is free. One that has not
    answered by the deadline is replaced too, and its clients are each a ``Failure``.

    Args:
        make_relay: picklable; called once in each relay.
        clients: how many clients there are: 0..clients-1.
        relays: processes.
        workers: the workers of each relay; 0: it serves by itself.
        store: what clients keep between rounds, which relays are handed with the requests.
        preload: modules that are imported once, before relays are forked.
        together: clients that a worker serves at once where replies come back as they are.
    """

    def __init__(
        self, make_relay: Callable[[], ServeGathering], *, clients: int, relays: int, workers: int, store: StateStore,
        preload: Sequence[str] = (), together: int = 1,
    ) -> None:  # fmt: skip
        self._relays, self._workers = relays, max(1, workers)
        self._width = self._workers * together
        self._local = LocalEngine(make_relay, clients=clients, workers=relays, store=store, preload=preload, leads=True)
        self.states = store
        self._up = 0
        self._told = Traffic(0, 0)

    def clients(self) -> Sequence[int]:
        """Return 0..clients-1."""
        return self._local.clients()

    @property
    def workers(self) -> int:
        """Return how many clients can be served at the same time."""
        return self._relays * self._workers

    @property
    def relays(self) -> int:
        """Return how many relays there are."""
        return self._relays

    def pids(self) -> list[int]:
        """Return the process ids of the living relays."""
        return self._local.pids()

    def traffic(self) -> Traffic:
        """Return the bytes between the server and the relays since this was last asked."""
        now, before = Traffic(self._local.down, self._up), self._told
        self._told = now
        return Traffic(now.down - before.down, now.up - before.up)

    def gather(self, tasks: Iterable[Task], job: object, deadline: float | None = None) -> Iterator[Gathered | Failure]:
        """Have relays serve requests and add up the replies; see ``Gathering.gather``."""
        shares = (replace(task, whole=_AGAIN) for task in tasks)
        for answer in self._local.gather(shares, self._errand(job, deadline), deadline):
            if isinstance(answer, Gathered):
                self._up += sum(map(len, answer.made))
            yield answer

    def exchange(
        self, requests: Iterable[tuple[int, bytes]], deadline: float | None = None
    ) -> Iterator[tuple[int, bytes | Failure]]:
        """Have relays serve requests and hand on the replies as they are; see ``Engine.exchange``."""
        # who is served together follows from the order of the requests, also after a death
        errand, tasks = self._errand(None, deadline), batches(requests, self._width, _NEVER_SPLIT)
        for answer in self._local.gather(tasks, errand, deadline):
            if isinstance(answer, Failure):
                yield answer.client, answer
                continue
            self._up += sum(map(len, answer.made))
            yield from unpacked(answer.made)

    def close(self) -> None:
        """Stop the relays, and with them their workers."""
        self._local.close()

    @staticmethod
    def _errand(job: object, deadline: float | None) -> Errand:
        """Return what a relay must do, and by when: a little before the deadline, so that its answer counts."""
        if deadline is None:
            return Errand(job, None)
        return Errand(job, time.monotonic() + deadline - min(_MOST_MARGIN, _MARGIN * deadline))
