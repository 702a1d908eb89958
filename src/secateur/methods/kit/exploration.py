"""Exploration: explorers measure how far training moves each weight, before the federation starts.

The settings are ``pruning.criteria.Exploration``; this module has the protocol: which asks are sent, in which order,
and what is kept of the replies. AutoFLIP makes masks of the result by a threshold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from secateur.aggregation.weighted import WeightedMean
from secateur.contract.ask import REPORT, Ask
from secateur.contract.checks import Range
from secateur.contract.client import Client, report
from secateur.contract.reducer import Reduced
from secateur.contract.reduction import Keep, Mean, Reduction
from secateur.contract.reply import Reply, Sent
from secateur.contract.state import Setting, State
from secateur.learning.loop import Effort
from secateur.methods.kit.rounds import MEAN
from secateur.pruning.criteria import Exploration
from secateur.pruning.mask import Tensors
from secateur.wire.message import Expected, Message

PHASE = "explore"
_EXPLORED = "explored/"


def explorers(settings: Exploration, setting: Setting) -> tuple[int, ...]:
    """Return X, the explorers: round(fraction * K) clients, at least one, drawn without replacement, ascending."""
    return setting.drawn(max(1, round(settings.fraction * setting.clients)), "explorers")


def ask(settings: Exploration, state: State) -> Ask | None:
    """Return the next exploration ask; None when the exploration is complete.

    ``start = common``: one ask to all of X. ``base = epoch``: an ask for one common epoch is sent before it.
    ``start = sequential``: one ask after another, each from the weights with which the explorer before ended.
    """
    chosen = explorers(settings, state.setting)
    step = int(state.notes.get(PHASE, 0))
    groups = [(client,) for client in chosen] if settings.start == "sequential" else [chosen]
    warm_up = settings.base == "epoch"
    if step == len(groups) + warm_up:
        return None
    first = warm_up and step == 0
    specs = {} if first else {n: state.setting.specs[n] for n in state.setting.layout.trainable}
    if first or _sends_weights(settings):
        specs |= {_EXPLORED + name: spec for name, spec in state.setting.specs.items()}
    message = Message(state.memory.get("base", state.weights), None, {"common_epoch": first})
    clients = chosen if first else groups[step - warm_up]
    reduce: dict[str, Reduction] = {MEAN: Mean(of=weights)} if first else {"single": Keep()}
    squares = frozenset(specs) & frozenset(state.setting.layout.trainable)
    expects = Expected(specs, scalars=REPORT, checks=(Range(squares, least=0.0),))
    return Ask(PHASE, 0, clients, message, expects, reduce, in_turn=settings.start == "sequential")


def respond(settings: Exploration, ask: Ask, client: Client) -> Message:
    """Train from the weights of the ask and return D_k, the squared deviations (names and shapes of the weights).

    The trained weights are sent too if the settings need them; their bytes are counted.
    """
    first = bool(ask.message.scalars["common_epoch"])
    effort = Effort(1 if first else settings.epochs, 0 if first else settings.patience, settings.data)
    weights, done = client.train(ask.message.tensors, None, round_=0, effort=effort)
    tensors: dict[str, torch.Tensor] = {}
    if not first:
        tensors = {n: (ask.message.tensors[n] - weights[n]).square() for n in client.setting.layout.trainable}
    if first or _sends_weights(settings):
        tensors |= {_EXPLORED + name: tensor for name, tensor in weights.items()}
    return Message(tensors, None, report(done))


def absorb(settings: Exploration, state: State, reduced: Reduced) -> State:
    """Keep each D_k in the archive; change the start of the next ask, or of the federation, if the settings say so."""
    step = int(state.notes.get(PHASE, 0))
    initial, base = state.weights, dict(reduced.get(MEAN, {}))
    for client, tensors in reduced.get("single", {}).items():
        explored, deviation = _explored(tensors), {n: t for n, t in tensors.items() if not n.startswith(_EXPLORED)}
        if settings.start == "sequential":
            deviation = {n: (initial[n] - explored[n]).square() for n in deviation}
            base = explored
        state.archive[f"deviation/{client}"] = deviation
        if settings.warm_start:
            state.archive[f"explored/{client}"] = explored
    memory = {**state.memory, "base": base} if base else state.memory
    state = replace(state, memory=memory, notes={**state.notes, PHASE: step + 1})
    return _finish(settings, state) if ask(settings, state) is None else state


def weights(reply: Reply, sent: Sent) -> Tensors:
    """Return the weights with which an explorer ended."""
    del sent
    return _explored(reply.tensors)


def known(state: State, kind: str = "deviation") -> list[int]:
    """Return the explorers whose deviations (or ``explored`` weights) arrived, ascending."""
    kept = (key.partition("/") for key in state.archive)
    return sorted(int(client) for found, _, client in kept if found == kind)


def deviations(state: State, cohort: tuple[int, ...] | None) -> Iterator[Tensors]:
    """Yield D_k of S_t: the explorers in ``cohort``, or all explorers if it is None or has none."""
    arrived = known(state)
    chosen = [k for k in arrived if cohort is not None and k in cohort] or arrived
    return (state.archive[f"deviation/{k}"] for k in chosen)


def _finish(settings: Exploration, state: State) -> State:
    memory = {name: tensors for name, tensors in state.memory.items() if name != "base"}
    if not settings.warm_start:
        return replace(state, memory=memory)
    mean = WeightedMean()
    for k in known(state, "explored"):
        mean.add(state.archive[f"explored/{k}"], 1.0)
    return replace(state, memory=memory, weights=mean.mean() or state.weights)


def _explored(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {n.removeprefix(_EXPLORED): t for n, t in tensors.items() if n.startswith(_EXPLORED)}


def _sends_weights(settings: Exploration) -> bool:
    return settings.warm_start or settings.start == "sequential"
