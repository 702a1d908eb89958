"""A model of a network: the seconds that measured bytes and measured client work would take on it."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.errors import ConfigError

_UNITS = {"bit": 1, "kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9, "kB": 8e3, "MB": 8e6, "GB": 8e9}
_LINK = re.compile(
    r"(?:(?P<share>[0-9.]+):)?(?P<down>[0-9.]+)(?:/(?P<up>[0-9.]+))?(?P<unit>[kMG]?bit|[kMG]B)/s"
    r"(?:,(?P<wait>[0-9.]+)ms)?(?:,flower:(?P<fixed>[0-9.]+)s)?"
)
_PROTOCOL = 1.08, 12_000, 25_000  # what Flower and TLS make of a payload, and add to each request and reply
SCORED = "evaluate_each"
"""The entry of a record under which the bytes of clients that were asked for scores stand, by client."""


@dataclass(frozen=True)
class Link:
    """One kind of link.

    Attributes:
        down, up: rates in bits a second, as the client sees them.
        latency: seconds one way.
        share: the fraction of clients that have this kind.
        fixed: seconds that an exchange takes besides bytes and training: polls, and the start of processes. Above 0 it
            is one of Flower's, with what its protocol adds to the payloads, measured with flwr 1.42: 8 % of the bytes,
            and 12 kB a request and 25 kB a reply.
    """

    down: float
    up: float
    latency: float = 0.0
    share: float = 1.0
    fixed: float = 0.0

    def spent(self, down: float, up: float, work: float) -> Spent:
        """Return what a request of ``down`` bytes, ``work`` seconds and a reply of ``up`` bytes take."""
        factor, more_down, more_up = _PROTOCOL if self.fixed else (1.0, 0, 0)
        carried = 8 * (factor * down + more_down) / self.down + 8 * (factor * up + more_up) / self.up
        return Spent(2 * self.latency + carried, self.fixed, work)


@dataclass(frozen=True)
class Spent:
    """Seconds of one or more exchanges.

    Attributes:
        link: in which bytes travel, waiting for the first of them included.
        fixed: which an exchange takes whatever it carries.
        work: in which the slowest client trains or scores.
    """

    link: float = 0.0
    fixed: float = 0.0
    work: float = 0.0

    @property
    def seconds(self) -> float:
        """Return all of them."""
        return self.link + self.fixed + self.work

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.link + other.link, self.fixed + other.fixed, self.work + other.work)


@dataclass(frozen=True)
class Bandwidth:
    """The network of a federation: its kinds of links, given to clients in the order of their numbers."""

    kinds: tuple[Link, ...]

    @classmethod
    def parse(cls, text: str) -> Bandwidth:
        """Read a description of a network.

        ``10Mbit/s,50ms`` is one kind, with its latency; ``20/5Mbit/s`` has rates down and up;
        ``10Mbit/s,50ms,flower:4s`` is a Flower federation, whose exchanges take 4 s besides;
        ``0.8:100Mbit/s,5ms;0.2:2Mbit/s,80ms`` are two kinds with their shares.

        Raises:
            ConfigError: it is written otherwise, or shares do not add up to 1.

        >>> Bandwidth.parse("10Mbit/s,50ms").kinds
        (Link(down=10000000.0, up=10000000.0, latency=0.05, share=1.0, fixed=0.0),)
        """
        kinds = []
        for part in text.replace(" ", "").split(";"):
            found = _LINK.fullmatch(part)
            if found is None:
                raise ConfigError(
                    f"link {part!r}: write it as 10Mbit/s,50ms or 20/5Mbit/s,50ms, for a Flower federation with "
                    ",flower:4s behind it (the fixed seconds of an exchange, or a run's folder that tells them); "
                    "several kinds as 0.8:...;0.2:..."
                )
            unit, down = _UNITS[found["unit"]], float(found["down"])
            share, fixed = float(found["share"] or 1), float(found["fixed"] or 0)
            latency, up = float(found["wait"] or 0) / 1000, float(found["up"] or down)
            kinds.append(Link(down * unit, up * unit, latency, share, fixed))
        if abs(sum(kind.share for kind in kinds) - 1) > 1e-6 or any(min(k.down, k.up) <= 0 for k in kinds):
            raise ConfigError(f"link {text!r}: rates must be above 0, and the shares of all kinds must add up to 1")
        return cls(tuple(kinds))

    def of(self, client: int, clients: int) -> Link:
        """Return the link of one of ``clients`` clients."""
        place, until = (client + 0.5) / clients, 0.0
        for kind in self.kinds:
            until += kind.share
            if place < until:
                return kind
        return self.kinds[-1]

    @property
    def greeting(self) -> Spent:
        """Return what the greeting before the first round takes; a federation without Flower has none."""
        return max((kind.spent(0, 0, 0) for kind in self.kinds if kind.fixed), key=_seconds, default=Spent())

    def unseen(self, spent: Spent, exchanges: int, share: float = 0.1) -> float:
        """Return the bytes of a client, both ways, that take a share of an exchange on the thinnest link.

        Fewer bytes than that cannot make an exchange shorter by more than this share.

        Args:
            spent: the seconds of a run, of which the fixed ones and those of work count.
            exchanges: how many it had.
            share: of an exchange.
        """
        thin = max(self.kinds, key=lambda kind: 1 / kind.down + 1 / kind.up)
        rest = (spent.fixed + spent.work) / max(1, exchanges) + 2 * thin.latency
        return share / (1 - share) * rest / (4 / thin.down + 4 / thin.up)


def _seconds(spent: Spent) -> float:
    return spent.seconds


def scores(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the exchange in which clients scored a model, of a record or a run's end, as a record of its own."""
    return {"each": row.get(SCORED, []), "each_seconds": []}


