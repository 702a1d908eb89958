"""Reducing the replies to one ask as they arrive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from secateur.contract.ask import Ask
from secateur.contract.reduction import BLOCK, Reduction
from secateur.contract.reply import Reply, Sent
from secateur.contract.spool import Spool
from secateur.contract.state import Setting, State
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


@dataclass
class _Block:
    """A block of an ask's clients: those not reduced yet, replies that came too early, and sums of the others."""

    left: list[int]
    early: dict[int, Reply | None] = field(default_factory=dict)
    sums: dict[str, Accumulator] = field(default_factory=dict)


class Reducer:
    """Reduces replies as they arrive, in blocks of the ask's clients; see ``contract.reduction``.

    Memory holds the replies that came before their turn, and one sum for each block that is not merged yet.

    Args:
        ask: the ask, which says how its replies are reduced.
        setting: the federation.
        spool: stores the replies that must stay single.

    Raises:
        ConfigError: the ask declares no reductions, or one does not fit the expected replies.
    """

    def __init__(self, ask: Ask, setting: Setting, spool: Spool) -> None:
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
        self._setting, self._spool = setting, spool
        self._place = {client: place // BLOCK for place, client in enumerate(ask.clients)}
        self._blocks = {
            start // BLOCK: _Block(list(ask.clients[start : start + BLOCK]))
            for start in range(0, len(ask.clients), BLOCK)
        }
        self._merged = 0
        self._total: dict[str, Accumulator] = self._zeros()
        self._answers: dict[int, tuple[int, Mapping[str, Scalar]]] = {}

    def add(self, reply: Reply) -> None:
        """Reduce a reply; replies may come in any order.

        Raises:
            EngineError: its client has answered already, or was not asked.
        """
        self._settle(reply.client, reply)
        self._answers[reply.client] = reply.rows, dict(reply.scalars)

    def skip(self, client: int) -> None:
        """Stop waiting for a client that failed or was refused."""
        self._settle(client, None)

    def finish(self, state: State) -> Reduced:
        """Return the results of all reductions; clients that have not answered by now are left out."""
        for block in list(self._blocks.values()):
            for client in list(block.left):
                if client in block.left and client not in block.early:
                    self.skip(client)
        results = {name: reduction.finish(self._total[name], state) for name, reduction in self.reductions.items()}
        answered = [client for client in self.ask.clients if client in self._answers]
        rows = {client: self._answers[client][0] for client in answered}
        return Reduced(self.ask, results, rows, {client: self._answers[client][1] for client in answered})

    def _settle(self, client: int, reply: Reply | None) -> None:
        block = self._blocks.get(self._place.get(client, -1))
        if block is None or client not in block.left or client in block.early:
            raise EngineError(f"client {client} has answered {self.ask.phase!r} already, or was not asked")
        block.early[client] = reply
        block.sums = block.sums or self._zeros()
        while block.left and block.left[0] in block.early:
            first = block.early.pop(block.left.pop(0))
            if first is not None:
                request = Sent(self._setting, partial(self.ask.request, first.client))
                for name, reduction in self.reductions.items():
                    block.sums[name] = reduction.add(block.sums[name], first, request)
        while self._merged in self._blocks and not self._blocks[self._merged].left:
            done = self._blocks.pop(self._merged)
            self._merged += 1
            for name, reduction in self.reductions.items():
                self._total[name] = reduction.merge(self._total[name], done.sums[name])

    def _zeros(self) -> dict[str, Accumulator]:
        return {name: reduction.zero(self._spool) for name, reduction in self.reductions.items()}


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
