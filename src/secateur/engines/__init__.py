"""Engines carry bytes between the server and its clients; they know bytes and a serve callable, no tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

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
