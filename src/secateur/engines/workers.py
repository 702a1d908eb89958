"""Worker processes: how they are started, what they do, and the server's end of their pipes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import cast

from secateur.engines import Serve, ServeGathering, ServeTogether, Task
from secateur.engines.pipes import (
    BROKEN,
    GATHER,
    JOB,
    MADE,
    OK,
    RAISED,
    READY,
    Buffer,
    Channel,
    Heard,
    Item,
    Room,
    messages,
    one_line,
    receive,
    send,
    send_result,
)
from secateur.engines.script import spared
from secateur.engines.store import StateStore
from secateur.errors import EngineError

CLIENT = ("secateur.federation.gathering",)
"""What workers that serve clients import."""
_THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
_OWN = {"PYTHONSAFEPATH": "1"}  # a file of the current folder is never taken for a module of Python itself
_PATIENCE = 1.0
Asked = tuple[int, bytes, bytes | None]


@contextlib.contextmanager
def for_workers() -> Iterator[None]:
    """Let processes started inside the block compute in one thread, and keep the memory that they free.

    The number of workers is set to the number of cores, so more threads would only fight for them. A training step
    frees and asks for a gradient's memory again: where glibc gives it back to the system each time, the system clears
    it each time, for up to a fifth of a round. What the user has set of glibc's settings stays. This process's
    environment is put back. Python's warning of processes that are forked beside threads is silenced: those of ours
    take no lock that a thread may have held.
    """
    wanted = {**_THREADS, **_OWN, **{name: os.environ.get(name, value) for name, value in _MEMORY.items()}}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def processes(preload: Sequence[str] = CLIENT) -> multiprocessing.context.BaseContext:
    """Return how processes are started: forked from one that has imported ``preload``, where the system can.

    Raises:
        EngineError: the temporary folder's path is too long for the address of a socket in it.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    most = (107 if sys.platform == "linux" else 103) - len("/pymp-01234567/listener-01234567")
    if len(os.fsencode(tempfile.gettempdir())) > most:
        raise EngineError(
            f"the temporary folder {tempfile.gettempdir()} is too long for the address of a socket: set TMPDIR to one "
            f"of at most {most} bytes"
        )
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


def said_of(client: int, answer: tuple[bytes, bytes | None] | Exception) -> Item:
    """Return what a worker says of one client's answer."""
    if not isinstance(answer, Exception):
        reply, state = answer
        if isinstance(reply, bytes) and isinstance(state, bytes | None):
            return OK, client, reply, state
        answer = TypeError(f"bytes are expected, not {type(reply).__name__} and {type(state).__name__}")
    return RAISED, client, one_line(answer), None


def answers(serve: Serve, asked: Sequence[Asked]) -> list[Item]:
    """Serve one client, or several at once; whatever a client's code raises costs that client its place only."""
    try:
        if len(asked) > 1:
            pairs = zip(asked, cast("ServeTogether", serve).together(asked), strict=True)
            return [said_of(client, answer) for (client, _, _), answer in pairs]
        return [said_of(client, serve(client, request, state)) for client, request, state in asked]
    except Exception as error:  # noqa: BLE001
        return [said_of(client, error) for client, _, _ in asked]


def gathered(serve: Serve, job: object, first: int, asked: Sequence[Asked]) -> tuple[list[Item], list[Buffer]]:
    """Serve clients and reduce their replies; return the new states, and what was made of the replies.

    Raises:
        EngineError: nobody can be served.
    """
    try:
        made, states = cast("ServeGathering", serve).gather(job, first, asked)
    except EngineError:
        raise
    except Exception as error:  # noqa: BLE001 -- as above; what a single client's code raises is in what was made
        return [said_of(client, error) for client, _, _ in asked], []
    kept = [(OK, client, None, state) for (client, _, _), state in zip(asked, states, strict=True)]
    return [*kept, (MADE, first, None, None)], list(made)


