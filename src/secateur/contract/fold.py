"""Folding: how parts of a cohort become one, in an order that neither workers, relays nor arrival can change.

The clients of an ask are the leaves of a tree, in the order of the ask. Each node of the tree joins up to ``ARITY``
neighbours, the first one first, so that a worker or a relay can sum any node's clients by itself, and the sum of all
has the same bits as if one process had summed them in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

ARITY = 4
"""The parts that are joined at a time. Fewer need more memory, more leave less choice of how to spread the work."""

Part = TypeVar("Part")


@dataclass(frozen=True)
class Node:
    """A node of the tree: the clients ``first`` to ``first + ARITY**level - 1`` of an ask, or fewer at its end.

    Attributes:
        level: the height above single clients, which are of level 0.
        index: the number of the node among those of its level.
    """

    level: int
    index: int

    @property
    def first(self) -> int:
        """Return the place of the node's first client."""
        return self.index * self.most

    @property
    def most(self) -> int:
        """Return how many clients the node has, unless the cohort ends before."""
        return int(ARITY**self.level)


def nodes(first: int, count: int, total: int) -> Iterator[Node]:
    """Yield the largest nodes that together have exactly ``count`` clients from place ``first`` on.

    Args:
        first: the place of the first client.
        count: the number of clients.
        total: the number of clients in the ask; the last nodes of a cohort may have fewer clients than others.
    """
    end = first + count
    while first < end:
        level = 0
        while (
            ARITY**level < total
            and first % ARITY ** (level + 1) == 0
            and min(total, first + ARITY ** (level + 1)) <= end
        ):
            level += 1
        yield Node(level, first // ARITY**level)
        first += min(ARITY**level, end - first)


class Fold(Generic[Part]):
    """Joins parts as they come, in any order, into one.

    Memory holds one sum for each level of the tree, and the parts that came before their turn.

    Args:
        total: the number of leaves.
        join: returns the sum of the first parts with the next one; the sum is None at first, and is not used again.
        keep: returns a part that came before its turn as it can be kept; by default as it is.
    """

    def __init__(
        self, total: int, join: Callable[[Part | None, Part], Part], keep: Callable[[Part], Part] = lambda part: part
    ) -> None:
        self._total, self._join, self._keep = total, join, keep
        self._open: dict[Node, _Open[Part]] = {}
        self._sum: Part | None = None
        self.finished = total == 0

    def put(self, node: Node, part: Part | None) -> None:
        """Add a node's part; None: none of its clients has one.

        Raises:
            ValueError: the node was added before, or is none of this tree.
        """
        beyond = node.first >= self._total or (node.level > 0 and node.most >= ARITY * self._total)
        if self.finished or beyond:
            raise ValueError(f"{node} was added before, or is none of a tree with {self._total} leaves")
        if node.most >= self._total:
            self._sum, self.finished = None if part is None else self._join(None, part), True
            return
        parent = Node(node.level + 1, node.index // ARITY)
        if parent not in self._open:
            width = -(-self._total // node.most)
            self._open[parent] = _Open(min(ARITY, width - parent.index * ARITY))
        siblings, place = self._open[parent], node.index % ARITY
        if place < siblings.next or place in siblings.early:
            raise ValueError(f"{node} was added before")
        if place > siblings.next:
            siblings.early[place] = None if part is None else self._keep(part)
            return
        self._append(siblings, part)
        while siblings.next in siblings.early:
            self._append(siblings, siblings.early.pop(siblings.next))
        if siblings.next == siblings.children:
            del self._open[parent]
            self.put(parent, siblings.sum)

    def _append(self, siblings: _Open[Part], part: Part | None) -> None:
        siblings.next += 1
        if part is not None:
            siblings.sum = self._join(siblings.sum, part)

    @property
    def waiting(self) -> int:
        """Return how many parts are held that came before their turn."""
        return sum(part is not None for siblings in self._open.values() for part in siblings.early.values())

    def result(self) -> Part | None:
        """Return the sum of all parts; None if no leaf has one.

        Raises:
            ValueError: some leaves are missing.
        """
        if not self.finished:
            raise ValueError("some leaves are missing")
        return self._sum


class _Open(Generic[Part]):
    """A node with children missing: the sum of the first ones, and those that came early."""

    def __init__(self, children: int) -> None:
        self.children = children
        self.next = 0
        self.sum: Part | None = None
        self.early: dict[int, Part | None] = {}
