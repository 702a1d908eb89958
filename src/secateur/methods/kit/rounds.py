"""The parts of an ordinary round: ask a cohort for trained weights or for a statistic, merge what came."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from secateur.aggregation import Aggregator
from secateur.aggregation.steps import Mean as PlainMean
from secateur.contract.ask import REPORT, SCORE, TRAIN, Ask
from secateur.contract.client import Client, report
from secateur.contract.reducer import Reduced
from secateur.contract.reduction import Mean, Reduction
from secateur.contract.state import State
from secateur.pruning import mask as masks
from secateur.pruning.mask import Mask, Tensors
from secateur.pruning.structure import Role
from secateur.wire.message import Expected, Message

MEAN = "mean"
"""The name under which these asks reduce replies to their mean by rows."""


def score_ask(
    state: State,
    round_: int,
    clients: Iterable[int],
    *roles: Role,
    chosen: Sequence[str] = (),
    reduce: Mapping[str, Reduction] | None = None,
) -> Ask:
    """Return the ask for a statistic of each weight (or of tensors of these roles), at the current model.

    With ``chosen`` it is for these tensors alone, of which each client sends the entries that it chooses, by a mask.
    The replies are not trained weights, so they never travel as updates; their costs stand under ``score``. They are
    reduced to their mean by rows, unless ``reduce`` says otherwise.
    """
    names = chosen or state.setting.layout.names(*(roles or ("weight",)))
    expects = Expected({name: state.setting.specs[name] for name in names}, scalars=REPORT)
    if chosen:
        expects = replace(expects, mask="required", maskable=frozenset(chosen), known=state.mask)
    message = Message(masks.apply(state.weights, state.mask), state.mask)
    return Ask(SCORE, round_, tuple(sorted(clients)), message, expects, reduce or {MEAN: Mean()})


def train_ask(
    state: State,
    round_: int,
    mask: Mask | None,
    *,
    votes: Iterable[str] | None = None,
    reduce: Mapping[str, Reduction] | None = None,
) -> Ask:
    """Return the ask of an ordinary training round: weights down, weights up.

    Args:
        state: the server's state.
        round_: t.
        mask: what the cohort trains under; sent along, and not sent back.
        votes: names of the tensors that clients send a mask of their own for, None if they keep this one.
        reduce: what becomes of the replies; None: their mean by rows.
    """
    held: Literal["same", "none"] = "same" if votes is None and mask is not None else "none"
    expects = Expected(
        state.setting.specs,
        mask="required" if votes is not None else held,
        maskable=frozenset(votes) if votes is not None else None,
        known=mask,
        within=mask is not None,
        scalars=REPORT,
    )
    message = Message(masks.apply(state.weights, mask), mask)
    return Ask(TRAIN, round_, state.setting.cohort(round_), message, expects, reduce or {MEAN: Mean()})


def plain_ask(
    state: State, message: Message, expects: Expected, reduce: Mapping[str, Reduction], *, dense: bool = False
) -> Ask | None:
    """Return the ask of a round in which scores, signs or the like travel and no weights; None after the last."""
    round_ = state.round + 1
    if round_ > state.setting.rounds:
        return None
    cohort = state.setting.cohort(round_)
    return Ask(TRAIN, round_, cohort, message, expects, reduce, dense=dense, plain=True)


def train_reply(ask: Ask, client: Client) -> Message:
    """Return the reply of an ordinary training round: trained under the mask that was sent."""
    weights, done = client.train(ask.message.tensors, ask.message.mask, round_=ask.round)
    return Message(weights, ask.message.mask, report(done))


def merged(state: State, reduced: Reduced, aggregator: Aggregator | None = None) -> State:
    """Return the state after a round whose replies were reduced to a mean; see ``stepped``."""
    return stepped(state, reduced.ask, reduced[MEAN], aggregator)


def stepped(state: State, ask: Ask, mean: Tensors, aggregator: Aggregator | None = None) -> State:
    """Return the state after one step of an aggregator (None: the mean itself) from the mean of a round.

    Buffers (running statistics) take the plain mean. Without any reply only the round goes on.
    """
    if not mean:
        return replace(state, round=ask.round, mask=ask.message.mask)
    buffers = set(state.setting.layout.names("buffer"))
    trained = {name: tensor for name, tensor in mean.items() if name not in buffers}
    after, memory = (aggregator or PlainMean()).step(state.weights, trained, mask=ask.message.mask, memory=state.memory)
    weights = {name: mean[name] if name in buffers else after[name] for name in mean}
    return replace(state, round=ask.round, weights=weights, mask=ask.message.mask, memory=memory)
