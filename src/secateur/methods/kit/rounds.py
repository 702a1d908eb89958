"""The parts of an ordinary round: asks for trained weights or for a statistic, the reply, and the merge."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from secateur.aggregation import Aggregator
from secateur.aggregation.steps import Mean as PlainMean
from secateur.contract.ask import REPORT, SCORE, TRAIN, Ask
from secateur.contract.checks import KeptByTensor, Range
from secateur.contract.client import Client, report
from secateur.contract.reducer import Reduced
from secateur.contract.reduction import Mean, Reduction
from secateur.contract.state import Setting, State
from secateur.errors import ConfigError
from secateur.pruning import mask as masks
from secateur.pruning.mask import Mask, Tensors
from secateur.pruning.structure import Role
from secateur.wire.message import Check, Expected, Message

MEAN = "mean"
"""The name of the reduction, in these asks, to the mean by rows."""


def score_ask(
    state: State,
    round_: int,
    clients: Iterable[int],
    *roles: Role,
    chosen: Sequence[str] = (),
    reduce: Mapping[str, Reduction] | None = None,
    least: float = -math.inf,
    kept: Mapping[str, int] | None = None,
) -> Ask:
    """Return the ask for a statistic of each weight at the current model.

    The replies are not trained weights, so they never travel as updates; their costs are reported as phase ``score``.

    Args:
        state: the server's state.
        round_: the number of completed rounds.
        clients: the clients to ask.
        roles: the roles of the tensors that have a statistic; by default weights alone.
        chosen: names of tensors, instead of roles; each client sends, under a mask, only the entries that it chooses.
        reduce: the reductions of the replies; None: their mean by rows.
        least: the least value of the statistic: 0 for what cannot be negative.
        kept: how many entries of each of the ``chosen`` tensors a client sends; None: any number.
    """
    names = chosen or state.setting.layout.names(*(roles or ("weight",)))
    checks: list[Check] = [Range(frozenset(names), least)] if least > -math.inf else []
    checks += [KeptByTensor(tuple((n, count, count) for n, count in kept.items()))] if kept else []
    specs = {name: state.setting.specs[name] for name in names}
    expects = Expected(specs, scalars=REPORT, checks=tuple(checks))
    if chosen:
        expects = replace(expects, mask="required", maskable=frozenset(chosen), known=state.mask)
    message = Message(masks.apply(state.weights, state.mask), state.mask)
    return Ask(SCORE, round_, tuple(sorted(clients)), message, expects, {MEAN: Mean()} if reduce is None else reduce)


def variances(setting: Setting) -> tuple[Check, ...]:
    """Return what running statistics must be: no variance is negative."""
    names = frozenset(name for name in setting.layout.names("buffer") if name.endswith("running_var"))
    return (Range(names, least=0.0),) if names else ()


def train_ask(
    state: State,
    round_: int,
    mask: Mask | None,
    *,
    votes: Iterable[str] | None = None,
    reduce: Mapping[str, Reduction] | None = None,
) -> Ask:
    """Return the ask of an ordinary training round, in which weights go down and trained weights come up.

    Args:
        state: the server's state.
        round_: t, the round.
        mask: the mask under which the cohort trains; it is sent down and not sent back. None: nothing is pruned.
        votes: names of the tensors for which clients send their own masks; None: they keep ``mask``.
        reduce: the reductions of the replies; None: their mean by rows.
    """
    held: Literal["same", "none"] = "same" if votes is None and mask is not None else "none"
    expects = Expected(
        state.setting.specs,
        mask="required" if votes is not None else held,
        maskable=frozenset(votes) if votes is not None else None,
        known=mask,
        within=mask is not None,
        scalars=REPORT,
        checks=variances(state.setting),
    )
    message = Message(masks.apply(state.weights, mask), mask)
    return Ask(
        TRAIN, round_, state.setting.cohort(round_), message, expects, {MEAN: Mean()} if reduce is None else reduce
    )


def plain_ask(
    state: State, message: Message, expects: Expected, reduce: Mapping[str, Reduction], *, dense: bool = False
) -> Ask | None:
    """Return the ask of a round in which scores, signs or the like travel instead of weights; None after the last."""
    round_ = state.round + 1
    if round_ > state.setting.rounds:
        return None
    cohort = state.setting.cohort(round_)
    return Ask(TRAIN, round_, cohort, message, expects, reduce, dense=dense, plain=True)


def train_reply(ask: Ask, client: Client) -> Message:
    """Train under the mask that was sent, and return the reply of an ordinary training round."""
    weights, done = client.train(ask.message.tensors, ask.message.mask, round_=ask.round)
    return Message(weights, ask.message.mask, report(done))


def merged(state: State, reduced: Reduced, aggregator: Aggregator | None = None) -> State:
    """Return the state after a round whose replies were reduced to a mean; see ``stepped``."""
    return stepped(state, reduced.ask, reduced[MEAN], aggregator)


def stepped(state: State, ask: Ask, mean: Tensors, aggregator: Aggregator | None = None) -> State:
    """Return the state after an aggregator's step from the mean of a round; without an aggregator, the mean is taken.

    Buffers (running statistics) always take the mean. If ``mean`` is empty, only the round and the mask change.

    Raises:
        ConfigError: the mean has other names than the model, or the aggregator returns something else than weights and
            memory.
    """
    if not mean:
        return replace(state, round=ask.round, mask=ask.message.mask)
    if set(mean) != set(state.weights):
        raise ConfigError(
            f"the replies to {ask.phase!r} were reduced to {sorted(map(str, mean))[:3]} ..., and the model has "
            f"{sorted(state.weights)[:3]} ...: a step takes tensors by the model's names"
        )
    buffers = set(state.setting.layout.names("buffer"))
    trained = {name: tensor for name, tensor in mean.items() if name not in buffers}
    taking = aggregator or PlainMean()
    result = taking.step(state.weights, trained, mask=ask.message.mask, memory=state.memory)
    if not (isinstance(result, tuple) and len(result) == 2):
        raise ConfigError(f"aggregator {type(taking).__name__}: step returns the pair (weights, memory)")
    after, memory = result
    weights = {name: mean[name] if name in buffers else after[name] for name in mean}
    return replace(state, round=ask.round, weights=weights, mask=ask.message.mask, memory=memory)
