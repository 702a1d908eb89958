"""The client's side: it turns the bytes of a request into those of a reply, and is all that an engine calls."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from safetensors import torch as safetensors
from torch import nn

from secateur.contract.ask import EVALUATE, TRAIN, Ask
from secateur.contract.client import Client
from secateur.contract.guard import Passage
from secateur.contract.state import Setting
from secateur.data.shards import Shape, Shards
from secateur.errors import MaskNotHeldError
from secateur.federation import feedback
from secateur.federation.attackers import Attackers
from secateur.federation.base import Base, Kept
from secateur.federation.feedback import WireMemory
from secateur.federation.intake import MEASURED, SECONDS
from secateur.federation.records import defined
from secateur.learning import resident
from secateur.learning import task as tasks
from secateur.learning.batched import Batched, Clock
from secateur.learning.compute import Compute
from secateur.learning.resident import LocalState
from secateur.learning.task import Data
from secateur.learning.work import Measure, Worker, alone
from secateur.models import build as build_model
from secateur.pruning.discovery import layout
from secateur.pruning.mask import Mask
from secateur.pruning.roles import stored
from secateur.streams import Turn, derive, seed_globals
from secateur.study.study import Study
from secateur.wire.codec import Outgoing, decode, lost, with_scalar
from secateur.wire.head import context_of
from secateur.wire.masks import same
from secateur.wire.message import Expected, Message, Scalar, specs_of
from secateur.wire.settings import Wire
from secateur.wire.written import Written, unwritten

PLAIN = "plain"


def make_model(study: Study, rows: Shards | Shape) -> nn.Module:
    """Return the study's model with its seeded initial weights: theta_0, the same wherever it is made."""
    section = study.model
    return build_model(
        section.name, input_shape=rows.input_shape, outputs=rows.outputs,
        init=section.init, seed=study.seed, options=section.options, tokens=rows.kind == "tokens",
    )  # fmt: skip


def make_setting(study: Study, model: nn.Module, clients: int, inputs: torch.Tensor | None = None) -> Setting:
    """Return the setting of a study's federation; it is the same on the server and on every client."""
    units = layout(model, study.model.structure, inputs)
    held = stored(model)
    specs = specs_of({name: held[name] for name in units.travelling})
    return Setting(study.seed, study.rounds, clients, study.participation, units, specs)


class _Initial(Mapping[str, torch.Tensor]):
    """theta_0, made when it is first read, because most methods never read it and it is as large as the model."""

    def __init__(self, make: Callable[[], dict[str, torch.Tensor]]) -> None:
        self._make = make

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return self._make()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class LackingError(Exception):
    """A client lacks what its request refers to: the mask, or the frozen and constant tensors as well."""

    def __init__(self, *, tensors: bool) -> None:
        super().__init__()
        self.tensors = tensors


@dataclass(frozen=True)
class Answer:
    """A client's answer, before it leaves.

    Attributes:
        received: the request as the client read it.
        written: the payload, in which the seconds are 0.
        state: the client's new state; None: unchanged.
        seconds: how long the client worked.
    """

    received: Message
    written: Written
    state: bytes | None
    seconds: float


