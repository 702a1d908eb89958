"""A guard outside the package: doubles at the client what it halves at the server."""

from dataclasses import dataclass, replace

from secateur.contract.guard import Guard

CALLS = []
SENT = {"leaving": {}, "arriving": {}}


def note(side, sent, passage):
    CALLS.append(side)
    bits = {n: t.numpy().tobytes() for n, t in sent.tensors.items()}
    kept = None if sent.mask is None else {n: m.tolist() for n, m in sent.mask.items()}
    SENT[side][passage.phase, passage.round, passage.client] = bits, kept


@dataclass(frozen=True)
class Theirs(Guard):
    """Multiply by ``factor``, and by ``back`` on arrival (0: divide by the factor); ``secret``: sums alone."""

    factor: float = 2.0
    back: float = 0.0
    secret: bool = False

    @property
    def sums_only(self):
        return self.secret

    def leaving(self, message, sent, passage):
        note("leaving", sent, passage)
        return replace(message, tensors={n: t * self.factor for n, t in message.tensors.items()})

    def arriving(self, reply, sent, passage):
        note("arriving", sent, passage)
        return replace(reply, tensors={n: t * (self.back or 1 / self.factor) for n, t in reply.tensors.items()})
