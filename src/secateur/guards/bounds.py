"""Bounds: finite numbers within what the study's value format can carry, from no more rows than are believed.

A reply beyond them costs its sender the place. They keep a federation alive, not honest: a lie within them counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from secateur.contract.guard import Guard, Passage
from secateur.contract.reply import Reply, Sent
from secateur.errors import WireError, check
from secateur.wire.values import LARGEST


@dataclass(frozen=True)
class Bounds(Guard):
    """Refuses what is out of range.

    Attributes:
        largest: magnitude that a value may have; 0: the largest that ``wire.values`` can carry, so that the server
            can send on what it received.
        rows: how many rows a client may say that it has.
    """

    largest: float = 0.0
    rows: int = 2**24

    def __post_init__(self) -> None:
        check(self.largest >= 0, name="bounds.largest", value=self.largest, must="be 0 or more")
        check(self.rows >= 1, name="bounds.rows", value=self.rows, must="be at least 1")

    def arriving(self, reply: Reply, sent: Sent, passage: Passage) -> Reply:
        """Return the reply, or refuse it."""
        del sent
        if reply.rows > self.rows:
            raise WireError(f"it says that it has {reply.rows} rows; at most {self.rows} are believed (bounds.rows)")
        most = self.largest or LARGEST[passage.wire.values]
        if most >= LARGEST["fp32"]:  # whatever is finite is within, and decoding takes nothing else
            return reply
        for name, tensor in reply.tensors.items():
            if tensor.is_floating_point() and tensor.numel() and not float(tensor.abs().max()) <= most:
                raise WireError(f"tensor {name!r} has values beyond {most:g} (bounds.largest)")
        return reply
