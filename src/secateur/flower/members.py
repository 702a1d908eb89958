"""The nodes of a federation on Flower: which client each of them is, and who cannot take part."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field

from secateur.federation.records import by_reason, short
from secateur.flower import codes, greeting, keys
from secateur.flower.greeting import Greeting, GreetingError
from secateur.flower.messages import HELLO, LOG, SERVE, About, Grid, Message, pack, reason_of, unpack
from secateur.flower.pulls import Pulls

_GREETING = 15.0  # seconds that an exchange waits for a node that was just asked who it is

Vet = Callable[[Greeting], str | None]
"""A function that returns why a node cannot take part, or None if it can."""


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

    A client belongs to the node that took its place first, for as long as that node is connected; once the federation
    is settled it belongs to that node's key, if it has one (``keys``), for the whole run. Whatever a node says is read
    by ``greeting`` and ``codes``: a wrong form costs that node its place.

    Attributes:
        grid: the grid of nodes.
        clients: the largest number of clients, numbered 0..clients-1.
        vet: why a node cannot take part.
        owners: the keys of clients.
        nodes: the node of each client.
        about: the greeting of each client's node.
        refused: why each connected node that cannot take part cannot.
        schema: the digest of the schema that nodes with tables must hold, and the request that brings it; empty: none.
        states: what clients keep, where bytes that are sent beside the exchanges are noted.
    """

    grid: Grid
    clients: int
    vet: Vet
    owners: keys.Owners = field(default_factory=keys.Owners)
    nodes: dict[int, int] = field(default_factory=dict)
    about: dict[int, Greeting] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    connected: frozenset[int] = frozenset()
    schema: tuple[str, bytes] = ("", b"")
    states: Versions = field(default_factory=Versions)
    _settled: bool = False
    _greeted: set[int] = field(default_factory=set)
    _second: dict[int, int] = field(default_factory=dict)
    _hellos: dict[str, tuple[int, str]] = field(default_factory=dict)
    _taught: dict[str, tuple[int, Greeting]] = field(default_factory=dict)
    _last: float = 0.0

    def __post_init__(self) -> None:
        self._pulls = Pulls(self.grid.pull_messages)

    def look(self) -> None:
        """Update the list of nodes: ask new ones who they are, and read the answers that have come."""
        self.connected = frozenset(self.grid.get_node_ids())
        for client in [c for c, node in self.nodes.items() if node not in self.connected]:
            LOG.warning("client %d: its node %d is no longer connected", client, self.nodes[client])
            self.drop(client)
        self._greeted &= self.connected
        self.refused = {node: why for node, why in self.refused.items() if node in self.connected}
        self._second = {node: client for node, client in self._second.items() if node in self.connected}
        for asked_of in (self._hellos, self._taught):
            for ask in [ask for ask, sent in asked_of.items() if sent[0] not in self.connected]:
                del asked_of[ask]
                self._pulls.give_up(ask)
        for node in sorted(self.connected - self._greeted):
            asked = keys.challenge()
            facts = {"schema": self.schema[0], "challenge": asked}
            (ask,) = self.grid.push_messages([Message(pack(facts), node, HELLO)])
            self._greeted.add(node)
            self._hellos[ask], self._last = (node, asked), time.monotonic()
            self._pulls.add(ask)
        for reply in self._pulls.arrived():
            ask = reply.metadata.reply_to_message_id
            if ask in self._hellos:
                self._enter(*self._hellos.pop(ask), reply)
            elif ask in self._taught:
                self._admit_taught(*self._taught.pop(ask), reply)

    def close(self) -> None:
        """Wait for no greeting any more."""
        self._pulls.close()

    def expects(self) -> bool:
        """Return whether a connected node is still to say who it is."""
        return bool(self._hellos or self._taught or self.connected - self._greeted)

    def _enter(self, node: int, asked: str, reply: Message) -> None:
        try:
            said = _introduced(reply)
        except GreetingError as broken:
            self._refuse(node, f"node {node}", str(broken))
            return
        wrong = self._misplaced(node, asked, said) or self.vet(said)
        if wrong:
            self._refuse(node, f"node {node}", wrong)
            return
        digest, request = self.schema
        if digest and said.holds is False:
            facts: About = {"run": "", "client": said.client, "kept": "", "schema": ""}
            (ask,) = self.grid.push_messages([Message(pack(facts, request), node, SERVE)])
            self._taught[ask], self._last = (node, said), time.monotonic()
            self._pulls.add(ask)
            return
        self._admit(node, said)

    def _admit(self, node: int, said: Greeting) -> None:
        LOG.info("client %d is node %d", said.client, node)
        self.nodes[said.client], self.about[said.client] = node, said
        self.refused.pop(node, None)
        if self._settled:
            self.owners.bind(said.client, said.key)

    def settle(self) -> None:
        """Let the clients that are here belong to the keys of their nodes, and so whoever comes later."""
        self._settled = True
        for client, said in self.about.items():
            self.owners.bind(client, said.key)

    def _admit_taught(self, node: int, said: Greeting, reply: Message) -> None:
        """Admit a node that was sent the schema, unless its table does not fit."""
        facts, payload = ({}, None) if reply.has_error() else unpack(reply.content)
        failed = reason_of(reply) if reply.has_error() else codes.heard(facts)
        wrong = failed or self._taken(node, said)
        if wrong or payload is None:
            self._refuse(node, f"node {node}", wrong or "its reply holds no payload")
            return
        self.states.sent_again[said.client] = len(self.schema[1]), len(payload)
        self._admit(node, said)

    def expects_soon(self) -> bool:
        """Return whether a node was asked a moment ago who it is and may answer yet."""
        return bool(self._hellos or self._taught) and time.monotonic() < self._last + _GREETING

    def teach(self, digest: str, request: bytes) -> None:
        """Send nodes that come from now on a table's schema, before they take part."""
        self.schema = digest, request

    def leave_out(self, client: int, why: str) -> None:
        """Let a client's node take part no more, for a reason, for as long as it is connected."""
        if client in self.nodes:
            self._refuse(self.nodes[client], f"client {client}", why)
        self.drop(client)

    def drop(self, client: int) -> None:
        """Let a client's node take part no more, for as long as it is connected; ask who else claims its number."""
        self.nodes.pop(client, None)
        self.about.pop(client, None)
        self._greeted -= {node for node, claimed in self._second.items() if claimed == client}
        self._second = {node: claimed for node, claimed in self._second.items() if claimed != client}

    def greet_again(self, client: int) -> None:
        """Let a client's node say anew who it is and what it holds."""
        self._greeted.discard(self.nodes.pop(client, -1))  # it keeps its number: nobody else is asked for it
        self.about.pop(client, None)

    def _misplaced(self, node: int, asked: str, said: Greeting) -> str | None:
        """Return why a node is not the client that it says it is."""
        if said.client >= self.clients:
            return f"it says it is client {said.client}; 0 to {self.clients - 1} are expected (partition-id)"
        if not keys.proven(said, asked, node):
            return "it has not shown that its key is its own"
        return self._taken(node, said) or self.owners.wrong(said)

    def _taken(self, node: int, said: Greeting) -> str | None:
        """Return which node has a node's number or key already; None: nobody."""
        twin = next((c for c, other in self.about.items() if said.key and other.key == said.key), None)
        if twin is not None:
            self._second[node] = twin
            return (
                f"two nodes with one key: node {self.nodes[twin]}, which is client {twin}, has it too; give each node "
                "a state folder of its own"
            )
        if said.client in self.nodes:
            self._second[node] = said.client
            return f"it says it is client {said.client}, which node {self.nodes[said.client]} is already (partition-id)"
        return None

    def check(self, vet: Vet) -> None:
        """Use another ``vet`` from now on, and apply it to the nodes that are here already."""
        self.vet = vet
        for client, said in list(self.about.items()):
            wrong = vet(said)
            if wrong:
                self._refuse(self.nodes[client], f"node {self.nodes[client]} (client {client})", wrong)
                self.drop(client)

    def _refuse(self, node: int, named: str, why: str) -> None:
        LOG.error("%s cannot take part: %s", named, short(why))
        self.refused[node] = short(why)

    def why(self) -> str:
        """Return the most frequent reason why nodes were refused, as the end of a sentence; empty: none was."""
        if not self.refused:
            return ""
        entries = [{"client": node, "reason": why} for node, why in self.refused.items()]
        first = by_reason(entries)[0]
        return f": {first['requests']} of {len(entries)} nodes were refused because: {first['reason']}"


def _introduced(reply: Message) -> Greeting:
    """Return the greeting in a node's reply.

    Raises:
        GreetingError: there is none.
    """
    if reply.has_error():
        raise GreetingError(reason_of(reply))
    facts, _ = unpack(reply.content)
    failed = codes.heard(facts)
    if failed:
        raise GreetingError(failed)
    return greeting.read(facts)
