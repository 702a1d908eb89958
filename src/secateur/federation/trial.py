"""The trial before the first round: a client's first steps where its rows lie; what cannot be trained is refused.

A client answers the method's first asks, such as an exploration or a score, and the first training, from a few of
its rows and as their only client. It uses a model of its own, and nothing of it remains: no bit of the run depends on
it, and no byte is carried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from secateur.contract.ask import SERVER, TRAIN, Ask
from secateur.contract.client import Client
from secateur.contract.reducer import reduce
from secateur.contract.state import Setting
from secateur.errors import DataError, EngineError, ModelError, NobodyTrainedError, SecateurError, WireError
from secateur.federation import client as clients
from secateur.federation import gathering
from secateur.federation.client import Participant
from secateur.federation.endings import called
from secateur.federation.gathering import Gatherer
from secateur.federation.quorum import beyond
from secateur.federation.records import listing, short
from secateur.learning import batched, loop, resident
from secateur.learning.evaluate import evaluate
from secateur.learning.task import Data
from secateur.learning.work import Train, Worker, alone
from secateur.streams import global_stream
from secateur.wire.message import Expected, Message, specs_of

_CLIENTS = 3  # of the first cohort that are tried, until one of them can be trained
_EPOCHS = 2  # a step may only show in the next one that it went out of bounds
_ASKS, _ROWS, _SEEN = 6, 8, 64
_ADVICE = (
    "lower training.lr or set training.clip, and look for values in its rows that are missing, infinite or huge, or "
    "not scaled"
)
_REFUSED = "no first step of training can be taken"


@dataclass(frozen=True)
class _Alone(Setting):
    """A setting in which every draw is of one client."""

    only: int = 0

    def drawn(self, count: int, *label: int | str) -> tuple[int, ...]:
        """Return the one client."""
        del count, label
        return (self.only,)


def build(study: str, folder: str, kept: str = "") -> Gatherer:
    """Return what a worker process serves clients with, as ``gathering.build`` does, after a trial.

    Raises:
        NobodyTrainedError: see ``check``.
    """
    gatherer = gathering.build(study, folder, kept)
    check(gatherer.participant, gatherer.participant.setting.cohort(1))
    return gatherer


def check(participant: Participant, cohort: Sequence[int]) -> None:
    """Try the first clients of a cohort that have training rows, until one of them can be trained.

    Raises:
        NobodyTrainedError: none of them can; the text says why.
    """
    reasons: dict[int, str] = {}
    tried = [who for who in cohort[: 2 * _CLIENTS] if participant.shards.count(who, "train")][:_CLIENTS]
    for who in tried:
        try:
            first_steps(participant, who)
        except Exception as broken:  # noqa: BLE001 -- anyone's model and method: what they raise is the reason
            reasons[who] = _worded(broken)
        else:
            return
    if reasons:
        first = next(iter(reasons.values()))
        raise NobodyTrainedError(f"{_REFUSED}, so nothing was begun; {listing(list(reasons))}: {first}")


def said_by_worker(broken: EngineError) -> SecateurError:
    """Return the refusal of a trial in a worker process as the trial itself raised it; any other error as it is."""
    _, refused, rest = str(broken).partition(_REFUSED)
    return NobodyTrainedError(refused + rest) if refused else broken


def first_steps(participant: Participant, who: int) -> None:
    """Let one client answer the first asks of the participant's method, on a few of its rows, for two epochs.

    Raises:
        WireError: a reply has other tensors than the method expects, or its loss or a tensor is not finite.
        Exception: whatever the model, the task or the method raises.
    """
    study = participant.study
    with global_stream(study.seed, "trial", who):
        model = clients.make_model(study, participant.shards)
        setting = _Alone(**{**vars(participant.setting), "only": who})
        data = participant.data(who)
        count = min(_ROWS, study.training.batch_size)
        few = replace(data, x=data.x[:count], y=data.y[:count])
        training = replace(study.training, epochs=_EPOCHS)
        _check_batches(participant, model, few)
        view = Client(who, setting, model, few, training, {}, resident.tensors_of(model))
        seen = replace(data, x=data.x[:_SEEN], y=data.y[:_SEEN])
        before = _loss(model, seen)
        reply = _answer(participant, view)
        if set(reply.tensors) == set(view.initial) and participant.method.trains_weights:
            resident.load(model, reply.tensors)
            after = _loss(model, seen)
            if beyond(after, lambda: before):
                raise WireError(f"its loss has grown from {before:.3g} to {after:.3g} after a step or two: {_ADVICE}")
        evaluate(model, few)


def _check_batches(participant: Participant, model: nn.Module, few: Data) -> None:
    """Refuse batches of one row, and clients with one row, if the model cannot be trained on them."""
    shards, size = participant.shards, participant.study.training.batch_size
    if not loop.normalises(model):
        return
    lone = [k for k in range(shards.clients) if shards.count(k, "train") == 1]
    if size > 1 and not lone:
        return
    try:
        model.train()(few.batch(slice(0, 1))[0])
    except ValueError as broken:  # with several values for each channel, as in images, one row is enough
        if size == 1:
            raise ModelError(
                f"training.batch_size = 1: batch norm cannot be trained on one row ({broken}); set it to 2 or more"
            ) from broken
        raise DataError(
            f"{listing(lone)} {'has' if len(lone) == 1 else 'have'} one training row, and batch norm needs two "
            f"({broken}): take fewer clients (data.clients), another partition, or a model with group norm"
        ) from broken


def _loss(model: nn.Module, rows: Data) -> float:
    """Return the loss of some rows in training, where batch norm needs no statistics of before."""
    with torch.no_grad():
        x, y = rows.batch(slice(None))
        return float(rows.task.loss(model.train()(x), y))


def _answer(participant: Participant, view: Client) -> Message:
    """Return the client's last reply."""
    method = participant.method
    state = method.start(view.setting, view.initial, {})
    if method.refines:
        state, _ = method.refine(state, replace(view, id=SERVER))
    reply = Message({})
    for _ in range(_ASKS):
        planned = called(method.plan, state.round + 1, state, told="")
        if planned is None:
            break
        ask = replace(planned, clients=(view.id,))
        reply = _respond(participant, ask, view)
        _check(ask, reply)
        if ask.phase == TRAIN:
            break
        state = called(method.absorb, ask, state, reduce(ask, state, [(view.id, reply)]), told="")
    return reply


