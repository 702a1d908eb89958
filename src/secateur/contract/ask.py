"""Asks: a request to some clients, and the reductions of their replies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from secateur.contract.reduction import Reduction
from secateur.pruning.mask import Mask, Tensors, apply
from secateur.wire.message import Expected, Message, Spec

SERVER = -1
"""The client number of the server itself, where it computes as a client does; it has random streams of its own."""

TRAIN = "train"
"""The phase in which clients train the weights that they are sent; these come back whole or as updates (``wire``)."""

SCORE = "score"
"""The phase in which clients reply with a statistic of each weight."""

GUARDED = "guarded"
"""The note that counts the weights kept by an allocation's guard alone; it is copied into the records."""

EVALUATE = "evaluate"
"""The phase in which clients score a model on their own test rows and validation rows."""

SCORES: Mapping[str, type] = {
    "samples": int, "metric": float, "loss": float, "validation_samples": int, "validation": float, "sparsity": float,
}  # fmt: skip
"""The scalars of a reply to ``EVALUATE``, with their types.

``samples`` counts test rows, ``metric`` and ``loss`` are measured on them; ``validation_samples`` counts validation
rows, ``validation`` is the metric on them; ``sparsity`` is the share of zeros among the scored model's weights. A score
without rows is 0."""

REPORT: Mapping[str, type] = {"samples": int, "processed": int, "loss": float}
"""The scalars that every reply carries: n_k, rows processed (for MACs) and the last epoch's mean training loss."""


@dataclass(frozen=True)
class Ask:
    """One request to some clients.

    Attributes:
        phase: the kind of work, such as ``train`` or ``explore``; costs are reported by phase.
        round: the round that the request belongs to; 0 before the first.
        clients: the clients to ask, ascending.
        message: what each of them is sent.
        expects: what their replies must look like; any other reply is refused and its sender left out.
        reduce: the reductions of the replies, by names that the method chooses; empty if it wants only scalars. None,
            the default, is refused when the ask is sent.
        slices: a mask for each client, if clients hold different parts of the model: client k is sent the message
            under ``slices[k]`` and answers under it, and ``message`` itself has no mask.
        own: the tensors that client k is sent instead of the message's; clients without an entry are sent the
            message's. The mapping may read them from the archive one by one, so that memory holds one model.
        dense: whether clients train all weights, whatever the mask; their MACs are counted accordingly.
        plain: whether the replies that end the round are something other than trained weights (scores, signs); they
            never travel as updates then.
        in_turn: whether clients are asked one after another, each by an ask of its own. One that fails is passed over
            then, and the run goes on as long as any of them has answered.
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
    in_turn: bool = False

    @property
    def updated(self) -> frozenset[str]:
        """Return the names of the tensors that training changes: float ones that come back in the shape they were sent.

        Those whose values the ask bounds from both sides (``Expected.checks``), such as signs, are not among them.
        """
        sent = self.message.tensors if self.phase == TRAIN else {}
        free = self._free.items()
        return frozenset(name for name, spec in free if name in sent and tuple(sent[name].shape) == spec.shape)

    @property
    def statistics(self) -> frozenset[str]:
        """Return the names of the float tensors that come back besides those: what a client measured of its rows."""
        return frozenset(self._free) - self.updated - self.expects.infinite

    @property
    def _free(self) -> Mapping[str, Spec]:
        """Return the float tensors that come back whose values no check bounds from both sides."""
        bounded = frozenset[str]().union(*(check.bounded for check in self.expects.checks))
        tensors = self.expects.tensors.items()
        return {name: spec for name, spec in tensors if spec.dtype == torch.float32 and name not in bounded}

    def tensors(self, client: int) -> Tensors:
        """Return the tensors that a client is sent, before its slice is applied."""
        return self.own.get(client, self.message.tensors)

    def request(self, client: int) -> tuple[Tensors, Mask | None]:
        """Return the tensors that a client is sent, under its slice, and the mask that it holds then."""
        if self.slices is None:
            return self.tensors(client), self.message.mask
        mask = self.slices[client]
        return apply(self.tensors(client), mask), mask
