"""The local engine: worker processes on this machine, each with one resident model; nothing else to install."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Self, cast

from secateur.engines import Failure, Serve, ServeTogether
from secateur.engines.script import needed, spared
from secateur.engines.store import StateStore
from secateur.errors import EngineError

CLIENT = ("secateur.federation.client",)
"""What workers that serve clients import."""
_TRIES = 3
_GUARD = 'workers run it again, so what starts a run must stand under if __name__ == "__main__":'
_WINDOW = 4
_THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
_READY, _OK, _RAISED, _BROKEN = range(4)
_ITEM = struct.Struct("<Bq??")
_Asked = tuple[int, bytes, bytes | None]
_Said = tuple[int, int, bytes | None, bytes | None]
_Task = tuple[int, Sequence[tuple[int, bytes]]]


def _send(pipe: Connection, said: Sequence[_Said]) -> None:
    """Send (kind, client, text, state) for each client; texts and states as they are, without a copy."""
    items = [_ITEM.pack(kind, who, text is not None, state is not None) for kind, who, text, state in said]
    pipe.send_bytes(b"".join(items))
    for _, _, *parts in said:
        for part in parts:
            if part is not None:
                pipe.send_bytes(part)


def _receive(pipe: Connection) -> list[_Said]:
    return [
        (kind, who, pipe.recv_bytes() if text else None, pipe.recv_bytes() if state else None)
        for kind, who, text, state in _ITEM.iter_unpack(pipe.recv_bytes())
    ]


def _one_line(error: BaseException) -> bytes:
    # a text may hold what UTF-8 cannot (lone surrogates of a file name): it must not cost the worker
    return f"{type(error).__name__}: {' '.join(str(error).split())}".encode(errors="backslashreplace")


def _batched(requests: Iterable[tuple[int, bytes]], size: int) -> Iterator[Sequence[tuple[int, bytes]]]:
    remaining = iter(requests)
    while group := list(itertools.islice(remaining, size)):
        yield group


@contextlib.contextmanager
def for_workers() -> Iterator[None]:
    """Let processes started inside the block compute in one thread, and keep the memory that they free.

    The number of workers is set to the number of cores, so more threads would only fight for them. A training step
    frees and asks for a gradient's memory again: where glibc gives it back to the system each time, the system clears
    it each time, for up to a fifth of a round. What the user has set of glibc's settings stays. This process's
    environment is put back.
    """
    wanted = {**_THREADS, **{name: os.environ.get(name, value) for name, value in _MEMORY.items()}}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def processes(preload: Sequence[str] = CLIENT) -> multiprocessing.context.BaseContext:
    """Return how processes are started: forked from one that has imported ``preload``, where the system can."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(list(preload))
    return forked


def warm() -> None:
    """Start what workers are forked from, where they are, so that it imports while this process does.

    Control-C in the terminal reaches it too: this process alone answers.
    """
    if processes().get_start_method() == "forkserver":
        from multiprocessing import forkserver, resource_tracker  # noqa: PLC0415 -- not on every system

        resource_tracker.ensure_running()  # the first call ends with the signal let through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with for_workers():
                forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _said(client: int, answer: tuple[bytes, bytes | None] | Exception) -> _Said:
    if not isinstance(answer, Exception):
        reply, state = answer
        if isinstance(reply, bytes) and isinstance(state, bytes | None):
            return _OK, client, reply, state
        answer = TypeError(f"bytes are expected, not {type(reply).__name__} and {type(state).__name__}")
    return _RAISED, client, _one_line(answer), None


def _answers(serve: Serve, asked: Sequence[_Asked]) -> list[_Said]:
    """Serve one client, or several at once; whatever a client's code raises costs that client its place only."""
    try:
        if len(asked) > 1:
            pairs = zip(asked, cast("ServeTogether", serve).together(asked), strict=True)
            return [_said(client, answer) for (client, _, _), answer in pairs]
        return [_said(client, serve(client, request, state)) for client, request, state in asked]
    except Exception as error:  # noqa: BLE001
        return [_said(client, error) for client, _, _ in asked]


