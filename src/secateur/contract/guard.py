"""Guards: checks and changes of clients' messages before they are reduced, at the client or at the server."""

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
    """The exchange, client and settings of a message that a guard sees.

    Attributes:
        phase, round: those of the ask.
        client: the sender of the message.
        setting: the federation.
        wire: how values travel.
    """

    phase: str
    round: int
    client: int
    setting: Setting
    wire: Wire


class Guard:
    """Base of guards: a guard bounds, changes or hides what clients send. Guards are frozen dataclasses, one a file.

    ``leaving`` runs at the client before its reply is encoded, ``arriving`` at the server before the reply is added to
    anything. If a study has several guards, they run in its order at the client and in reverse order at the server.

    Attributes:
        spends: the epsilon of differential privacy that one message costs a client; 0: the guard promises no privacy.
        reveals: what the server still learns of one client, in a few words.
        sums_only: whether the guard works only with linear reductions, because a single guarded reply means nothing.
    """

    spends: ClassVar[float] = 0.0
    reveals: ClassVar[str] = "each client's reply"
    sums_only: ClassVar[bool] = False

    def check(self, ask: Ask) -> None:
        """Refuse an ask that the guard cannot protect; called before any client is asked.

        Raises:
            ConfigError: a reduction does not fit the guard; the text names both.
        """
        for name, reduction in (ask.reduce or {}).items():
            if self.sums_only and not reduction.linear:
                raise ConfigError(
                    f"guard {type(self).__name__} goes with sums alone, and phase {ask.phase!r} keeps single replies "
                    f"({name} = {type(reduction).__name__}): choose another guard, or a method that adds replies up"
                )

    @property
    def leaves(self) -> bool:
        """Return whether the guard does anything at the client."""
        return type(self).leaving is not Guard.leaving

    def leaving(self, message: Message, sent: Message, passage: Passage) -> Message:
        """Return the message that the client sends instead of ``message``, its reply to ``sent``."""
        del sent, passage
        return message

    def arriving(self, reply: Reply, sent: Sent, passage: Passage) -> Reply:
        """Return the reply that the server reduces instead of ``reply``, which answers ``sent``.

        Raises:
            WireError: the reply is refused and its sender left out; the text says why.
        """
        del sent, passage
        return reply
