"""Shares: how an ask's clients are divided among workers and relays, aligned with the tree of ``contract.fold``."""

from __future__ import annotations

from collections.abc import Iterator

from secateur.contract.ask import Ask
from secateur.contract.fold import ARITY, Node
from secateur.engines import Gathering, Relaying
from secateur.learning.compute import Compute

_TOGETHER = ARITY**2


def divided(ask: Ask, compute: Compute, engine: Gathering, *, sums: bool, late: bool) -> Iterator[tuple[int, int]]:
    """Yield the place and the number of the clients of each task of an ask.

    Args:
        ask: the ask.
        compute: says how many clients train together.
        engine: serves the tasks.
        sums: whether sums are all that is needed of the replies.
        late: whether clients may be too late.
    """
    total = len(ask.clients)
    if compute.stacks:
        return ((first, min(compute.together, total - first)) for first in range(0, total, compute.together))
    if not isinstance(engine, Relaying):
        # with a deadline, who is late must not cost others their place
        return pieces(0, total, engine.workers, single=not sums or late)
    if sums and ask.slices is None and not ask.own:
        return shares(total, engine.relays)
    # what passes a relay as it is must not fill its memory
    width = ARITY * (engine.workers // engine.relays)
    return ((first, min(width, total - first)) for first in range(0, total, width))


def pieces(first: int, count: int, workers: int, *, single: bool = False) -> Iterator[tuple[int, int]]:
    """Yield the place and the number of the clients of each task.

    Large tasks come first and single clients last, so that no worker waits for another.

    Args:
        first: the place of the first client.
        count: the number of clients.
        workers: how many tasks are done at the same time.
        single: whether each task has one client.
    """
    end = first + count
    while first < end:
        share = 1 if single else min((end - first) // (2 * workers), _TOGETHER)
        node = Node(0, first)
        while node.most * ARITY <= share and node.index % ARITY == 0:
            node = Node(node.level + 1, node.index // ARITY)
        yield first, min(node.most, end - first)
        first += node.most


def shares(total: int, relays: int) -> Iterator[tuple[int, int]]:
    """Yield the place and the number of the clients of each relay.

    A relay sends one sum for each node of its share, so shares begin at multiples of the largest node with which none
    is more than a third larger than an even one.

    Args:
        total: the number of clients in the ask.
        relays: their number; some may have no share if there are more of them than clients.
    """
    unit, found = 1, _cut(total, relays, 1)
    while unit < total:
        unit *= ARITY
        cut = _cut(total, relays, unit)
        if 3 * relays * max(count for _, count in cut) <= 4 * total:
            found = cut
    return iter(found)


def _cut(total: int, relays: int, unit: int) -> list[tuple[int, int]]:
    """Return shares that begin at multiples of ``unit``, as even as that allows; empty ones left out."""
    bounds = [min(total, unit * round(total * k / (relays * unit))) for k in range(relays)]
    return [(first, end - first) for first, end in zip(bounds, [*bounds[1:], total], strict=True) if end > first]