class Participant:
    """Serves any client of a study with one resident model; each worker has one participant.

    The global generators of torch, numpy and Python are seeded for each request, by seed, phase, round and client.

    Args:
        study: the study.
        shards: the rows of its clients.
        kept: where frozen and constant tensors that come are kept; None: none but those made here are taken. It may be
            replaced between calls.
        hostile: whether the study's attackers attack, as they do in simulations alone.

    Attributes:
        alone: does the jobs of a client that is served alone; it may be replaced between calls.
    """

    def __init__(self, study: Study, shards: Shards, kept: Kept | None = None, *, hostile: bool = False) -> None:
        self.study = study
        self.kept = kept
        self.shards = shards
        self.method = study.build_method()
        self.guards = [guard for guard in study.build_guards() if guard.leaves]
        self.model = make_model(study, shards)
        self.local = LocalState(self.model)
        self.base = Base(self.model, partial(make_model, study, shards))
        self.initial = _Initial(lambda: resident.tensors_of(make_model(study, shards)))
        self.setting = make_setting(study, self.model, shards.clients, example(shards))
        self.accepts = self.method.accepts(self.setting)
        self.attackers = Attackers.of(study, self.setting) if hostile else Attackers.nobody(study, self.setting)
        self.batched = Batched(study.compute)
        self.alone: Worker = partial(alone, compute=study.compute)
        self._last: tuple[bytes, Mask | None, Message, float] | None = None

    def __call__(self, client: int, request: bytes, state: bytes | None) -> tuple[bytes, bytes | None]:
        """Decode a request, respond and encode; return the reply and the client's new state (None: unchanged)."""
        if self.study.compute.stacks:
            (answer,) = self.together([(client, request, state)])
            if isinstance(answer, Exception):
                raise answer
            return answer
        return self._serve(client, request, state, work=self.alone, clock=time.perf_counter)

    def together(
        self, asked: Sequence[tuple[int, bytes, bytes | None]]
    ) -> Sequence[tuple[bytes, bytes | None] | Exception]:
        """Serve several clients, which train together; an exception stands in the place of its client's answer."""
        return self.batched.answers([partial(self._serve, *one) for one in asked])

    def _serve(
        self, client: int, request: bytes, state: bytes | None, work: Worker, clock: Clock
    ) -> tuple[bytes, bytes | None]:
        try:
            done = self.answer(client, request, state, work, clock)
        except LackingError as lacking:
            return lost(request, tensors=lacking.tensors), None
        # how long the reply took to write is known when it is written
        return with_scalar(done.written.bytes(), SECONDS, done.seconds), done.state

    def answer(
        self, client: int, request: bytes, state: bytes | None, work: Worker, clock: Clock, *, writes: bool = True
    ) -> Answer:
        """Decode a request, respond and encode.

        Args:
            client: the client.
            request: the request.
            state: what the client keeps.
            work: does the jobs of the client's code.
            clock: returns the seconds since some moment.
            writes: whether the reply is written where its size is known without.

        Raises:
            LackingError: the client lacks what the request refers to.
        """
        start = clock()
        kept, memory = WireMemory.split(_read_state(state), self.setting.specs)
        if not self._load_base(client, request, kept.base):
            raise LackingError(tensors=True)
        try:
            message, spared = self._read_any(request, kept, clock)
        except MaskNotHeldError:
            raise LackingError(tensors=False) from None
        scalars = dict(message.scalars)
        phase, round_ = str(scalars.pop("phase")), int(scalars.pop("round"))
        plain = bool(scalars.pop(PLAIN, False))
        trains = phase == TRAIN and not plain
        message = replace(message, scalars=scalars)
        ask = Ask(phase, round_, (client,), message, Expected({}), plain=plain)
        memory, grudge = self.attackers.split(memory)
        rows = self.attackers.rows(client, phase, self.data(client), self.shards.outputs)
        view = Client(
            client, self.setting, self.model, rows, self.study.training, memory, self.initial, work,
            restore=self.local.restore,
        )  # fmt: skip
        seed_globals(self.study.seed, "client", phase, round_, client)
        reply = self._evaluate(view, message) if phase == EVALUATE else self._responded(ask, view, grudge)
        memory = self.attackers.joined(view.memory, grudge)
        seed = derive(self.study.seed, "wire", phase, round_, client)
        kept = kept.after(message.mask, reply.mask)
        if kept.base != self.base.came:
            kept = replace(kept, base=self.base.came)
        sending = Sending(
            self.study.wire, message, reply, kept, context_of(request), seed, trains=trains, writes=writes
        )
        written, kept = sending.encode({SECONDS: 0.0, MEASURED: view.measured})
        after = memory | kept.tensors()
        data = safetensors.save(after) if after else None
        return Answer(message, written, data if data != state else None, spared + clock() - start)

    def _responded(self, ask: Ask, view: Client, grudge: dict[str, torch.Tensor]) -> Message:
        """Return what a client sends: the method's reply past its guards, or what an attacker makes of the reply."""
        reply = self.method.respond(ask, view)
        if view.id in self.attackers.who:
            return self.attackers.altered(ask, reply, grudge)
        passage = Passage(ask.phase, ask.round, view.id, self.setting, self.study.wire)
        for guard in self.guards:
            reply = guard.leaving(reply, ask.message, passage)
        return reply

    def lacks(self, client: int, request: bytes, state: bytes | None) -> bool | None:
        """Return whether a client lacks the frozen and constant tensors that a request names (True), or only the mask.

        None: it lacks neither.
        """
        kept, _ = WireMemory.split(_read_state(state), self.setting.specs)
        if not self._load_base(client, request, kept.base):
            return True
        try:
            self._read_any(request, kept, time.perf_counter)
        except MaskNotHeldError:
            return False
        return None

    def _load_base(self, client: int, request: bytes, noted: str) -> bool:
        """Put back what the client before left in the model, and load the base; return whether the client has it."""
        self.local.restore()
        before = self.base.loaded
        held = self.base.load(client, request, noted, self.kept)
        if self.base.loaded != before:
            self.local = LocalState(self.model)
        return held

    def _read_any(self, request: bytes, kept: WireMemory, clock: Clock) -> tuple[Message, float]:
        """Decode a request that may refer to any of the masks that the client remembers."""
        *others, last = kept.known()
        for held in others:
            with contextlib.suppress(MaskNotHeldError):
                return self._read(request, held, clock)
        return self._read(request, last, clock)

    def _read(self, request: bytes, held: Mask | None, clock: Clock) -> tuple[Message, float]:
        """Decode a request, or reuse the last one if its bytes and the held mask are the same.

        The seconds saved are returned too, because a client alone on its machine would have spent them.
        """
        before, held_before, message, taken = self._last or (None, None, None, 0.0)
        again = before is request and (held is held_before or (held is not None and same(held, held_before)))
        if message is not None and again:
            return message, taken
        begun = clock()
        accepts = replace(self.accepts, known=held, values=self.study.wire.values, holds=frozenset([self.base.loaded]))
        message = decode(request, accepts)
        self._last = request, held, message, clock() - begun
        return message, 0.0

    def data(self, client: int) -> Data:
        """Return the client's training rows."""
        return wrap(self.shards, *self.shards.train(client))

    def _evaluate(self, client: Client, message: Message) -> Message:
        used = self.method.uses(message, client)
        held = wrap(self.shards, *self.shards.test(client.id))
        test = client.score(used, held)
        validation = client.score(used, wrap(self.shards, *self.shards.validation(client.id)))
        weights = [used[name] for name in self.setting.layout.names("weight")]
        zeros = sum(int((w == 0).sum()) for w in weights) / max(1, sum(w.numel() for w in weights))
        scores: dict[str, Scalar] = {
            "samples": test.samples,
            "metric": test.metric if test.samples else 0.0,
            "loss": test.loss if test.samples else 0.0,
            "validation_samples": validation.samples,
            "validation": validation.metric if validation.samples else 0.0,
            "sparsity": zeros,
        }
        for metric in held.task.metrics[1:]:
            scores[metric.name] = test.further.get(metric.name, 0.0)
            scores[defined(metric)] = metric.name in test.further
        return Message({}, None, scores)


