"""The local engine: worker processes on this machine, each with one resident model; nothing else to install."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing.context import BaseContext
from typing import cast

from secateur.engines import Closing, Failure, Gathered, Serve, Task, batches
from secateur.engines.pipes import BROKEN, RAISED, READY, Item, ready
from secateur.engines.script import needed
from secateur.engines.store import StateStore
from secateur.engines.workers import Worker, answers, gathered, processes
from secateur.errors import EngineError

_TRIES = 3
_GUARD = 'workers run it again, so what starts a run must stand under if __name__ == "__main__":'
_WINDOW = 4
_Answer = tuple[int, bytes | Failure] | Gathered


class LocalEngine(Closing):
    """Worker processes that serve clients' requests.

    Args:
        make_serve: picklable; called once in each worker, so that model and data stay resident there.
        clients: how many clients there are: 0..clients-1.
        workers: processes at most: no more are started than have something to do; 0 serves inside this process, for
            debugging.
        store: what clients keep between rounds; closed with the engine. None: a temporary one.
        preload: modules that are imported once, before workers are forked.
        together: clients that a worker serves at once; more than one needs a ``ServeTogether``. They are taken in the
            order of the requests, so who is served with whom does not depend on the workers.
        start: how workers are started; None: as this system does it best.
        leads: whether workers start processes of their own.

    Guarantees:
        A worker that dies is replaced and its task served again; a client whose task kills three workers, or
        raises, is a ``Failure`` of its own. No worker outlives this process, even when it is killed. At a deadline an
        exchange ends whatever its workers do, also one that was stopped in the middle of a message; without a deadline
        it waits for such a one, while the others go on.
    """

    def __init__(
        self, make_serve: Callable[[], Serve], *, clients: int, workers: int, store: StateStore | None = None,
        preload: Sequence[str] = (), together: int = 1, start: BaseContext | None = None, leads: bool = False,
    ) -> None:  # fmt: skip
        self._start, self._leads = start, leads
        self._gone = 0
        self._together = together
        self._make_serve = make_serve
        self._count = clients
        self._size = workers
        self.states = StateStore() if store is None else store
        self._preload = list(preload)
        self._workers: list[Worker] = []
        self._inline: Serve | None = None
        self.stillborn = 0

    def clients(self) -> Sequence[int]:
        """Return 0..clients-1."""
        return range(self._count)

    @property
    def workers(self) -> int:
        """Return how many clients can be served at the same time."""
        return max(1, self._size)

    @property
    def down(self) -> int:
        """Return the bytes of requests and jobs that workers were sent; what clients keep is not among them."""
        return self._gone + sum(worker.down for worker in self._workers)

    def pids(self) -> list[int]:
        """Return the process ids of the living workers."""
        return [w.process.pid for w in self._workers if w.process.pid is not None]

    def exchange(
        self, requests: Iterable[tuple[int, bytes]], deadline: float | None = None
    ) -> Iterator[tuple[int, bytes | Failure]]:
        """Serve each request; see ``Engine.exchange``.

        Requests start in order, and never more than four for each worker ahead of the oldest unanswered one
        (``together`` times as many), so that a receiver who restores the order holds few replies.

        Raises:
            EngineError: an unknown client, or workers that cannot start.
        """
        tasks = batches(self._checked(requests), self._together)
        yield from cast("Iterator[tuple[int, bytes | Failure]]", self._play(tasks, None, deadline))

    def gather(
        self, tasks: Iterable[Task], job: object, deadline: float | None = None
    ) -> Generator[Gathered | Failure]:
        """Have workers serve requests and reduce the replies; see ``Gathering.gather``.

        Raises:
            EngineError: an unknown client, or workers that cannot start.
        """
        for answer in self._play(map(self._known, tasks), job, deadline):
            if isinstance(answer, Gathered):
                yield answer
            elif isinstance(answer[1], Failure):
                yield answer[1]

    def _play(self, tasks: Iterable[Task], job: object, deadline: float | None) -> Iterator[_Answer]:
        if self._size == 0:
            yield from self._serve_inline(tasks, job, deadline)
            return
        exchange = _Exchange(self, iter(tasks), job, deadline)
        try:
            yield from exchange.run()
        finally:
            for worker in self._workers:
                if worker.task is not None:
                    self._replace(worker)

    def close(self) -> None:
        """Stop the workers."""
        for worker in self._workers:
            self._gone += worker.down
            worker.stop()
        self._workers.clear()
        self.states.close()

    def _known(self, task: Task) -> Task:
        return Task(task.first, tuple(self._checked(task.requests)), task.whole)

    def _checked(self, requests: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        for client, request in requests:
            if not 0 <= client < self._count:
                raise EngineError(f"client {client} is unknown: there are 0..{self._count - 1}")
            yield client, request

    def _serve_inline(self, tasks: Iterable[Task], job: object, deadline: float | None) -> Iterator[_Answer]:
        end = None if deadline is None else time.monotonic() + deadline
        if self._inline is None:
            self._inline = self._make_serve()
        for task in tasks:
            if end is not None and time.monotonic() >= end:
                for client, _ in task.requests:
                    yield client, Failure(client, f"no reply within {deadline:g} s", sent=False)
                continue
            asked = [(client, request, self.states.get(client)) for client, request in task.requests]
            if job is None:
                yield from self.accept(answers(self._inline, asked))
                continue
            items, made = gathered(self._inline, job, task.first, asked)
            yield from self.accept_made(task, items[:-1] if made else items, [memoryview(part) for part in made])

    def accept(self, items: Iterable[Item]) -> Iterator[_Answer]:
        """Keep each client's new state and yield its reply."""
        for kind, client, reply, state in items:
            if state is not None:
                self.states.put(client, state)
            yield client, Failure(client, (reply or b"").decode()) if kind == RAISED else reply or b""

    def accept_made(self, task: Task, items: Iterable[Item], made: Sequence[memoryview]) -> Iterator[_Answer]:
        """Keep the new states of a task's clients and yield what was made of their replies."""
        accepted = list(self.accept(items))
        if made:
            yield Gathered(task.first, tuple(client for client, _ in task.requests), made)
        else:
            yield from accepted

    def staffed(self) -> list[Worker]:
        """Return the workers that were started."""
        return self._workers

    def hire(self) -> Worker:
        """Start one more worker."""
        self._workers.append(self._hired())
        return self._workers[-1]

    def _hired(self) -> Worker:
        return Worker(self._start or processes(self._preload), self._make_serve, self._workers, leads=self._leads)

    def _replace(self, worker: Worker) -> None:
        place = self._workers.index(worker)
        self._gone += worker.down
        worker.stop()
        del self._workers[place]
        self._workers.insert(place, self._hired())

    def replace_dead(self, worker: Worker) -> None:
        """Start a new worker in the place of a dead one.

        Raises:
            EngineError: three in a row died before they were ready.
        """
        self.stillborn += not worker.ready
        if self.stillborn >= _TRIES:
            again = f"; this script names code of its own: {_GUARD}" if needed(self._make_serve) else ""
            raise EngineError(
                f"{_TRIES} worker processes ended before they could serve{again}; workers=0 (--workers 0) shows why"
            )
        self._replace(worker)


