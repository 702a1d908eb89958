"""Bounds: values must be finite and within the range of the study's value format, and claims of rows below a limit.

A reply beyond the bounds is refused and its sender left out. Bounds keep a federation running; they do not detect a
false reply within them.
"""

from __future__ import annotations

from dataclasses import dataclass

from secateur.contract.guard import Guard, Passage
from secateur.contract.reply import Reply, Sent
from secateur.errors import WireError, check
from secateur.wire.values import LARGEST, beyond


@dataclass(frozen=True)
class Bounds(Guard):
    """Refuses replies with values or claims of rows that are out of range.

    Attributes:
        largest: the largest magnitude of a value; 0: the largest that ``wire.values`` can carry, so that the server can
            send the values on.
        rows: the most rows that a client may claim.
    """

    largest: float = 0.0
    rows: int = 2**24

    def __post_init__(self) -> None:
        check(self.largest >= 0, name="bounds.largest", value=self.largest, must="be 0 or more")
        check(self.rows >= 1, name="bounds.rows", value=self.rows, must="be at least 1")

    @property
    def most_rows(self) -> int:
        """Return ``rows``."""
        return self.rows

    def arriving(self, reply: Reply, sent: Sent, passage: Passage) -> Reply:
        """Return the reply unchanged.

        Raises:
            WireError: a value or the claim of rows is out of bounds.
        """
        del sent
        if reply.rows > self.rows:
            raise WireError(f"it says that it has {reply.rows} rows; at most {self.rows} are believed (bounds.rows)")
        most = self.largest or LARGEST[passage.wire.values]
        if most >= LARGEST["fp32"]:  # whatever is finite is within, and decoding takes nothing else
            return reply
        if (name := beyond(reply.tensors, most)) is not None:
            raise WireError(f"tensor {name!r} has values beyond {most:g} (bounds.largest)")
        return reply
