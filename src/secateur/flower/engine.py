"""The Flower engine carries requests and replies through a Flower Grid. Only this module and ``payloads`` import flwr.

There are two types of message. ``query.secateur`` asks a node which client it is; ``train.secateur`` carries a request
or its reply, in every phase. The payload is cut into ``Array``s with a ``stype`` of their own, so that Flower's
strategies refuse it instead of misreading it. They are so small that each arrives within the 30 s that Flower gives a
request, two at a time, on a link of 50 kbit/s; what has arrived is not sent again. A ``ConfigRecord`` goes with it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.engines import Closing, Failure
from secateur.errors import EngineError, MissingExtraError, install
from secateur.federation.records import by_reason
from secateur.flower.payloads import About, pack, payload_of, unpack, with_arrays, with_payload
from secateur.flower.pulls import Pulls

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import Result, Strategy
except ImportError as missing:
    raise MissingExtraError(f"this needs Flower as of 1.41 ({missing}): {install('flower', upgrade=True)}") from missing

__all__ = [
    "LOG", "About", "Array", "ArrayRecord", "ClientApp", "ConfigRecord", "Context", "FlowerEngine", "Grid", "Message",
    "MetricRecord",
    "RecordDict", "Result", "ServerApp", "Strategy", "pack", "payload_of", "unpack", "with_arrays", "with_payload",
]  # fmt: skip


class _Ours(logging.LoggerAdapter[logging.Logger]):
    """Flower's logger, with a prefix that marks our lines."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        return f"secateur: {msg}", kwargs


LOG = _Ours(logging.getLogger("flwr.secateur"))
HELLO, SERVE = "query.secateur", "train.secateur"

_PULL_EVERY, _LOOK_EVERY = 0.2, 2.0
_GREETING = 15.0  # seconds that an exchange waits for a node that was just asked who it is
_LONGEST_NAME = 64  # of what a client keeps; it is stored and sent back


class Versions:
    """The versions of the states that clients keep on their nodes; see ``States``."""

    def __init__(self) -> None:
        self.held: MutableMapping[int, str] = {}
        self.missed: list[int] = []
        self.sent_again: dict[int, tuple[int, int]] = {}

    def restore(self, names: MutableMapping[int, str]) -> None:
        """Set the versions to resume from; a node that has lost its state reports that when it is asked."""
        self.held = names

    def commit(self) -> None:
        """Do nothing: the nodes wrote it when they answered, and its names were noted then."""

    def collect(self) -> None:
        """Do nothing: a node itself drops states that are older than the one it is asked to continue from."""

    def lost(self) -> list[int]:
        """Return the clients that said so, each once."""
        found, self.missed = sorted(set(self.missed)), []
        return found

    def resent(self) -> dict[int, tuple[int, int]]:
        """Return the bytes by which nodes were sent a table's schema again, or later than the others."""
        found, self.sent_again = self.sent_again, {}
        return found


