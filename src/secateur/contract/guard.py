"""Guards: checks and changes of clients' messages before they are reduced, at the client or at the server."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
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
        updated: the names of the tensors that training changed, see ``Ask.updated``.
        statistics: the names of those that a client measured, see ``Ask.statistics``.
        medians: for a guard that compares clients, the medians of what it measured of a cohort's replies before, by
            name. None: not known, and the reply is to be measured only.
    """

    phase: str
    round: int
    client: int
    setting: Setting
    wire: Wire
    updated: frozenset[str] = frozenset()
    medians: Mapping[str, float] | None = None
    statistics: frozenset[str] = frozenset()


class Guard:
    """Base of guards: a guard bounds, changes or hides what clients send. Guards are frozen dataclasses, one a file.

    ``leaving`` runs at the client before its reply is encoded, ``arriving`` at the server before the reply is added to
    anything. If a study has several guards, they run in its order at the client and in reverse order at the server.

    Attributes:
        spends: the epsilon of differential privacy that one message costs a client; 0: the guard promises no privacy.
        reveals: what the server still learns of one client, in a few words.
        sums_only: whether the guard works only with linear reductions, because a single guarded reply means nothing.
        compares: whether the guard compares a client with its cohort. Its ``arriving`` writes what it measures of a
            reply to ``Reply.facts``. The medians of these over a cohort's replies come with the next ask, in
            ``Passage.medians``, so that sums stay where they are made. Where a median is not known yet, ``arriving`` is
            called once to measure, and again when all replies of the cohort were measured.
    """

    spends: ClassVar[float] = 0.0
    reveals: ClassVar[str] = "each client's reply"
    sums_only: ClassVar[bool] = False
    compares: ClassVar[bool] = False

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

    def wants(self, ask: Ask) -> frozenset[str]:
        """Return the names of the medians without which the guard cannot judge a reply to an ask; see ``compares``."""
        del ask
        return frozenset()

    @property
    def most_rows(self) -> int:
        """Return the most rows that a client may claim."""
        return 2**40

    def counted(self, rows: Sequence[int]) -> list[int]:
        """Return how many of their rows clients' scores count by, in a mean of them; by default all."""
        return list(rows)

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


def medians(measured: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each fact over the replies of which it was measured; with an even count, of the middle two.

    A median of 0 is no scale, and is left out.

    >>> medians([{"rows": 1.0}, {"rows": 5.0}, {"rows": 2.0, "update": 0.5}])
    {'rows': 2.0, 'update': 0.5}
    """
    found: dict[str, list[float]] = {}
    for facts in measured:
        for name, value in facts.items():
            found.setdefault(name, []).append(value)
    middle = {name: statistics.median(values) for name, values in sorted(found.items())}
    return {name: value for name, value in middle.items() if value > 0}


def check_together(guards: Sequence[Guard]) -> None:
    """Refuse guards that cannot work side by side.

    Raises:
        ConfigError: two of them compare clients, or one compares single replies that another hides.
    """
    comparing = [type(guard).__name__ for guard in guards if guard.compares]
    hiding = [type(guard).__name__ for guard in guards if guard.sums_only]
    if len(comparing) > 1:
        raise ConfigError(f"guards {comparing[0]} and {comparing[1]} compare clients with their cohort: choose one")
    if comparing and hiding:
        raise ConfigError(
            f"guard {comparing[0]} looks at single replies, and guard {hiding[0]} hides them: choose one of the two "
            f"(guards.{comparing[0].lower()}.on = false leaves the first one out)"
        )
