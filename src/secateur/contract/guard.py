"""What stands between a client's message and the sum, on either side of the wire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.contract.ask import Ask
from secateur.contract.reply import Reply, Sent
from secateur.contract.state import Setting
from secateur.errors import ConfigError
from secateur.wire.message import Message
from secateur.wire.settings import Wire


@dataclass(frozen=True)
class Passage:
    """The exchange that a message belongs to.

    Attributes:
        phase, round: of the ask.
        client: who sends the message.
        setting: of the federation.
        wire: how values travel.
    """

    phase: str
    round: int
    client: int
    setting: Setting
    wire: Wire


class Guard:
    """Bounds, changes or hides what clients send; frozen dataclasses, one file each.

    ``leaving`` runs at the client before its reply is encoded, ``arriving`` at the server before the reply is added to
    anything; where a study has several guards, they stand in its order at the client and in the reverse at the server.

    Attributes:
        spends: epsilon of differential privacy that one passage costs a client; 0: the guard promises none.
        reveals: what the server still learns of one client, in a few words.
        sums_only: the guard goes with linear reductions alone, because single replies mean nothing behind it.
    """

    spends: ClassVar[float] = 0.0
    reveals: ClassVar[str] = "each client's reply"
    sums_only: ClassVar[bool] = False

    def check(self, ask: Ask) -> None:
        """Refuse an ask with which the guard does not go; called before anybody is asked.

        Raises:
            ConfigError: the text names the guard and the reduction.
        """
        for name, reduction in (ask.reduce or {}).items():
            if self.sums_only and not reduction.linear:
                raise ConfigError(
                    f"guard {type(self).__name__} goes with sums alone, and phase {ask.phase!r} keeps single replies "
                    f"({name} = {type(reduction).__name__}): choose another guard, or a method that adds replies up"
                )

    def leaving(self, message: Message, sent: Message, passage: Passage) -> Message:
        """Return what a client sends in place of its reply to ``sent``."""
        del sent, passage
        return message

    def arriving(self, reply: Reply, sent: Sent, passage: Passage) -> Reply:
        """Return what the server counts in place of a reply.

        Raises:
            WireError: the reply costs its sender the place; the text says why.
        """
        del sent, passage
        return reply
