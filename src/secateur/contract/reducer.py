"""Reducing the replies to one ask as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from secateur.contract.ask import Ask
from secateur.contract.fold import Fold, Node
from secateur.contract.reduction import Reduction
from secateur.contract.reply import Reply, Sent
from secateur.contract.spool import Spool
from secateur.contract.state import Setting, State
from secateur.contract.suspects import suspected
from secateur.contract.weighted import Accumulator
from secateur.errors import ConfigError, EngineError
from secateur.wire.message import Message, Scalar


@dataclass(frozen=True)
class Reduced(Mapping[str, Any]):
    """The reduced replies to an ask: the result of each reduction, by its name in ``Ask.reduce``.

    Attributes:
        ask: the ask that was answered.
        results: the result of each reduction.
        rows: n_k of each client that answered, in the order of the ask.
        scalars: the scalars of each reply, by client.
    """

    ask: Ask
    results: Mapping[str, Any]
    rows: Mapping[int, int]
    scalars: Mapping[int, Mapping[str, Scalar]]

    @property
    def clients(self) -> tuple[int, ...]:
        """Return the clients that answered; the run's records name the others and why they are missing."""
        return tuple(self.rows)

    @property
    def suspected(self) -> dict[int, str]:
        """Return the reason for each client that a robust rule left out of some result, ascending."""
        return suspected(self.results.values())

    def counted(self, name: str) -> tuple[int, ...]:
        """Return the clients that answered and were not left out of the result of one reduction."""
        left_out = suspected([self[name]])
        return tuple(client for client in self.rows if client not in left_out)

    def __getitem__(self, name: str) -> Any:
        """Return the result of one reduction."""
        if name not in self.results:
            known = ", ".join(map(repr, self.results)) or "none"
            raise KeyError(f"{name!r} is no reduction of the ask for {self.ask.phase!r}; it has {known}")
        return self.results[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the reductions' names."""
        return iter(self.results)

    def __len__(self) -> int:
        """Return the number of reductions."""
        return len(self.results)


Answer = tuple[int, Mapping[str, Scalar]]
"""What a reduced reply leaves behind besides its sum: the client's rows, and the scalars."""


@dataclass(frozen=True)
class Sums:
    """The accumulators of some clients' replies, by the name of their reduction.

    Attributes:
        of: the accumulators.
        borrowed: whether their memory is used for something else later, so that what is kept must be copied.
    """

    of: Mapping[str, Accumulator]
    borrowed: bool = False

    def own(self) -> Sums:
        """Return the same sums in memory of their own."""
        return Sums({name: _copied(part) for name, part in self.of.items()}) if self.borrowed else self


class Folding:
    """Reduces the replies of neighbours in an ask; see ``contract.fold``.

    Args:
        reductions: by name.
        total: the number of clients.
        spool: stores the replies that must stay single.
        sent_to: returns the request that a client was sent, for reductions that use it.
    """

    def __init__(
        self, reductions: Mapping[str, Reduction], total: int, spool: Spool, sent_to: Callable[[int], Sent]
    ) -> None:
        self._reductions, self._spool, self._sent_to = reductions, spool, sent_to
        self._copies = all(reduction.copies for reduction in reductions.values())
        self._fold: Fold[Sums | Reply] = Fold(total, self._join, _kept)

    @property
    def waiting(self) -> int:
        """Return how many replies or sums are held that came before their turn."""
        return self._fold.waiting

    def put(self, node: Node, part: Sums | Reply | None) -> None:
        """Add the sums of a node's clients, or the reply of a single one; None: they have none.

        Raises:
            ValueError: the node was added before, or is none of the tree.
        """
        self._fold.put(node, part)

    def sums(self) -> Sums | None:
        """Return the sums of all clients; None: nobody has a reply."""
        found = self._fold.result()
        return found if isinstance(found, Sums) else None

    def zeros(self) -> dict[str, Accumulator]:
        """Return the accumulators of no reply, by the name of their reduction."""
        return {name: reduction.zero(self._spool) for name, reduction in self._reductions.items()}

    def _join(self, sums: Sums | Reply | None, part: Sums | Reply) -> Sums:
        one = sums.of if isinstance(sums, Sums) else None
        if isinstance(part, Reply):
            return Sums(self._added(one, part))
        if one is None:
            return part.own()
        return Sums({name: reduction.merge(one[name], part.of[name]) for name, reduction in self._reductions.items()})

    def _added(self, sums: Mapping[str, Accumulator] | None, reply: Reply) -> dict[str, Accumulator]:
        before, request = self.zeros() if sums is None else sums, self._sent_to(reply.client)
        reply = reply if self._copies else reply.own()
        return {name: reduction.add(before[name], reply, request) for name, reduction in self._reductions.items()}


def _kept(part: Sums | Reply) -> Sums | Reply:
    return part.own()


def _copied(part: Any) -> Any:
    if isinstance(part, dict):
        return {name: _copied(inner) for name, inner in part.items()}
    return part.clone() if isinstance(part, torch.Tensor) else part


class Reducer:
    """Reduces replies as they arrive; no order of arrival changes a bit, see ``contract.fold``.

    Memory holds a few sums, and the replies that came before their turn.

    Args:
        ask: the ask, which says how its replies are reduced.
        spool: stores the replies that must stay single.
        sent_to: returns the request that a client was sent; by default what the ask says, before any rounding.

    Raises:
        ConfigError: the ask declares no reductions, or one does not fit the expected replies.
    """

    def __init__(self, ask: Ask, setting: Setting, spool: Spool, sent_to: Callable[[int], Sent] | None = None) -> None:
        if ask.reduce is None:
            raise ConfigError(
                f"the ask for {ask.phase!r} does not say what becomes of the replies: declare it, for example "
                "Ask(..., reduce={'mean': Mean()}); docs/migration.md has more"
            )
        for name, reduction in ask.reduce.items():
            if not isinstance(reduction, Reduction):
                raise ConfigError(
                    f"the ask for {ask.phase!r}: reduce[{name!r}] is {reduction!r}, and no reduction; make one"
                )
            reduction.check(ask.expects, ask.clients)
        self.ask = ask
        self.reductions = ask.reduce
        self._left = {client: place for place, client in enumerate(ask.clients)}
        self._folding = Folding(ask.reduce, len(ask.clients), spool, sent_to or partial(_sent, ask, setting))
        self._answers: dict[int, Answer] = {}

    @property
    def waiting(self) -> int:
        """Return how many replies or sums are held that came before their turn."""
        return self._folding.waiting

    def add(self, reply: Reply) -> None:
        """Reduce a reply; replies may come in any order.

        Raises:
            EngineError: its client has answered already, or was not asked.
        """
        self._folding.put(Node(0, self._take(reply.client)), reply)
        self._answers[reply.client] = reply.rows, dict(reply.scalars)

    def skip(self, client: int) -> None:
        """Stop waiting for a client that failed or was refused.

        Raises:
            EngineError: it has answered already, or was not asked.
        """
        self._folding.put(Node(0, self._take(client)), None)

    def merge(self, node: Node, sums: Sums | None, answers: Mapping[int, Answer]) -> None:
        """Add the sums of a node's clients, which were reduced elsewhere; None: none of them has a reply.

        Args:
            node: the node; see ``contract.fold``.
            sums: of those clients of the node that answered.
            answers: the rows and scalars of those that answered; the others are left out.

        Raises:
            EngineError: one of the node's clients has answered already.
        """
        for client in self.ask.clients[node.first : node.first + node.most]:
            self._take(client)
        self._folding.put(node, sums)
        self._answers.update(answers)

    def finish(self, state: State) -> Reduced:
        """Return the results of all reductions; clients that have not answered by now are left out."""
        for client in list(self._left):
            self.skip(client)
        sums = self._folding.sums()
        total = self._folding.zeros() if sums is None else sums.of
        results = {name: reduction.finish(total[name], state) for name, reduction in self.reductions.items()}
        answered = [client for client in self.ask.clients if client in self._answers]
        rows = {client: self._answers[client][0] for client in answered}
        return Reduced(self.ask, results, rows, {client: self._answers[client][1] for client in answered})

    def _take(self, client: int) -> int:
        place = self._left.pop(client, None)
        if place is None:
            raise EngineError(f"client {client} has answered {self.ask.phase!r} already, or was not asked")
        return place


def _sent(ask: Ask, setting: Setting, client: int) -> Sent:
    return Sent(setting, partial(ask.request, client))


def reduce(ask: Ask, state: State, replies: Iterable[tuple[int, Message]], spool: Spool | None = None) -> Reduced:
    """Reduce replies that are all at hand: for tests, and for callers that carry messages themselves.

    A client's rows are the scalar ``samples`` of its reply. If a client was not asked, replies are reduced in the order
    given.

    Args:
        ask: the ask, with its reductions.
        state: the server's state, which some reductions read.
        replies: each client with its reply.
        spool: stores the replies that must stay single; None: a new one, in memory while it is small.
    """
    given = dict(replies)
    if not set(given) <= set(ask.clients):
        ask = replace(ask, clients=tuple(given))
    reducer = Reducer(ask, state.setting, spool or Spool())
    for client, message in given.items():
        rows = int(message.scalars.get("samples", 0))
        reducer.add(Reply(client, rows, message.tensors, message.mask, message.scalars))
    return reducer.finish(state)
