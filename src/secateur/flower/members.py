"""The nodes of a federation on Flower: which client each of them is, and who cannot take part."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field

from secateur.federation.records import by_reason
from secateur.flower.messages import HELLO, LOG, SERVE, About, Grid, Message, pack, reason_of, unpack
from secateur.flower.pulls import Pulls

_GREETING = 15.0  # seconds that an exchange waits for a node that was just asked who it is


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
    _taught: dict[str, tuple[int, About]] = field(default_factory=dict)
    _last: float = 0.0

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
