"""The Flower engine carries requests and replies through a Flower Grid."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence

from secateur.bandwidth import Bandwidth
from secateur.engines import Closing, Failure
from secateur.errors import EngineError
from secateur.flower import codes
from secateur.flower.keys import Owners
from secateur.flower.members import Members, Versions
from secateur.flower.messages import LOG, SERVE, Grid, Message, pack, reason_of, unpack
from secateur.flower.pace import Pace
from secateur.flower.pulls import Pulls

_PULL_EVERY, _LOOK_EVERY = 0.2, 2.0
_LONGEST_NAME = 64  # of what a client keeps; it is stored and sent back
_NAME = re.compile(rf"[0-9A-Za-z]{{0,{_LONGEST_NAME}}}")


class FlowerEngine(Closing):
    """The engine that carries requests to ClientApps; see ``Engine``.

    Args:
        grid: the ServerApp's grid.
        clients: the largest number of clients.
        run: the name of the run, under which nodes find the states that they keep of it.
        wait: seconds to wait for nodes at the start, and whenever no client of a cohort is connected.
        owners: the keys of clients; None: none is known yet, and they are kept in memory.
        links: what is known of the clients' links, by which it is said whose cannot keep a deadline.
    """

    def __init__(
        self, grid: Grid, *, clients: int, run: str, wait: float = 120.0, owners: Owners | None = None,
        links: Bandwidth | None = None,
    ) -> None:  # fmt: skip
        self.grid = grid
        self.run = run
        self.wait = wait
        self.pace = Pace(links, clients)
        self.states = Versions()
        self.members = Members(grid, clients, lambda _said: None, owners or Owners(), states=self.states)

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
            # who is refused must not keep the others from being waited for
            refused = len(self.members.refused) >= len(wanted) and not self.members.expects()
            if refused and not self.members.nodes:
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

    def hear(self) -> None:
        """Wait for nodes that are still to say who they are, if a client is missing, at most ``wait`` seconds."""
        members, end = self.members, time.monotonic() + self.wait
        while len(members.nodes) < members.clients and members.expects() and time.monotonic() < end:
            members.look()
            time.sleep(_PULL_EVERY)

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
        """Wait for no greeting any more; the grid belongs to its ServerApp."""
        self.members.close()


class _Exchange:
    """One exchange: its messages on their way, and its deadline."""

    def __init__(self, engine: FlowerEngine, pulls: Pulls, deadline: float | None) -> None:
        self.engine = engine
        self.pulls = pulls
        self.members = engine.members
        self.deadline = deadline
        self.end = None if deadline is None else time.monotonic() + deadline
        self.waiting: dict[str, tuple[int, int]] = {}
        self.sizes: dict[int, int] = {}
        self.gone: set[str] = set()
        self.late: dict[int, bytes] = {}

    def play(self, requests: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes | Failure]]:
        self.members.look()
        if not self.members.nodes:
            self.engine.meet(self.engine.clients())
        for client, request in requests:
            self.sizes[client] = len(request)
            if not self._send(client, request):
                self.late[client] = request
        for remark in self.engine.pace.remarks(self.sizes, self.deadline) if self.deadline is not None else ():
            LOG.warning("%s", remark)
        yield from self._catch_up()
        yield from self._collect()

    def _send(self, client: int, request: bytes) -> bool:
        """Send a request, if there is a node of its client."""
        node = self.members.nodes.get(client)
        if node is None:
            return False
        about = {"run": self.engine.run, "client": client, "kept": self.engine.states.held.get(client, "")}
        about["schema"] = self.members.schema[0]
        content = pack(about, request, self.engine.pace.part(client))
        (ask,) = self.engine.grid.push_messages([Message(content, node, SERVE)])
        self.waiting[ask] = client, node
        self.pulls.add(ask)
        return True

    def _catch_up(self) -> Iterator[tuple[int, Failure]]:
        """Send the requests whose nodes have come by now; without a node that may still come, the others fail."""
        self.late = {client: request for client, request in self.late.items() if not self._send(client, request)}
        if self.late and not self.members.expects_soon():
            missing, self.late = list(self.late), {}
            yield from ((k, Failure(k, "no node of this client is connected", sent=False)) for k in missing)

    def _collect(self) -> Iterator[tuple[int, bytes | Failure]]:
        look = time.monotonic() + _LOOK_EVERY
        while self.waiting or self.late:
            yield from self._pull(_PULL_EVERY)
            now = time.monotonic()
            if self.end is not None and now >= self.end:
                reason = f"no reply within {self.deadline:g} s"
                for client, _ in self.waiting.values():
                    self.engine.pace.missed(client, self.sizes[client])
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
        if about.get("lacks") is True:
            self.members.greet_again(client)
            return Failure(client, "it no longer had the schema of its table, and is sent it again")
        failed = codes.heard(about)
        if failed or payload is None:
            return Failure(client, failed or "its reply holds no payload")
        kept = about.get("kept", "")
        if not isinstance(kept, str) or not _NAME.fullmatch(kept):
            return Failure(client, f"the name of its state is not one of at most {_LONGEST_NAME} letters and digits")
        if about.get("lost") is True:
            LOG.warning("client %d no longer has what it kept; it went on without", client)
            self.engine.states.missed.append(client)
        if kept:
            self.engine.states.held[client] = kept
        self.engine.pace.answered(client, self.sizes[client], len(payload))
        return payload

    def _gone(self) -> Iterator[tuple[int, bytes | Failure]]:
        """Yield those whose node was gone at the last look already, so that a reply that it left behind could come."""
        gone = {ask for ask, (_, node) in self.waiting.items() if node not in self.members.connected}
        for ask in gone & self.gone:
            client, _ = self.waiting.pop(ask)
            self.pulls.give_up(ask)
            yield client, Failure(client, "its node left the federation before it answered")
        self.gone = gone
