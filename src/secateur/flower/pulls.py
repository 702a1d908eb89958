"""Pulling replies from a Flower Grid, each in a thread of its own, so that one that is stuck holds up no other.

``Grid.pull_messages`` returns at once where there is no reply yet, and blocks from the moment a node begins to upload
one until the last byte is there, or the node's session has expired, which can be minutes on a thin link.
"""

from __future__ import annotations

import heapq
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_EVERY = 0.2  # seconds between two looks for one reply, at least
_EACH = 0.005  # seconds that a look costs the SuperLink, about; many replies are looked for less often
_LATE = 0.5  # seconds that a look may be overdue before another thread helps
_WINDOW = 16  # replies that are in memory at a time, at most


class Pulls:
    """Looks for the replies to messages until they are there or are given up.

    Args:
        pull: ``Grid.pull_messages``.
        first: how many threads there are while none of them is stuck.
    """

    def __init__(self, pull: Callable[[Iterable[str]], Iterable[Any]], *, first: int = 4) -> None:
        self._pull, self._first = pull, first
        self._came: queue.Queue[tuple[str, Any]] = queue.Queue(_WINDOW)
        self._due: list[tuple[float, str]] = []
        self._wanted: set[str] = set()
        self._threads = self._busy = 0
        self._changed = threading.Condition()
        self._closed = False

    def add(self, ask: str) -> None:
        """Look for the reply to a message from now on."""
        with self._changed:
            self._wanted.add(ask)
            heapq.heappush(self._due, (time.monotonic(), ask))
            if self._threads < min(self._first, len(self._wanted)):
                self._start()
            self._changed.notify()

    def give_up(self, ask: str) -> None:
        """Look for the reply to a message no more."""
        with self._changed:
            self._wanted.discard(ask)

    def arrived(self, seconds: float = 0.0) -> Iterator[Any]:
        """Yield the replies that are there; wait for the first of them, ``seconds`` at most.

        Raises:
            Exception: whatever the grid raised.
        """
        self._help()
        end = time.monotonic() + seconds
        while True:
            try:
                ask, found = self._came.get(timeout=max(0.0, end - time.monotonic()) or 1e-4)
            except queue.Empty:
                return
            with self._changed:
                wanted = ask in self._wanted
                self._wanted.discard(ask)
            if isinstance(found, BaseException):
                raise found
            if wanted:
                yield found
            end = 0.0

    def close(self) -> None:
        """Give everything up; a thread that is stuck ends with what it waits for, or with the process."""
        with self._changed:
            self._closed = True
            self._wanted.clear()
            self._changed.notify_all()

    def _help(self) -> None:
        """Start another thread if all are stuck while a reply should have been looked for."""
        with self._changed:
            late = bool(self._due) and self._due[0][0] < time.monotonic() - _LATE
            if late and self._busy == self._threads < len(self._wanted):
                self._start()

    def _start(self) -> None:
        self._threads += 1
        threading.Thread(target=self._work, name="secateur-pull", daemon=True).start()

    def _work(self) -> None:
        while (ask := self._next()) is not None:
            try:
                found: list[Any] = list(self._pull([ask]))
            except BaseException as broken:  # noqa: BLE001 -- raised again where replies are waited for
                found = [broken]
            with self._changed:
                self._busy -= 1
                if not found and ask in self._wanted:
                    heapq.heappush(self._due, (time.monotonic() + max(_EVERY, _EACH * len(self._wanted)), ask))
                    self._changed.notify()
            for one in found:
                self._hand_over(ask, one)

    def _next(self) -> str | None:
        """Return the message whose reply is to be looked for next, once it is time; None: all is given up."""
        with self._changed:
            while not self._closed:
                while self._due and self._due[0][1] not in self._wanted:
                    heapq.heappop(self._due)
                wait = self._due[0][0] - time.monotonic() if self._due else None
                if wait is not None and wait <= 0:
                    self._busy += 1
                    return heapq.heappop(self._due)[1]
                self._changed.wait(wait)
            return None

    def _hand_over(self, ask: str, one: Any) -> None:
        while not self._closed:
            try:
                self._came.put((ask, one), timeout=1.0)
            except queue.Full:
                continue
            return