def _respond(participant: Participant, ask: Ask, view: Client) -> Message:
    """Return the client's reply, trained in the way that the study says."""
    tensors, mask = ask.request(view.id)
    request = Message(tensors, mask, ask.message.scalars)
    asked = Ask(ask.phase, ask.round, ask.clients, request, Expected({}))
    compute, replies = participant.study.compute, list[Message]()

    def responds(work: Worker, clock: batched.Clock) -> None:
        del clock
        replies.append(participant.method.respond(asked, replace(view, work=partial(_short, work))))

    if not compute.stacks:
        responds(partial(alone, compute=compute), lambda: 0.0)
        return replies[0]
    (outcome,) = batched.answers([responds], compute)
    if isinstance(outcome, Exception):
        raise outcome
    return replies[0]


def _short(work: Worker, job: Any) -> Any:
    """Train for the few epochs of a trial, on all rows given, whatever the effort that a method asks for."""
    if isinstance(job, Train) and job.effort:
        job = replace(job, effort=replace(job.effort, epochs=min(job.effort.epochs, _EPOCHS), share=1.0))
    return work(job)


def _check(ask: Ask, reply: Message) -> None:
    loss = float(reply.scalars.get("loss", 0.0))
    wild = [n for n, t in reply.tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if wild or not math.isfinite(loss):
        what = f"tensor {wild[0]!r} holds NaN or infinity" if math.isfinite(loss) else f"its loss is {loss}"
        raise WireError(f"{what} after a step or two: {_ADVICE}")
    expects, sent = ask.expects, specs_of(reply.tensors)
    wrong = [name for name in {**expects.tensors, **sent} if sent.get(name) != expects.tensors.get(name)]
    if wrong and not expects.optional:
        name, wanted = wrong[0], expects.tensors.get(wrong[0])
        raise WireError(f"its reply in phase {ask.phase!r}: tensor {name!r} is {sent.get(name)}, {wanted} is expected")


def _worded(broken: Exception) -> str:
    line = short(str(broken))
    if isinstance(broken, IndexError) and "out of range in self" in line:
        line += ": its rows hold a larger number than an embedding of the model has entries; give it more"
    return line if isinstance(broken, SecateurError) else f"{type(broken).__name__}: {line}"
