"""A reduction of one's own: the largest value of each entry over all clients."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.contract.reduction import Reduction


@dataclass(frozen=True)
class Largest(Reduction):
    """The largest value of each entry; nothing of no reply."""

    linear: ClassVar[bool] = False  # a maximum is no sum
    reveals: ClassVar[str] = "the largest value of each entry"

    def add(self, accumulator, reply, sent):
        return self.merge(accumulator, dict(reply.tensors))

    def merge(self, one, other):
        return {**one, **{n: torch.maximum(one[n], t) if n in one else t for n, t in other.items()}}

    def finish(self, accumulator, state):
        return accumulator
