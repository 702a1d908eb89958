"""A guard of one's own: no value leaves a client further than ``largest`` from what it was sent."""

from dataclasses import dataclass, replace
from typing import ClassVar

from secateur.contract.guard import Guard
from secateur.errors import WireError
from secateur.pruning.mask import apply


@dataclass(frozen=True)
class Near(Guard):
    """Clamps a client's change, and refuses the reply of who did not; for sums alone."""

    largest: float = 0.1
    sums_only: ClassVar[bool] = True

    def leaving(self, message, sent, passage):
        moved = {n: (t - sent.tensors[n]).clamp(-self.largest, self.largest) for n, t in message.tensors.items()}
        return replace(message, tensors={n: sent.tensors[n] + change for n, change in moved.items()})

    def arriving(self, reply, sent, passage):
        moved = apply({n: t - sent.tensors[n] for n, t in reply.tensors.items()}, reply.mask)
        for name, change in moved.items():
            if float(change.abs().max()) > self.largest * 1.001:  # what was clamped was rounded on its way
                raise WireError(f"tensor {name!r} moved by more than {self.largest} (own_guard.largest)")
        return reply
