"""A model of a network: the seconds that measured bytes and measured client work would take on it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.errors import ConfigError

_UNITS = {"bit": 1, "kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9, "kB": 8e3, "MB": 8e6, "GB": 8e9}
_LINK = re.compile(
    r"(?:(?P<share>[0-9.]+):)?(?P<down>[0-9.]+)(?:/(?P<up>[0-9.]+))?(?P<unit>[kMG]?bit|[kMG]B)/s(?:,(?P<wait>[0-9.]+)ms)?"
)


@dataclass(frozen=True)
class Link:
    """One kind of link.

    Attributes:
        down, up: rates in bits a second, as the client sees them.
        latency: seconds one way.
        share: the fraction of clients that have this kind.
    """

    down: float
    up: float
    latency: float = 0.0
    share: float = 1.0

    def seconds(self, down: float, up: float, work: float) -> float:
        """Return the seconds that a request of ``down`` bytes, ``work`` seconds and a reply of ``up`` bytes take."""
        return 2 * self.latency + 8 * down / self.down + work + 8 * up / self.up


@dataclass(frozen=True)
class Bandwidth:
    """The network of a federation: its kinds of links, given to clients in the order of their numbers."""

    kinds: tuple[Link, ...]

    @classmethod
    def parse(cls, text: str) -> Bandwidth:
        """Read ``10Mbit/s,50ms``; ``20/5Mbit/s,50ms`` (down and up); ``0.8:100Mbit/s,5ms;0.2:2Mbit/s,80ms`` (shares).

        Raises:
            ConfigError: it is written otherwise, or shares do not add up to 1.

        >>> Links.parse("10Mbit/s,50ms").kinds
        (Link(down=10000000.0, up=10000000.0, latency=0.05, share=1.0),)
        """
        kinds = []
        for part in text.replace(" ", "").split(";"):
            found = _LINK.fullmatch(part)
            if found is None:
                raise ConfigError(
                    f"link {part!r}: write it as 10Mbit/s,50ms or 20/5Mbit/s,50ms; several kinds as 0.8:...;0.2:..."
                )
            unit, down = _UNITS[found["unit"]], float(found["down"])
            share = float(found["share"] or 1)
            kinds.append(Link(down * unit, float(found["up"] or down) * unit, float(found["wait"] or 0) / 1000, share))
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


def predict_seconds(rows: Sequence[Mapping[str, Any]], bandwidth: Bandwidth, clients: int) -> list[float]:
    """Return the predicted seconds of each exchange of a run: those of its slowest client.

    All clients start at once and work as long as was measured. The server's own time and the sharing of its link are
    not in the model.
    """
    seconds = []
    for row in rows:
        work = {int(who): float(spent) for who, spent in row["each_seconds"]}
        times = [bandwidth.of(k, clients).seconds(down, up, work.get(k, 0.0)) for k, down, up in row["each"]]
        seconds.append(max(times, default=0.0))
    return seconds


def bytes_per_client(rows: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Return the bytes that each client carried in a run, both ways."""
    total: dict[int, int] = {}
    for row in rows:
        for who, down, up in row["each"]:
            total[int(who)] = total.get(int(who), 0) + int(down) + int(up)
    return total