def _leave_signals() -> None:
    """Let the server alone answer Control-C and the end of the terminal; when it ends, so does this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _work(
    pipe: Connection, make_serve: Callable[[], Serve], rooms: tuple[Room, Room], inherited: Sequence[Connection] = ()
) -> None:
    """Serve requests until the pipe closes, which also happens when the server is killed.

    Args:
        pipe: to the server.
        make_serve: makes what serves.
        rooms: for results, in turn.
        inherited: the server's ends of pipes that this process got by being forked; open here, they would never close.
    """
    _leave_signals()
    for other in inherited:
        other.close()
    try:
        serve = make_serve()
    except Exception as error:  # noqa: BLE001 -- told to the server, which raises it
        send(pipe, [(BROKEN, 0, one_line(error), None)])
        return
    last, job, turn = b"", None, 0
    with contextlib.suppress(EOFError, OSError):
        send(pipe, [(READY, 0, None, None)])
        while True:
            (kind, first, _, _), *rest = receive(pipe)
            if kind == JOB:
                try:
                    job = pipe.recv()
                except Exception as error:  # noqa: BLE001 -- as above: what it names cannot be imported here
                    send(pipe, [(BROKEN, 0, one_line(error), None)])
                    return
                continue
            asked = []
            for _, client, request, state in rest:
                last = last if request is None else request
                asked.append((client, last, state))
            if kind == GATHER:
                try:
                    items, buffers = gathered(serve, job, first, asked)
                except EngineError as error:
                    send(pipe, [(BROKEN, 0, one_line(error), None)])
                    return
                send(pipe, items)
                if items[-1][0] == MADE:
                    send_result(pipe, rooms[turn % 2], buffers)
                    turn += 1
            else:
                send(pipe, answers(serve, asked))


class Worker:
    """One process and the task it has at the moment.

    Args:
        context: how it is started.
        make_serve: makes what serves; called in the process.
        beside: the workers that this process has already.
        leads: whether the process starts processes of its own, which it must be given the time to end.

    Attributes:
        down: the bytes of requests and jobs that it was sent.
    """

    def __init__(
        self, context: multiprocessing.context.BaseContext, make_serve: Callable[[], Serve],
        beside: Sequence[Worker] = (), *, leads: bool = False,
    ) -> None:  # fmt: skip
        ours, theirs = context.Pipe()
        # two, since it begins its next task while the server still looks at what it made of the last one
        self._rooms, self._turn = (Room.make(), Room.make()), 0
        self.channel = Channel(ours, self._next_room)
        forked = context.get_start_method() == "fork"
        inherited = [ours, *(worker.channel.pipe for worker in beside)] if forked else []
        self.process: BaseProcess = context.Process(  # type: ignore[attr-defined]
            target=_work, args=(theirs, make_serve, self._rooms, inherited), daemon=not leads
        )
        self._leads = leads
        self.down = 0
        try:
            with for_workers(), spared(make_serve):
                self.process.start()
        except Exception as error:
            self.channel.close()
            raise EngineError(f"a worker process cannot be started: {one_line(error).decode()}") from error
        finally:
            theirs.close()
        self.task: Task | None = None
        self.last: bytes | None = None
        self.job: object = None
        self.ready = False

    @property
    def sentinel(self) -> int:
        """Return what can be waited for until the process ends."""
        return self.process.sentinel

    def give(self, task: Task, states: StateStore, job: object) -> None:
        """Send a task; a job or a request that is the one before is not sent again."""
        self.task = task
        items: list[Item] = [(OK if job is None else GATHER, task.first, None, None)]
        for client, request in task.requests:
            again = request is self.last
            items.append((OK, client, None if again else request, states.get(client)))
            self.down += 0 if again else len(request)
            self.last = request
        said = self._described(job) if job is not None and job is not self.job else []
        self._said([*said, *messages(items)])

    def _described(self, job: object) -> list[Buffer]:
        """Return the messages that describe a job.

        Raises:
            EngineError: it cannot travel to another process.
        """
        try:
            packed = bytes(ForkingPickler.dumps(job))
        except Exception as error:
            raise EngineError(f"a job cannot be given to workers: {one_line(error).decode()}") from error
        self.down += len(packed)
        self.job = job
        return [*messages([(JOB, 0, None, None)]), packed]

    def _said(self, parts: Sequence[Buffer]) -> None:
        with contextlib.suppress(OSError):  # a dead worker is noticed when its pipe is read
            self.channel.say(parts)

    def hear(self) -> Heard | None:
        """Return what the process has said and the result that it made; None as long as there is more to come.

        The result's memory is used again for what is made two tasks later. What waited to be sent is sent on.

        Raises:
            OSError, EOFError: it is dead.
        """
        self._said([])
        return self.channel.hear()

    def _next_room(self) -> Room:
        """Return where the process has written its next result, if it is large."""
        self._turn += 1
        return self._rooms[(self._turn - 1) % 2]

    def stop(self) -> None:
        """Kill the process."""
        self.channel.close()
        if self._leads:
            if self.task is None:  # it ends by itself now that its pipe is closed, and its processes with it
                self.process.join(_PATIENCE)
            self._ask_to_end()
            self.process.join(_PATIENCE)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        for room in self._rooms:
            room.close()

    def _ask_to_end(self) -> None:
        """Let a process end its own processes, and itself, even if it is stopped."""
        self.process.terminate()
        if hasattr(signal, "SIGCONT") and self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGCONT)
