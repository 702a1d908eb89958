"""The intake of replies: each is read, checked, restored and guarded before anything is made of it.

It runs on the server for replies that were carried there, and in a worker for those that are reduced where they are
made; both give the same reply, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from secateur.contract.ask import EVALUATE, TRAIN, Ask
from secateur.contract.guard import Guard, Passage
from secateur.contract.reduction import Reduction
from secateur.contract.reply import Reply, Sent
from secateur.contract.state import Setting
from secateur.errors import ConfigError, WireError
from secateur.federation import feedback
from secateur.streams import stream
from secateur.wire.codec import read_back
from secateur.wire.message import Expected, Masks, Message, Scalar, Tensors
from secateur.wire.settings import Wire
from secateur.wire.written import Written

SECONDS = "seconds"
MEASURED = "measured"
COST_SCALARS: Mapping[str, type] = {SECONDS: float, MEASURED: int}
"""The scalars that every reply carries besides those of its method: the seconds that the client worked, from the
request to the last byte of the reply; and the number of processed rows for which it took gradients of all weights.
"""

_MOST_SAMPLES = 2**40
_COUNTED = dict.fromkeys(("samples", "processed", "validation_samples", *COST_SCALARS), (0, _MOST_SAMPLES))
Bounds = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Job:
    """What becomes of the replies to an ask, for whoever reads them.

    Attributes:
        phase, round: those of the ask.
        expects: what replies must look like.
        known: whether a reply may refer to the mask that its request came with.
        same: whether the ask expects exactly that mask.
        trains: whether replies are trained weights, which travel as ``wire.replies`` says.
        bounds: least and most of scalars, by name.
        reduce: the reductions of the replies, by name.
        total: the number of clients in the ask.
        alone: whether sums are made of a single client's reply too, for a relay, which cannot read requests.
        written: the clients whose replies are written; None: all of them.
    """

    phase: str
    round: int
    expects: Expected
    known: bool
    same: bool
    trains: bool
    bounds: Bounds
    reduce: Mapping[str, Reduction]
    total: int
    alone: bool = False
    written: frozenset[int] | None = None

    @classmethod
    def of(cls, ask: Ask, wire: Wire, bounds: Bounds, seed: int) -> Job:
        """Return the job of an ask.

        Args:
            ask: the ask.
            wire: how values travel.
            bounds: least and most of scalars, by name.
            seed: of the study.

        Raises:
            ConfigError: the wire settings do not go with what the ask expects.
        """
        trains = ask.phase == TRAIN and not ask.plain
        scalars = {**(ask.expects.scalars or {}), **COST_SCALARS}
        expects = replace(ask.expects, scalars=scalars, values=wire.values, known=None)
        if trains and wire.replies == "topk":
            if expects.mask in {"optional", "required"}:
                raise ConfigError("wire.replies = topk: this method's clients send masks of their own; use updates")
            floats = frozenset(n for n, spec in expects.tensors.items() if spec.dtype == torch.float32)
            expects = replace(expects, mask="required", maskable=floats, within=expects.mask == "same")
        known = ask.expects.known is not None or ask.slices is not None
        reduce, bounds = ask.reduce or {}, {**_COUNTED, **bounds}
        same = ask.expects.mask == "same"
        written = _written(ask, wire, seed)
        return cls(
            ask.phase, ask.round, expects, known, same, trains, bounds, reduce, len(ask.clients), written=written
        )

    @property
    def sums(self) -> bool:
        """Return whether sums of replies are all that is needed of them."""
        return all(reduction.linear for reduction in self.reduce.values())


def _written(ask: Ask, wire: Wire, seed: int) -> frozenset[int] | None:
    """Return the clients whose replies are written; None: all of them."""
    if wire.count == "encoded" or not ask.clients:
        return None
    if wire.count == "computed":
        return frozenset()
    order = torch.randperm(len(ask.clients), generator=stream(seed, "sampled", ask.phase, ask.round)).tolist()
    return frozenset(ask.clients[place] for place in order[: max(1, round(wire.sample * len(order)))])


@dataclass(frozen=True)
class Intake:
    """The intake of the replies to one ask.

    Attributes:
        job: what becomes of the replies.
        wire: how values travel.
        setting: the federation.
        guards: those that the replies pass.
    """

    job: Job
    wire: Wire
    setting: Setting
    guards: Sequence[Guard]

    def read(
        self, client: int, payload: bytes | Written, sent: Sent, *, known: Masks | None, context: int,
        base: Callable[[], Tensors],
    ) -> Reply:  # fmt: skip
        """Return the reply that counts.

        Args:
            client: the sender.
            payload: the reply as it came, or as it was written here.
            sent: the request.
            known: the mask that the request came with.
            context: the number that binds the reply to its request.
            base: returns the weights that the client read in the request.

        Raises:
            WireError: the reply is refused; the text says why.
        """
        expects = replace(self.job.expects, known=known if self.job.known else None, context=context)
        message = read_back(payload, expects)
        _sane(message.scalars, self.job.bounds)
        message = self._restored(message, base, known)
        rows = int(message.scalars.get("samples", 0))
        reply = Reply(client, rows, message.tensors, message.mask, message.scalars)
        return self._guarded(reply, sent) if self.guards and self.job.phase != EVALUATE else reply

    def _guarded(self, reply: Reply, sent: Sent) -> Reply:
        """Return what the guards let the server count of a reply."""
        tensors = reply.tensors
        passage = Passage(self.job.phase, self.job.round, reply.client, self.setting, self.wire)
        for guard in reversed(self.guards):
            reply = guard.arriving(reply, sent, passage)
            if not isinstance(reply, Reply):
                raise ConfigError(f"guard {type(guard).__name__}: arriving returned {reply!r}, and no reply")
        if reply.tensors is not tensors:
            _finite(reply.tensors)
        return reply

    def _restored(self, message: Message, base: Callable[[], Tensors], known: Masks | None) -> Message:
        """Return the weights that a reply to ``base`` stands for."""
        if not self.job.trains or self.wire.replies == "weights":
            return message
        if self.wire.replies == "topk":
            message = replace(message, mask=known if self.job.same else None)
        return feedback.from_update(message, base())


def _finite(tensors: Tensors) -> None:
    """Refuse what guards made of a reply if it is not finite; decoding has refused the reply itself otherwise."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise WireError(f"tensor {name!r}: what the guards made of it holds NaN or infinity")


def _sane(scalars: Mapping[str, Scalar], bounds: Bounds) -> None:
    for name, value in scalars.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise WireError(f"scalar {name!r} is {value}; a finite number is expected")
        if name in bounds and not isinstance(value, str):
            least, most = bounds[name]
            if not least <= value <= most:
                raise WireError(f"scalar {name!r} is {value}; {least} to {most} is expected")