class _Exchange:
    """One exchange over the workers: dispatch in order, retry after a death, stop at the deadline."""

    def __init__(self, engine: LocalEngine, tasks: Iterator[Task], job: object, deadline: float | None) -> None:
        self.engine = engine
        self.tasks = enumerate(tasks)
        self.job = job
        self.deadline = deadline
        self.end: float | None = None  # no deadline, or not begun yet
        self.hand = deque[tuple[int, Task]]()  # tasks that wait for a free worker
        self.again = deque[tuple[int, Task]]()  # and those whose worker died
        self.deaths: dict[tuple[int, ...], int] = {}
        self.open: dict[int, int] = {}  # the parts of each task that are not finished, by its number
        self.numbers: dict[Worker, int] = {}
        self.next = 0
        self.exhausted = False

    def run(self) -> Iterator[_Answer]:
        self._staff()  # to start the first process may take many seconds, which are no client's
        self.end = None if self.deadline is None else time.monotonic() + self.deadline
        while True:
            self._staff()
            if not self.open and self.exhausted:
                return
            left = None if self.end is None else self.end - time.monotonic()
            if left is not None and left <= 0:
                yield from self._late()
                return
            for worker in ready(self.engine.staffed(), left):
                yield from self._hear(worker)

    def _staff(self) -> None:
        """Give tasks to free workers, and start workers as long as more tasks wait than workers are free."""
        for worker in self.engine.staffed():
            self._give(worker)
        coming = sum(worker.task is None for worker in self.engine.staffed())  # they are not ready yet
        places = self.engine.workers - len(self.engine.staffed())
        while len(self.hand) + len(self.again) < coming + places and (taken := self._take()):
            self.hand.append(taken)
        for _ in range(min(places, len(self.hand) + len(self.again) - coming)):
            self.engine.hire()

    def _give(self, worker: Worker) -> None:
        if worker.task is not None or not worker.ready:
            return
        waiting = self.again or self.hand
        taken = waiting.popleft() if waiting else self._take()
        if taken is not None:
            self.numbers[worker] = taken[0]
            worker.give(taken[1], self.engine.states, self.job)

    def _take(self) -> tuple[int, Task] | None:
        if self.exhausted or (self.open and self.next - min(self.open) >= _WINDOW * self.engine.workers):
            return None
        taken = next(self.tasks, None)
        if taken is None:
            self.exhausted = True
            return None
        self.next = taken[0] + 1
        self.open[taken[0]] = 1
        return taken

    def _hear(self, worker: Worker) -> Iterator[_Answer]:
        lives = worker.process.is_alive()  # asked first: what it sent before it died still counts
        try:
            heard = worker.hear()
        except (EOFError, OSError):
            heard = [], []
        if heard is None and lives:
            return  # there is more to come
        items, made = heard or ([], [])
        if not items:
            yield from self._died(worker)
            return
        if items[0][0] == BROKEN:
            raise EngineError(f"a worker cannot serve: {(items[0][2] or b'').decode()}")
        if items[0][0] == READY:
            worker.ready = True
            self.engine.stillborn = 0
            return
        task, worker.task = worker.task, None
        if task is not None:
            self._close(self.numbers.pop(worker))
            accept = self.engine.accept(items) if self.job is None else self.engine.accept_made(task, items, made)
            accepted = list(accept)
            # the next task first: the worker computes while the receiver handles these answers
            if self.end is None or time.monotonic() < self.end:
                self._give(worker)
            yield from accepted

    def _close(self, number: int) -> None:
        self.open[number] -= 1
        if not self.open[number]:
            del self.open[number]

    def _died(self, worker: Worker) -> Iterator[_Answer]:
        task = worker.task
        self.engine.replace_dead(worker)
        if task is None:
            return
        number, clients = self.numbers.pop(worker), tuple(client for client, _ in task.requests)
        self.deaths[clients] = self.deaths.get(clients, 0) + 1
        if self.job is not None and len(clients) > 1 and self.deaths[clients] > task.whole:
            # one of them kills it, perhaps: each by itself now
            self.open[number] += len(clients) - 1
            self.again += [(number, Task(task.first + k, (one,))) for k, one in enumerate(task.requests)]
            return
        if self.deaths[clients] < _TRIES:
            self.again.append((number, task))
            return
        self._close(number)
        for client in clients:
            yield client, Failure(client, f"its worker process died {_TRIES} times (out of memory, or killed)")

    def _late(self) -> Iterator[_Answer]:
        busy = [w.task for w in self.engine.staffed() if w.task is not None]
        reason = f"no reply within {self.deadline:g} s"
        for task in [*busy, *(task for _, task in self.again)]:
            yield from ((client, Failure(client, reason)) for client, _ in task.requests)
        for _, task in (*self.hand, *self.tasks):
            yield from ((client, Failure(client, reason, sent=False)) for client, _ in task.requests)
