"""A model of real links: how long measured bytes and measured client seconds would take on them."""

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
        down, up: bits a second, as the client sees them.
        latency: seconds one way.
        share: of the clients that have it.
    """

    down: float
    up: float
    latency: float = 0.0
    share: float = 1.0

    def seconds(self, down: float, up: float, work: float) -> float:
        """Return how long a client takes for a request of ``down`` bytes, ``work`` seconds and a reply of ``up``."""
        return 2 * self.latency + 8 * down / self.down + work + 8 * up / self.up


@dataclass(frozen=True)
class Links:
    """The kinds of links of a federation, and who has which: low numbers have the first kind."""

    kinds: tuple[Link, ...]

    @classmethod
    def parse(cls, text: str) -> Links:
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
        """Return the link of a client of ``clients``."""
        place, until = (client + 0.5) / clients, 0.0
        for kind in self.kinds:
            until += kind.share
            if place < until:
                return kind
        return self.kinds[-1]


def predicted(rows: Sequence[Mapping[str, Any]], links: Links, clients: int) -> list[float]:
    """Return the seconds that each exchange of a run would take: the slowest client's, all starting at once.

    The clients' work is what was measured; the server's own time, and what several clients share of its link, are not
    in the model.
    """
    found = []
    for row in rows:
        work = {int(who): float(spent) for who, spent in row["each_seconds"]}
        times = [links.of(k, clients).seconds(down, up, work.get(k, 0.0)) for k, down, up in row["each"]]
        found.append(max(times, default=0.0))
    return found


def per_client(rows: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Return what each client carried in a run, both ways, in bytes."""
    total: dict[int, int] = {}
    for row in rows:
        for who, down, up in row["each"]:
            total[int(who)] = total.get(int(who), 0) + int(down) + int(up)
    return total