def _read_state(state: bytes | None) -> dict[str, torch.Tensor]:
    """Return what a client kept, in the order of names; safetensors returns it in any, and in another each time."""
    return dict(sorted(safetensors.load(state).items())) if state else {}


@dataclass(frozen=True)
class Sending:
    """Encodes a reply by the study's wire settings; trained weights get the residual of earlier replies added.

    Attributes:
        wire: how values travel.
        request: what the reply answers, as the client read it.
        reply: the reply.
        kept: what the client keeps for the wire.
        context: the number that binds the reply to its request.
        seed: of rounding.
        trains: whether the reply has trained weights.
        writes: whether it is written where its size is known without.
    """

    wire: Wire
    request: Message
    reply: Message
    kept: WireMemory
    context: int
    seed: int
    trains: bool
    writes: bool

    def encode(self, costs: Mapping[str, Scalar]) -> tuple[Written, WireMemory]:
        """Return the payload, with the scalars of ``costs``, and the wire memory after it."""
        wanted, sent = self.reply, self.reply
        if self.trains:
            wanted, sent = self._shape()
        sent = replace(sent, scalars={**self.reply.scalars, **costs})
        known = self.request.mask
        template = specs_of(self.request.tensors)
        if not self.writes and (spared := unwritten(sent, template=template, known=known)) is not None:
            return spared, self.kept
        outgoing = Outgoing(
            sent, values=self.wire.values, template=template, context=self.context, seed=self.seed,
            packs=self.wire.packing == "planes",
        )  # fmt: skip
        answer = outgoing.write(known)
        if not self.trains or not self.wire.feedback or not self.wire.has_residual:
            return answer, self.kept
        arrived = decode(answer.bytes(), Expected.of(sent.tensors, mask="optional", known=known))
        return answer, replace(self.kept, residual=feedback.residual(wanted, arrived))

    def _shape(self) -> tuple[Message, Message]:
        """Return the trained weights as a whole message, and the part of it that is sent."""
        reply = self.reply
        if self.wire.replies != "weights":
            reply = feedback.as_update(reply, self.request.tensors)
        if self.wire.feedback and self.wire.has_residual:
            reply = feedback.add(reply, self.kept.residual)
        return reply, feedback.top_k(reply, self.wire.topk) if self.wire.replies == "topk" else reply


def stack_remarks(study: Study, model: nn.Module, rows: Shards | Shape) -> list[str]:
    """Return what is to be said of serving clients in stacks: which layer no stack serves, and what happens instead.

    Raises:
        ConfigError: the study asks for a device that is not here.
        MissingExtraError: greenlet is not installed.
    """
    study.compute.check()
    if not study.compute.stacks:
        return []
    held, tensors = wrap(rows, torch.zeros(2, *rows.input_shape), torch.zeros(2)), resident.tensors_of(model)
    turns = (Turn(study.seed, 0, number) for number in range(2))
    jobs = [Measure(model, tensors, held, study.training, "gradient", turn) for turn in turns]
    remark = Batched(Compute(together=2)).refused(jobs)
    return [remark.replace("on cpu", f"on {study.compute.device}")] if remark else []


def further_scores(task: tasks.Task) -> Mapping[str, type]:
    """Return the scalars of a reply to ``EVALUATE`` for a task's further scores, after the main one.

    Each score has its value, 0 if undefined, and a flag whether it is defined on the client's test rows.
    """
    further = task.metrics[1:]
    return {metric.name: float for metric in further} | {defined(metric): bool for metric in further}


def wrap(rows: Shards | Shape, x: torch.Tensor, y: torch.Tensor) -> Data:
    """Return stored rows together with how they become model inputs."""
    return Data(x, y, rows.kind, rows.scale, tasks.find(rows.task).in_units(rows.target_scale, rows.unit))


def example(rows: Shards | Shape) -> torch.Tensor:
    """Return a batch of one model input of zeros."""
    x, _ = wrap(rows, torch.zeros(1, *rows.input_shape), torch.zeros(1)).batch(slice(0, 1))
    return x
