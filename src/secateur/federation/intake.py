"""The intake of replies: each is read, checked, restored and guarded before anything is made of it.

It runs on the server for replies that were carried there, and in a worker for those that are reduced where they are
made; both give the same reply, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from secateur.contract.ask import EVALUATE, TRAIN, Ask
from secateur.contract.checks import Range
from secateur.contract.guard import Guard, Passage
from secateur.contract.reduction import Reduction
from secateur.contract.reply import Reply, Sent
from secateur.contract.state import Setting
from secateur.errors import ConfigError, NotFiniteError, WireError
from secateur.federation import feedback
from secateur.streams import stream
from secateur.wire.codec import read_back
from secateur.wire.message import Expected, Masks, Message, Scalar, Tensors
from secateur.wire.settings import Wire
from secateur.wire.values import LARGEST
from secateur.wire.written import Written

SECONDS = "seconds"
MEASURED = "measured"
COST_SCALARS: Mapping[str, type] = {SECONDS: float, MEASURED: int}
"""The scalars that every reply carries besides those of its method: the seconds that the client worked, from the
request to the last byte of the reply; and the number of processed rows for which it took gradients of all weights.
"""

_MOST = 2**40  # of what is counted
_COUNTED = dict.fromkeys(("processed", *COST_SCALARS), (0, _MOST))
_CLAIMS = ("samples", "validation_samples")
_LARGEST = LARGEST["fp32"]  # of other scalars: what single precision can say, so that sums of them stay finite
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
        updated: the names of the tensors that training changes.
        statistics: the names of those that clients measure.
        medians: what a guard that compares clients is told of the cohort before; None: it does not know what it needs,
            so that replies stay single until all are measured.
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
    updated: frozenset[str] = frozenset()
    medians: Mapping[str, float] | None = field(default_factory=dict)
    statistics: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, ask: Ask, wire: Wire, bounds: Bounds, seed: int, *, guards: Sequence[Guard] = (),
        medians: Mapping[str, float] | None = None,
    ) -> Job:  # fmt: skip
        """Return the job of an ask.

        Args:
            ask: the ask.
            wire: how values travel.
            bounds: least and most of scalars, by name.
            seed: of the study.
            guards: those that replies pass.
            medians: of what a guard measured of the cohort before, by name.

        Raises:
            ConfigError: the wire settings do not go with what the ask expects.
        """
        trains = ask.phase == TRAIN and not ask.plain
        scalars = {**(ask.expects.scalars or {}), **COST_SCALARS}
        expects = replace(ask.expects, scalars=scalars, values=wire.values, known=None)
        if trains and wire.replies == "topk":
            if expects.mask in {"optional", "required"}:
                raise ConfigError("wire.replies = topk: this method's clients send masks of their own; use updates")
            if any(reduction.whole for reduction in (ask.reduce or {}).values()):
                raise ConfigError(
                    "wire.replies = topk: what does not come would be a vote for no change in a rule that compares "
                    "clients' updates; use updates, or aggregator = clip"
                )
            floats = frozenset(n for n, spec in expects.tensors.items() if spec.dtype == torch.float32)
            expects = replace(expects, mask="required", maskable=floats, within=expects.mask == "same")
        known = ask.expects.known is not None or ask.slices is not None
        believed = min([guard.most_rows for guard in guards], default=_MOST)
        rows = dict.fromkeys(_CLAIMS, (0, believed if ask.phase == EVALUATE else _MOST))
        reduce, bounds = ask.reduce or {}, {**_COUNTED, **rows, **ask.expects.ranges, **bounds}
        same = ask.expects.mask == "same"
        written = _written(ask, wire, seed)
        medians = medians or {}
        wanted = frozenset[str]().union(*(guard.wants(ask) for guard in guards if ask.phase != EVALUATE))
        return cls(
            ask.phase, ask.round, expects, known, same, trains, bounds, reduce, len(ask.clients), written=written,
            updated=ask.updated, medians=medians if wanted <= medians.keys() else None, statistics=ask.statistics,
        )  # fmt: skip

    @property
    def sums(self) -> bool:
        """Return whether sums of replies are all that is needed of them."""
        return self.medians is not None and all(reduction.linear for reduction in self.reduce.values())


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
        for check in self.job.expects.checks:
            if isinstance(check, Range) and self.job.trains and self.wire.has_residual:
                message = check.nearest(message)
            if wrong := check.wrong(message, known):
                raise WireError(wrong)
        rows = int(message.scalars.get("samples", 0))
        reply = Reply(client, rows, message.tensors, message.mask, message.scalars)
        if self.job.phase == EVALUATE:
            return reply
        first, last = self._order()
        return self._guarded(reply, sent, [*first, *last[: 1 if self.job.medians is None else None]])

    def judged(self, reply: Reply, sent: Sent, medians: Mapping[str, float]) -> Reply:
        """Return what counts of a reply that waited for the medians of its cohort.

        Raises:
            WireError: the reply is refused; the text says why.
        """
        return self._guarded(reply, sent, self._order()[1], medians)

    def _order(self) -> tuple[list[Guard], list[Guard]]:
        """Return the guards that a reply passes before it is compared with others, and that which does and the rest."""
        order = list(reversed(self.guards))
        place = next((place for place, guard in enumerate(order) if guard.compares), len(order))
        return order[:place], order[place:]

    def _guarded(
        self, reply: Reply, sent: Sent, guards: Sequence[Guard], medians: Mapping[str, float] | None = None
    ) -> Reply:
        """Return what some guards let the server count of a reply."""
        job, tensors = self.job, reply.tensors
        medians = job.medians if medians is None else medians
        here = job.phase, job.round, reply.client, self.setting, self.wire, job.updated
        passage = Passage(*here, medians, job.statistics)
        for guard in guards:
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
            raise NotFiniteError(f"tensor {name!r}: what the guards made of it holds NaN or infinity")


def _sane(scalars: Mapping[str, Scalar], bounds: Bounds) -> None:
    for name, value in scalars.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise NotFiniteError(f"scalar {name!r} is {value}; a finite number is expected")
        if not isinstance(value, str | bool):
            least, most = bounds.get(name, (-_LARGEST, _LARGEST))
            if not least <= value <= most:
                raise WireError(f"scalar {name!r} is {value}; {least} to {most} is expected")
