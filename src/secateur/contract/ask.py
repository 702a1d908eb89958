"""A request to some clients, and what becomes of their replies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from secateur.contract.reduction import Reduction
from secateur.pruning.mask import Mask, Tensors
from secateur.wire.message import Expected, Message

SERVER = -1
"""The server's number, where it works as a client does; its draws are its own."""

TRAIN = "train"
"""The phase whose replies are the weights of its message, trained; they may travel as updates (``wire.settings``)."""

SCORE = "score"
"""The phase whose replies are a statistic of each weight."""

GUARDED = "guarded"
"""The note of how many weights stay by an allocation's guard alone; records carry it."""

EVALUATE = "evaluate"
"""The phase in which clients score a model on their own rows, those for a test and those for validation."""

SCORES: Mapping[str, type] = {
    "samples": int, "metric": float, "loss": float, "validation_samples": int, "validation": float, "sparsity": float,
}  # fmt: skip
"""Scalars of a reply to ``EVALUATE``: test rows, metric and loss on them; validation rows, and the metric on them;
the share of zeros among the weights of the scored model. Without rows a score is 0."""

REPORT: Mapping[str, type] = {"samples": int, "processed": int, "loss": float}
"""Scalars that every reply carries: n_k, rows processed (for MACs), last epoch's mean training loss."""


@dataclass(frozen=True)
class Ask:
    """One request to some clients.

    Attributes:
        phase: ``train``, ``explore``, ...; costs are reported by it.
        round: the round it belongs to, 0 before the first.
        clients: whom to ask, ascending.
        message: what they get.
        expects: what their replies must look like; anything else costs the sender its place.
        reduce: what becomes of the replies, by names of the method's own; empty where scalars alone are wanted. None,
            the default, is refused when the ask is sent.
        slices: each client's own mask, where clients hold different parts of the model: client k is sent the message
            under ``slices[k]`` and answers under it. ``message`` itself has no mask then.
        own: the tensors that client k is sent instead of the message's; who is not in it is sent those. It may read
            them from the archive when they are wanted, so that no more than one model is in memory.
        dense: clients train all weights, whatever the mask; their MACs are counted so.
        plain: replies are not trained weights, though they end a round: they never travel as updates.
    """

    phase: str
    round: int
    clients: tuple[int, ...]
    message: Message
    expects: Expected
    reduce: Mapping[str, Reduction] | None = None
    slices: Mapping[int, Mask] | None = None
    own: Mapping[int, Tensors] = field(default_factory=dict)
    dense: bool = False
    plain: bool = False

    def tensors(self, client: int) -> Tensors:
        """Return the tensors that a client is sent, before its slice."""
        return self.own.get(client, self.message.tensors)
