"""Engines carry bytes between the server and its clients; they know bytes and a serve callable, no tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

Serve = Callable[[int, bytes, bytes | None], tuple[bytes, bytes | None]]
"""(client, request, kept state) -> (reply, new state; None: unchanged)."""


class ServeTogether(Protocol):
    """A ``Serve`` that can also serve several clients at once."""

    def __call__(self, client: int, request: bytes, state: bytes | None) -> tuple[bytes, bytes | None]:
        """Serve one client."""

    def together(
        self, asked: Sequence[tuple[int, bytes, bytes | None]]
    ) -> Sequence[tuple[bytes, bytes | None] | Exception]:
        """Serve each (client, request, kept state); what one client's code raises stands in its place."""


@dataclass(frozen=True)
class Failure:
    """A client that did not answer, and why, in one line; ``sent``: whether the request went out."""

    client: int
    reason: str
    sent: bool = True


@dataclass(frozen=True)
class Task:
    """Requests to clients that stand next to each other in an ask.

    Attributes:
        first: the place of the first of them in the ask.
        requests: each client and its request, in their order.
        whole: how often the task is done again as a whole if its process died; then client by client.
    """

    first: int
    requests: Sequence[tuple[int, bytes]]
    whole: int = 0


@dataclass(frozen=True)
class Gathered:
    """What became of the replies to a task.

    Attributes:
        first: the place of the task's first client in the ask.
        clients: the clients of the task.
        made: what ``ServeGathering.gather`` returned; its memory is used again once the next answer is asked for.
    """

    first: int
    clients: tuple[int, ...]
    made: Sequence[memoryview]


def batches(requests: Iterable[tuple[int, bytes]], size: int, whole: int = 0) -> Iterator[Task]:
    """Yield requests as tasks of ``size`` clients, the last perhaps of fewer; ``whole`` is that of each task."""
    remaining, first = iter(requests), 0
    while group := tuple(itertools.islice(remaining, size)):
        yield Task(first, group, whole)
        first += len(group)


class Closing:
    """Base of engines, which are closed at the end of their ``with`` block."""

    def close(self) -> None:
        """Release everything; the engine cannot be used after."""

    def __enter__(self) -> Self:
        """Return the engine."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


class ServeGathering(Protocol):
    """A ``Serve`` that can also reduce the replies of the clients that it serves."""

    def __call__(self, client: int, request: bytes, state: bytes | None) -> tuple[bytes, bytes | None]:
        """Serve one client."""

    def gather(
        self, job: Any, first: int, asked: Sequence[tuple[int, bytes, bytes | None]]
    ) -> tuple[Sequence[bytes | bytearray | memoryview], Sequence[bytes | None]]:
        """Serve each (client, request, kept state) of a task; return what was made of the replies, and new states.

        Args:
            job: what ``Engine.gather`` was given.
            first: the place of the first client in the ask.
            asked: the clients.
        """


class States(Protocol):
    """What clients keep between rounds, wherever it lies; its names are kept with a run's checkpoint."""

    def restore(self, names: MutableMapping[int, str]) -> None:
        """Go on from the names of what clients keep; they are changed in place from now on."""

    def commit(self) -> None:
        """Make what is kept, and its names, ready for a checkpoint."""

    def collect(self) -> None:
        """Forget what the checkpoint that was just written needs no more."""

    def lost(self) -> list[int]:
        """Return the clients that turned out to have lost what they kept, since this was last asked."""

    def resent(self) -> dict[int, tuple[int, int]]:
        """Return the bytes, down and up, by which clients were brought up to date beside the exchanges, since then."""


class Engine(Protocol):
    """What an engine offers.

    Attributes:
        states: what its clients keep.
    """

    @property
    def states(self) -> States:
        """Return what its clients keep."""

    def clients(self) -> Sequence[int]:
        """Return the clients that can be asked."""

    def exchange(
        self, requests: Iterable[tuple[int, bytes]], deadline: float | None = None
    ) -> Iterator[tuple[int, bytes | Failure]]:
        """Send each (client, request) and yield each answer once, in any order.

        Args:
            requests: consumed lazily, in order.
            deadline: seconds for the whole exchange; who has not answered by then is a ``Failure``.
        """

    def close(self) -> None:
        """Release everything; the engine cannot be used after."""

    def __enter__(self) -> Self:
        """Return the engine."""

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""


@runtime_checkable
class Gathering(Protocol):
    """What an engine offers besides where it can have replies reduced where they are made."""

    @property
    def workers(self) -> int:
        """Return how many clients can be served at the same time."""

    def gather(self, tasks: Iterable[Task], job: object, deadline: float | None = None) -> Iterator[Gathered | Failure]:
        """Have requests served and the replies reduced where they are made; yield what was made of each task.

        A task whose process died is done again, client by client. A client that does not answer is a ``Failure``.

        Args:
            tasks: consumed lazily, in order.
            job: what to do; given to ``ServeGathering.gather`` as it is.
            deadline: seconds for the whole exchange.
        """


@dataclass(frozen=True)
class Traffic:
    """The bytes between the server and its relays.

    Attributes:
        down: requests, each sent to a relay once for as long as it is the same, and what to do with the replies.
        up: sums and replies, with what is said of each client.
    """

    down: int
    up: int


@runtime_checkable
class Relaying(Gathering, Protocol):
    """What a gathering engine offers besides whose clients are asked by relays, each of which adds up its share."""

    @property
    def relays(self) -> int:
        """Return how many relays there are."""

    def traffic(self) -> Traffic:
        """Return the bytes between the server and its relays since this was last asked."""