def predict(rows: Sequence[Mapping[str, Any]], bandwidth: Bandwidth, clients: int) -> list[Spent]:
    """Return what each record of a run would have taken: its exchanges, of which each is that of its slowest client.

    All clients start at once and work as long as was measured. Where clients also score a model after a round, that is
    an exchange of its own, whose work was not measured. The server's own time and the sharing of its link are not in
    the model, nor is the greeting (``Bandwidth.greeting``).

    Args:
        rows: the run's records.
        bandwidth: the network.
        clients: how many there are in all.
    """
    return [_slowest(row, bandwidth, clients) + _slowest(scores(row), bandwidth, clients) for row in rows]


def _slowest(row: Mapping[str, Any], bandwidth: Bandwidth, clients: int) -> Spent:
    """Return what the slowest client of one exchange takes."""
    work = {int(who): float(spent) for who, spent in row["each_seconds"]}
    asked = (bandwidth.of(k, clients).spent(down, up, work.get(k, 0.0)) for k, down, up in row["each"])
    return max(asked, key=_seconds, default=Spent())


def fixed_of(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the fixed seconds of an exchange, from the records of a run on fast links.

    It is the median of what exchanges took beyond their slowest client's work; those that left a client out are not
    looked at, as they may have waited for a deadline.

    Raises:
        ConfigError: there is no such exchange.
    """
    beyond = [
        float(row["seconds"]) - max((float(spent) for _, spent in row["each_seconds"]), default=0.0)
        for row in rows
        if row["each"] and not row["left_out"] and not row.get(SCORED)
    ]
    if not beyond:
        raise ConfigError(
            "no exchange of that run tells the fixed seconds: each left somebody out, or asked for scores too"
        )
    return max(0.001, statistics.median(beyond))


def bytes_per_client(rows: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Return the bytes that each client carried in a run, both ways."""
    total: dict[int, int] = {}
    for row in rows:
        for who, down, up in [*row["each"], *scores(row)["each"]]:
            total[int(who)] = total.get(int(who), 0) + int(down) + int(up)
    return total