def _work(pipe: Connection, make_serve: Callable[[], Serve]) -> None:
    """Serve requests until the pipe closes, which also happens when the server is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        serve = make_serve()
    except Exception as error:  # noqa: BLE001 -- told to the server, which raises it
        _send(pipe, [(_BROKEN, 0, _one_line(error), None)])
        return
    last = b""
    with contextlib.suppress(EOFError, OSError):
        _send(pipe, [(_READY, 0, None, None)])
        while True:
            asked = []
            for _, client, request, state in _receive(pipe):
                last = last if request is None else request
                asked.append((client, last, state))
            _send(pipe, _answers(serve, asked))


class _Worker:
    """One process and the task it has at the moment."""

    def __init__(self, context: multiprocessing.context.BaseContext, make_serve: Callable[[], Serve]) -> None:
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(  # type: ignore[attr-defined]
            target=_work, args=(theirs, make_serve), daemon=True
        )
        try:
            with for_workers(), spared(make_serve):
                self.process.start()
        except Exception as error:
            self.pipe.close()
            raise EngineError(f"a worker process cannot be started: {_one_line(error).decode()}") from error
        finally:
            theirs.close()
        self.task: _Task | None = None
        self.last: bytes | None = None
        self.ready = False

    def give(self, task: _Task, states: StateStore) -> None:
        """Send a task; a request that is the one before is not sent again."""
        self.task = task
        said = []
        for client, request in task[1]:
            said.append((_OK, client, None if request is self.last else request, states.get(client)))
            self.last = request
        # a dead worker is noticed when its pipe is read
        with contextlib.suppress(OSError):
            _send(self.pipe, said)

    def stop(self) -> None:
        self.pipe.close()
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


class LocalEngine:
    """Worker processes that serve clients' requests.

    Args:
        make_serve: picklable; called once in each worker, so that model and data stay resident there.
        clients: how many clients there are: 0..clients-1.
        workers: processes; 0 serves inside this process, for debugging.
        store: what clients keep between rounds; closed with the engine. None: a temporary one.
        preload: modules that are imported once, before workers are forked.
        together: clients that a worker serves at once; more than one needs a ``ServeTogether``. They are taken in the
            order of the requests, so who is served with whom does not depend on the workers.

    Guarantees:
        A worker that dies is replaced and its task served again; a client whose task kills three workers, or
        raises, is a ``Failure`` of its own. No worker outlives this process, even when it is killed.
    """

    def __init__(
        self, make_serve: Callable[[], Serve], *, clients: int, workers: int, store: StateStore | None = None,
        preload: Sequence[str] = (), together: int = 1,
    ) -> None:  # fmt: skip
        self._together = together
        self._make_serve = make_serve
        self._count = clients
        self._size = workers
        self.states = StateStore() if store is None else store
        self._preload = list(preload)
        self._workers: list[_Worker] = []
        self._inline: Serve | None = None
        self.stillborn = 0

    def clients(self) -> Sequence[int]:
        """Return 0..clients-1."""
        return range(self._count)

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
        tasks = enumerate(_batched(self._checked(requests), self._together))
        if self._size == 0:
            yield from self._serve_inline(tasks, deadline)
            return
        exchange = _Exchange(self, tasks, deadline)
        try:
            yield from exchange.run()
        finally:
            for worker in self._workers:
                if worker.task is not None:
                    self._replace(worker)

    def close(self) -> None:
        """Stop the workers."""
        for worker in self._workers:
            worker.stop()
        self._workers.clear()
        self.states.close()

    def __enter__(self) -> Self:
        """Return the engine."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _checked(self, requests: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        for client, request in requests:
            if not 0 <= client < self._count:
                raise EngineError(f"client {client} is unknown: there are 0..{self._count - 1}")
            yield client, request

    def _serve_inline(self, tasks: Iterable[_Task], deadline: float | None) -> Iterator[tuple[int, bytes | Failure]]:
        end = None if deadline is None else time.monotonic() + deadline
        if self._inline is None:
            self._inline = self._make_serve()
        for _, group in tasks:
            if end is not None and time.monotonic() >= end:
                for client, _ in group:
                    yield client, Failure(client, f"no reply within {deadline:g} s", sent=False)
                continue
            asked = [(client, request, self.states.get(client)) for client, request in group]
            yield from self.accept(_answers(self._inline, asked))

    def accept(self, said: Iterable[_Said]) -> Iterator[tuple[int, bytes | Failure]]:
        """Keep each client's new state and yield its reply."""
        for kind, client, reply, state in said:
            if state is not None:
                self.states.put(client, state)
            yield client, Failure(client, (reply or b"").decode()) if kind == _RAISED else reply or b""

    def staffed(self) -> list[_Worker]:
        """Return the workers, started where they are not yet."""
        while len(self._workers) < self._size:
            self._workers.append(_Worker(processes(self._preload), self._make_serve))
        return self._workers

    def _replace(self, worker: _Worker) -> None:
        worker.stop()
        self._workers[self._workers.index(worker)] = _Worker(processes(self._preload), self._make_serve)

    def replace_dead(self, worker: _Worker) -> None:
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

    def __init__(self, engine: LocalEngine, tasks: Iterator[_Task], deadline: float | None) -> None:
        self.engine = engine
        self.tasks = tasks
        self.deadline = deadline
        self.end = None if deadline is None else time.monotonic() + deadline
        self.again: deque[_Task] = deque()
        self.deaths: dict[int, int] = {}
        self.open: set[int] = set()
        self.next = 0
        self.exhausted = False

    def run(self) -> Iterator[tuple[int, bytes | Failure]]:
        while True:
            workers = self.engine.staffed()
            for worker in workers:
                self._give(worker)
            if not self.open and self.exhausted:
                return
            left = None if self.end is None else self.end - time.monotonic()
            if left is not None and left <= 0:
                yield from self._late()
                return
            # a process that a client's code left behind may hold a dead worker's pipe open: watch both
            ready = wait([*(w.pipe for w in workers), *(w.process.sentinel for w in workers)], left)
            for worker in [w for w in workers if w.pipe in ready or w.process.sentinel in ready]:
                yield from self._hear(worker)

    def _give(self, worker: _Worker) -> None:
        if worker.task is not None or not worker.ready:
            return
        task = self._take()
        if task is None:
            return
        worker.give(task, self.engine.states)

    def _take(self) -> _Task | None:
        if self.again:
            return self.again.popleft()
        if self.exhausted or (self.open and self.next - min(self.open) >= _WINDOW * len(self.engine.staffed())):
            return None
        task = next(self.tasks, None)
        if task is None:
            self.exhausted = True
            return None
        self.next = task[0] + 1
        self.open.add(task[0])
        return task

    def _hear(self, worker: _Worker) -> Iterator[tuple[int, bytes | Failure]]:
        try:
            # what a worker sent before it died still counts
            said = _receive(worker.pipe) if worker.pipe.poll() else []
        except (EOFError, OSError):
            said = []
        if not said:
            yield from self._died(worker)
            return
        if said[0][0] == _BROKEN:
            raise EngineError(f"a worker cannot serve: {(said[0][2] or b'').decode()}")
        if said[0][0] == _READY:
            worker.ready = True
            self.engine.stillborn = 0
            return
        task, worker.task = worker.task, None
        if task is not None:
            self.open.discard(task[0])
            answers = list(self.engine.accept(said))
            # the next task first: the worker computes while the receiver handles these answers
            if self.end is None or time.monotonic() < self.end:
                self._give(worker)
            yield from answers

    def _died(self, worker: _Worker) -> Iterator[tuple[int, bytes | Failure]]:
        task = worker.task
        self.engine.replace_dead(worker)
        if task is None:
            return
        number, group = task
        self.deaths[number] = self.deaths.get(number, 0) + 1
        if self.deaths[number] < _TRIES:
            self.again.append(task)
            return
        self.open.discard(number)
        for client, _ in group:
            yield client, Failure(client, f"its worker process died {_TRIES} times (out of memory, or killed)")

    def _late(self) -> Iterator[tuple[int, bytes | Failure]]:
        busy = [w.task for w in self.engine.staffed() if w.task is not None]
        reason = f"no reply within {self.deadline:g} s"
        for _, group in [*busy, *self.again]:
            yield from ((client, Failure(client, reason)) for client, _ in group)
        for _, group in self.tasks:
            yield from ((client, Failure(client, reason, sent=False)) for client, _ in group)
