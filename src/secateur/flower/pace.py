"""Pace says before an exchange which clients cannot answer within its deadline, by what is known of their links."""

from __future__ import annotations

import math
from collections.abc import Mapping

from secateur.bandwidth import Bandwidth
from secateur.flower.messages import LEAST, MOST, USUAL

_NAMED = 3  # clients, at most
_REQUEST, _TOGETHER = 30.0, 2  # seconds that Flower gives a request, and how many of a message are under way
_ROOM = 1.25  # a deadline that is advised, over the seconds expected
_LESS = "send less (wire.values=int8, or a schedule that starts sparser)"


class Pace:
    """Keeps what exchanges showed of each client's link.

    A link that the server's owner described tells before the first round; that a client was not done within a deadline
    tells before it is sent as much again. How long a client works is not known, so that what is said is said rightly
    and some of what will be late is not said.

    Args:
        links: as the server's owner describes them; None: nothing is known before the first exchange.
        clients: how many there are in all.
    """

    def __init__(self, links: Bandwidth | None, clients: int) -> None:
        self._links, self._clients = links, clients
        self._up: dict[int, int] = {}
        self._missed: dict[int, int] = {}

    def answered(self, client: int, down: int, up: int) -> None:
        """Note that a client was sent ``down`` bytes and answered in time with ``up``."""
        self._up[client] = up
        if down >= self._missed.get(client, math.inf):
            del self._missed[client]

    def missed(self, client: int, down: int) -> None:
        """Note that a client that was sent ``down`` bytes had not answered by the deadline."""
        self._missed[client] = min(down, self._missed.get(client, down))

    def remarks(self, sizes: Mapping[int, int], deadline: float) -> list[str]:
        """Return a line for the clients whose links are too slow, and one for those that were too late with as much.

        Args:
            sizes: the bytes that each client is sent.
            deadline: seconds for the exchange.
        """
        slow = self._slow(sizes, deadline)
        late = [k for k, size in sizes.items() if k not in slow and size >= self._missed.get(k, math.inf)]
        said = []
        if slow:
            worst = max(slow, key=lambda k: slow[k][0])
            said.append(f"{_named(list(slow))} cannot answer within deadline = {deadline:g} s: {slow[worst][1]}")
        if late:
            said.append(
                f"{_named(late)} did not answer within deadline = {deadline:g} s before, and "
                f"{_mb(min(sizes[k] for k in late))} are to be sent again: raise it, or {_LESS}"
            )
        return said

    def part(self, client: int) -> int:
        """Return the bytes of a part of a client's messages: a quarter of what its link carries in time, at most."""
        if self._links is None:
            return USUAL
        link = self._links.of(client, self._clients)
        return int(min(MOST, max(LEAST, min(link.down, link.up) / 8 * _REQUEST / _TOGETHER / 4)))

    def _slow(self, sizes: Mapping[int, int], deadline: float) -> dict[int, tuple[float, str]]:
        """Return whose links are too slow: the seconds, and a text that says why and what would do."""
        slow: dict[int, tuple[float, str]] = {}
        if self._links is None:
            return slow
        for client, down in sizes.items():
            link, up = self._links.of(client, self._clients), self._up.get(client, down)
            spent = link.spent(down, up, 0.0)
            if spent.seconds > deadline:
                fits = (down + up) * (deadline - link.fixed - 2 * link.latency) / (spent.link - 2 * link.latency)
                slow[client] = (
                    spent.seconds,
                    (
                        f"{_mb(down)} down and about {_mb(up)} up take {spent.seconds:.0f} s at {link.down / 1e6:g}/"
                        f"{link.up / 1e6:g} Mbit/s; deadline={math.ceil(_ROOM * spent.seconds)} would do, or to "
                        f"{_LESS}" + (f": {_mb(fits)} both ways fit" if fits > 0 else "")
                    ),
                )
        return slow


def _named(clients: list[int]) -> str:
    names = ", ".join(map(str, clients[:_NAMED]))
    more = f" and {len(clients) - _NAMED} more" if len(clients) > _NAMED else ""
    return f"client{'s' if len(clients) > 1 else ''} {names}{more}"


def _mb(size: float) -> str:
    return f"{size / 1e6:.3g} MB"
