"""Mask selection: clients score a pool of candidate masks, one after another, and the best becomes the run's mask.

If the model has batch norm there are two asks for each candidate: first for the statistics of its layers on the
clients' rows, then for its loss with the mean of these statistics. All candidates have the same density and differ in
how the layers share it: candidate 0 is ERK, and for the others each layer's ERK share is multiplied by a factor from
U(1/2, 3/2), so that no layer is left nearly empty.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from secateur.contract.ask import REPORT, Ask
from secateur.contract.client import Client, report
from secateur.contract.reducer import Reduced
from secateur.contract.reduction import Mean, Scalars
from secateur.contract.state import State
from secateur.learning import resident
from secateur.learning.loop import Fit
from secateur.methods.kit.rounds import MEAN, variances
from secateur.pruning import mask as masks
from secateur.pruning.allocation import by_count, pruned_count, shared
from secateur.pruning.mask import Mask, Tensors
from secateur.streams import stream
from secateur.wire.message import Expected, Message

PHASE = "select"
_STEP, _BEST, _LEAST = "select", "selected", "selected loss"
_STATISTICS = "statistics"
_JUDGED = {MEAN: Mean(), "loss": Scalars("loss")}


def ask(state: State, sparsity: float, candidates: int) -> Ask | None:
    """Return the next ask about a candidate; None when all candidates are scored."""
    step, buffers = int(state.notes.get(_STEP, 0)), state.setting.layout.names("buffer")
    asks = 2 if buffers else 1
    if step == asks * candidates:
        return None
    number, judged = divmod(step, asks)
    wants = bool(buffers) and not judged
    mask = candidate(state, number, sparsity)
    weights = {**state.weights, **state.memory.get(_STATISTICS, {})}
    message = Message(masks.apply(weights, mask), mask, {"statistics": wants})
    specs = {name: state.setting.specs[name] for name in buffers} if wants else {}
    expects = Expected(specs, scalars=REPORT, checks=variances(state.setting) if wants else ())
    return Ask(PHASE, 0, state.setting.cohort(1), message, expects, _JUDGED)


def candidate(state: State, number: int, sparsity: float) -> Mask:
    """Return a mask of the pool: the largest |w| of each tensor, counts as in ERK, varied from number 1 on."""
    scores = {name: state.weights[name].abs() for name in state.setting.layout.names("weight")}
    sizes = {name: score.numel() for name, score in scores.items()}
    parts = {}
    for name, score in scores.items():
        drawn = torch.rand((), generator=stream(state.setting.seed, "candidate", number, name))
        parts[name] = sum(score.shape) * (0.5 + float(drawn) if number else 1.0)
    total = sum(sizes.values())
    return by_count(scores, shared(total - pruned_count(sparsity, total), parts, sizes))


def respond(ask: Ask, client: Client) -> Message:
    """Return the candidate's batch norm statistics on all rows, or its loss; nothing is trained."""
    rows = len(client.data)
    if ask.message.scalars["statistics"]:
        resident.load(client.model, ask.message.tensors)
        statistics = _statistics(client)
        return Message(statistics, None, report(Fit(rows, rows // 3, 0, 0, 0.0)))  # forward only: a third of training
    score = client.score(ask.message.tensors)
    return Message({}, None, report(Fit(rows, rows // 3, 0, 0, score.loss)))


def absorb(state: State, reduced: Reduced, sparsity: float, candidates: int) -> State:
    """Keep statistics or a loss; after the last candidate, set the best mask and its statistics."""
    step = int(state.notes.get(_STEP, 0))
    notes = {**state.notes, _STEP: step + 1}
    memory = {name: held for name, held in state.memory.items() if name != _STATISTICS}
    if reduced.ask.message.scalars["statistics"]:
        return replace(state, notes=notes, memory={**memory, _STATISTICS: reduced[MEAN]})
    loss = math.inf if reduced["loss"] is None else reduced["loss"]
    number = step // (2 if state.setting.layout.names("buffer") else 1)
    if _BEST not in notes or loss < float(notes[_LEAST]):
        kept = state.memory.get(_STATISTICS, {})
        notes |= {_BEST: number, _LEAST: loss if math.isfinite(loss) else 1e300}
        memory = {**memory, _BEST: kept} if kept else memory
    state = replace(state, notes=notes, memory=memory)
    if ask(state, sparsity, candidates) is not None:
        return state
    mask, weights = candidate(state, int(notes[_BEST]), sparsity), {**state.weights, **memory.get(_BEST, {})}
    memory = {name: held for name, held in memory.items() if name != _BEST}
    return replace(state, memory=memory, mask=mask, weights=masks.apply(weights, mask))


def _statistics(client: Client) -> dict[str, torch.Tensor]:
    """Return running means and variances over all batches of the client's rows, with equal weight for each batch."""
    model, size = client.model, client.training.batch_size
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]  # noqa: SLF001 -- torch's own
    usual = [norm.momentum for norm in norms]
    model.train()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over batches
    with torch.no_grad():
        for start in range(0, len(client.data), size):
            x, _ = client.data.batch(slice(start, start + size))
            model(x)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
    tensors: Tensors = resident.tensors_of(model)
    return {name: tensors[name] for name in client.setting.layout.names("buffer")}