@dataclass
class Members:
    """The nodes of a federation, and which client each of them is.

    A client belongs to the node that took its place first, for as long as that node is connected.

    Attributes:
        grid: the grid of nodes.
        clients: the largest number of clients, numbered 0..clients-1.
        vet: a function that returns why a node cannot take part, or None if it can.
        nodes: the node of each client.
        about: the facts that each client's node gave about itself.
        refused: why each connected node that cannot take part cannot.
        schema: the digest of the schema that nodes with tables must hold, and the request that brings it; empty: none.
        states: what clients keep, where bytes that are sent beside the exchanges are noted.
    """

    grid: Grid
    clients: int
    vet: Callable[[About], str | None]
    nodes: dict[int, int] = field(default_factory=dict)
    about: dict[int, About] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    connected: frozenset[int] = frozenset()
    schema: tuple[str, bytes] = ("", b"")
    states: Versions = field(default_factory=Versions)
    _greeted: set[int] = field(default_factory=set)
    _hellos: dict[str, int] = field(default_factory=dict)
    _last: float = 0.0
    _taught: dict[str, tuple[int, About]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._pulls = Pulls(self.grid.pull_messages)

    def look(self) -> None:
        """Update the list of nodes: ask new ones who they are, and read the answers that have come."""
        self.connected = frozenset(self.grid.get_node_ids())
        for client in [c for c, node in self.nodes.items() if node not in self.connected]:
            LOG.warning("client %d: its node %d is no longer connected", client, self.nodes[client])
            del self.nodes[client], self.about[client]
        self._greeted &= self.connected
        self.refused = {node: why for node, why in self.refused.items() if node in self.connected}
        self._hellos = {ask: node for ask, node in self._hellos.items() if node in self.connected}
        self._taught = {ask: (node, a) for ask, (node, a) in self._taught.items() if node in self.connected}
        for node in sorted(self.connected - self._greeted):
            (ask,) = self.grid.push_messages([Message(pack({"schema": self.schema[0]}), node, HELLO)])
            self._greeted.add(node)
            self._hellos[ask], self._last = node, time.monotonic()
            self._pulls.add(ask)
        for reply in self._pulls.arrived():
            ask = reply.metadata.reply_to_message_id
            if ask in self._hellos:
                self._enter(self._hellos.pop(ask), reply)
            elif ask in self._taught:
                self._admit_taught(*self._taught.pop(ask), reply)

    def _enter(self, node: int, reply: Message) -> None:
        about = {"error": reason_of(reply)} if reply.has_error() else unpack(reply.content)[0]
        client = about.get("client")
        wrong = about.get("error") or self._misplaced(client) or self.vet(about)
        if wrong or not isinstance(client, int):
            self._refuse(node, f"node {node}", str(wrong))
            return
        digest, request = self.schema
        if digest and about.get("holds") is False:
            facts: About = {"run": "", "client": client, "kept": "", "schema": ""}
            (ask,) = self.grid.push_messages([Message(pack(facts, request), node, SERVE)])
            self._taught[ask], self._last = (node, about), time.monotonic()
            self._pulls.add(ask)
            return
        self._admit(node, client, about)

    def _admit(self, node: int, client: int, about: About) -> None:
        LOG.info("client %d is node %d", client, node)
        self.nodes[client], self.about[client] = node, about

    def _admit_taught(self, node: int, about: About, reply: Message) -> None:
        """Admit a node that was sent the schema, unless its table does not fit."""
        client, (said, payload) = int(about["client"]), ({}, None) if reply.has_error() else unpack(reply.content)
        wrong = reason_of(reply) if reply.has_error() else said.get("error") or self._misplaced(client)
        if wrong or payload is None:
            self._refuse(node, f"node {node}", str(wrong or "its reply holds no payload"))
            return
        self.states.sent_again[client] = len(self.schema[1]), len(payload)
        self._admit(node, client, about)

    def expects(self) -> bool:
        """Return whether a node was asked a moment ago who it is and may answer yet."""
        return bool(self._hellos or self._taught) and time.monotonic() < self._last + _GREETING

    def teach(self, digest: str, request: bytes) -> None:
        """Send nodes that come from now on a table's schema, before they take part."""
        self.schema = digest, request

    def leave_out(self, client: int, why: str) -> None:
        """Let a client's node take part no more, for a reason, for as long as it is connected."""
        self._refuse(self.nodes.get(client, -1), f"client {client}", why)
        self.drop(client)

    def drop(self, client: int) -> None:
        """Let a client's node take part no more, for as long as it is connected."""
        self.nodes.pop(client, None)
        self.about.pop(client, None)

    def greet_again(self, client: int) -> None:
        """Let a client's node say anew who it is and what it holds."""
        self._greeted.discard(self.nodes.get(client, -1))
        self.drop(client)

    def _misplaced(self, client: object) -> str | None:
        if not isinstance(client, int) or not 0 <= client < self.clients:
            return f"it says it is client {client!r}; 0 to {self.clients - 1} are expected (partition-id)"
        if client in self.nodes:
            return f"it says it is client {client}, which node {self.nodes[client]} is already (partition-id)"
        return None

    def check(self, vet: Callable[[About], str | None]) -> None:
        """Use another ``vet`` from now on, and apply it to the nodes that are here already."""
        self.vet = vet
        for client, about in list(self.about.items()):
            wrong = vet(about)
            if wrong:
                self._refuse(self.nodes[client], f"node {self.nodes[client]} (client {client})", wrong)
                del self.nodes[client], self.about[client]

    def _refuse(self, node: int, named: str, why: str) -> None:
        LOG.error("%s cannot take part: %s", named, why)
        self.refused[node] = why

    def why(self) -> str:
        """Return the most frequent reason why nodes were refused, as the end of a sentence; empty: none was."""
        if not self.refused:
            return ""
        entries = [{"client": node, "reason": why} for node, why in self.refused.items()]
        first = by_reason(entries)[0]
        return f": {first['requests']} of {len(entries)} nodes were refused because: {first['reason']}"


def reason_of(reply: Message) -> str:
    """Return an error reply's reason in one line."""
    return " ".join(str(reply.error.reason or f"error {reply.error.code}").split())


class FlowerEngine(Closing):
    """The engine that carries requests to ClientApps; see ``Engine``.

    Args:
        grid: the ServerApp's grid.
        clients: the largest number of clients.
        run: the name of the run, under which nodes find the states that they keep of it.
        wait: seconds to wait for nodes at the start, and whenever no client of a cohort is connected.
    """

    def __init__(self, grid: Grid, *, clients: int, run: str, wait: float = 120.0) -> None:
        self.grid = grid
        self.run = run
        self.wait = wait
        self.states = Versions()
        self.members = Members(grid, clients, lambda _about: None, states=self.states)

    def clients(self) -> Sequence[int]:
        """Return 0..K-1, connected or not."""
        return range(self.members.clients)

    def meet(self, enough: Iterable[int]) -> None:
        """Wait for the nodes of these clients, at most ``wait`` seconds.

        Raises:
            EngineError: none of them came.
        """
        wanted, end = set(enough), time.monotonic() + self.wait
        self.members.look()
        while not wanted <= self.members.nodes.keys() and time.monotonic() < end:
            if len(wanted - self.members.nodes.keys()) <= len(self.members.refused):  # nobody else is to come
                break
            time.sleep(_PULL_EVERY)
            self.members.look()
        if not wanted & self.members.nodes.keys():
            why = self.members.why()
            if why:
                raise EngineError(f"no node can take part{why}")
            raise EngineError(
                f"no node was connected within {self.wait:g} s: start SuperNodes with --node-config 'partition-id=0' "
                "and so on, or raise wait"
            )

    def exchange(
        self, requests: Iterable[tuple[int, bytes]], deadline: float | None = None
    ) -> Iterator[tuple[int, bytes | Failure]]:
        """Send each request; see ``Engine.exchange``. A client that is not connected is a ``Failure`` at once."""
        pulls = Pulls(self.grid.pull_messages)
        try:
            yield from _Exchange(self, pulls, deadline).play(requests)
        finally:
            pulls.close()

    def close(self) -> None:
        """Do nothing: the grid belongs to its ServerApp."""


class _Exchange:
    """One exchange: its messages on their way, and its deadline."""

    def __init__(self, engine: FlowerEngine, pulls: Pulls, deadline: float | None) -> None:
        self.engine = engine
        self.pulls = pulls
        self.members = engine.members
        self.deadline = deadline
        self.end = None if deadline is None else time.monotonic() + deadline
        self.waiting: dict[str, tuple[int, int]] = {}
        self.gone: set[str] = set()
        self.late: dict[int, bytes] = {}

    def play(self, requests: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes | Failure]]:
        self.members.look()
        if not self.members.nodes:
            self.engine.meet(self.engine.clients())
        for client, request in requests:
            if not self._send(client, request):
                self.late[client] = request
        yield from self._catch_up()
        yield from self._collect()

    def _send(self, client: int, request: bytes) -> bool:
        """Send a request, if there is a node of its client."""
        node = self.members.nodes.get(client)
        if node is None:
            return False
        about = {"run": self.engine.run, "client": client, "kept": self.engine.states.held.get(client, "")}
        about["schema"] = self.members.schema[0]
        (ask,) = self.engine.grid.push_messages([Message(pack(about, request), node, SERVE)])
        self.waiting[ask] = client, node
        self.pulls.add(ask)
        return True

    def _catch_up(self) -> Iterator[tuple[int, Failure]]:
        """Send the requests whose nodes have come by now; without a node that may still come, the others fail."""
        self.late = {client: request for client, request in self.late.items() if not self._send(client, request)}
        if self.late and not self.members.expects():
            missing, self.late = list(self.late), {}
            yield from ((k, Failure(k, "no node of this client is connected", sent=False)) for k in missing)

    def _collect(self) -> Iterator[tuple[int, bytes | Failure]]:
        look = time.monotonic() + _LOOK_EVERY
        while self.waiting or self.late:
            yield from self._pull(_PULL_EVERY)
            now = time.monotonic()
            if self.end is not None and now >= self.end:
                reason = f"no reply within {self.deadline:g} s"
                yield from ((client, Failure(client, reason)) for client, _ in self.waiting.values())
                yield from ((client, Failure(client, reason, sent=False)) for client in self.late)
                return
            if self.late or now >= look:
                self.members.look()
                yield from self._catch_up()
            if now >= look:
                yield from self._gone()
                look = time.monotonic() + _LOOK_EVERY

    def _pull(self, seconds: float = 0.0) -> Iterator[tuple[int, bytes | Failure]]:
        for reply in self.pulls.arrived(seconds):
            found = self.waiting.pop(reply.metadata.reply_to_message_id, None)
            if found is not None:
                yield found[0], self._accept(found[0], reply)

    def _accept(self, client: int, reply: Message) -> bytes | Failure:
        if reply.has_error():
            return Failure(client, reason_of(reply))
        about, payload = unpack(reply.content)
        if about.get("lacks"):
            self.members.greet_again(client)
            return Failure(client, "it no longer had the schema of its table, and is sent it again")
        if "error" in about or payload is None:
            return Failure(client, str(about.get("error", "its reply holds no payload")))
        if about.get("lost"):
            LOG.warning("client %d no longer has what it kept; it went on without", client)
            self.engine.states.missed.append(client)
        kept = about.get("kept")
        if isinstance(kept, str):
            if len(kept) > _LONGEST_NAME:
                return Failure(client, f"the name of its state has {len(kept)} characters; {_LONGEST_NAME} at most")
            self.engine.states.held[client] = kept
        return payload

    def _gone(self) -> Iterator[tuple[int, bytes | Failure]]:
        """Yield those whose node was gone at the last look already, so that a reply that it left behind could come."""
        gone = {ask for ask, (_, node) in self.waiting.items() if node not in self.members.connected}
        for ask in gone & self.gone:
            client, _ = self.waiting.pop(ask)
            self.pulls.give_up(ask)
            yield client, Failure(client, "its node left the federation before it answered")
        self.gone = gone
