"""The method contract: what a new algorithm writes.

A method is three functions over an explicit, checkpointable state:

    plan(state)            -> Ask | None      server: what to ask which clients next (None: finished)
    respond(ask, client)   -> Message         client: explore, train, vote ...
    absorb(state, replies) -> state           server: merge a stream of checked replies

Every phase (exploration, vote, calibration) is one more ``Ask``; the round loop knows none of them by name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import nn

from secateur.aggregation.steps import Aggregator, Memory, WeightedMean
from secateur.learning import loop, resident
from secateur.learning.gradients import measure
from secateur.learning.hook import Hook
from secateur.learning.loop import Effort, Fit
from secateur.learning.optimiser import Training
from secateur.learning.supermask import Effective, Penalty, learn
from secateur.learning.task import Data
from secateur.pruning import mask as masks
from secateur.pruning.criteria import Form
from secateur.pruning.mask import Mask, Tensors
from secateur.pruning.structure import Layout, Role, plan, slim_mask, widen
from secateur.pruning.surgery import shrink
from secateur.streams import Turn, stream
from secateur.wire.message import Expected, Message, Scalar, Spec

Archive = MutableMapping[str, Tensors]


@dataclass(frozen=True)
class Setting:
    """What a method may know of the federation; the same on the server and on every client.

    Attributes:
        seed: of the run; every draw comes from it and a label.
        rounds: R (T in FedSparsify).
        clients: K.
        participation: C, the share of clients in a round's cohort.
        layout: roles and removable units of the model's tensors.
        specs: shape and dtype of each exchanged tensor.
    """

    seed: int
    rounds: int
    clients: int
    participation: float
    layout: Layout
    specs: Mapping[str, Spec]

    def cohort(self, round_: int) -> tuple[int, ...]:
        """Return A_t: max(floor(C K), 1) clients, uniform without replacement, ascending."""
        count = max(1, math.floor(self.participation * self.clients + 1e-9))
        draw = torch.randperm(self.clients, generator=stream(self.seed, "cohort", round_))[:count]
        return tuple(sorted(draw.tolist()))


@dataclass(frozen=True)
class State:
    """The server's whole knowledge between two asks; a checkpoint holds exactly this.

    Attributes:
        setting: see ``Setting``; not stored, it follows from the run's configuration.
        round: training rounds completed.
        weights: W, which may be dense beneath the mask (a shadow).
        mask: M; None: dense.
        memory: further named tensors of O(model) size, such as the server's velocity.
        notes: small facts, such as how many exploration steps are done.
        archive: tensors by key, on disk in a run (explorers' deviations, clients' own models); an entry is never
            changed after it was written, and may be deleted when it is needed no more.
    """

    setting: Setting
    round: int
    weights: Tensors
    mask: Mask | None = None
    memory: Memory = field(default_factory=dict)
    notes: Mapping[str, Scalar] = field(default_factory=dict)
    archive: Archive = field(default_factory=dict)

    def model(self) -> dict[str, torch.Tensor]:
        """Return W * M: the model that is evaluated, reported and shipped."""
        return masks.apply(self.weights, self.mask)


@dataclass(frozen=True)
class Ask:
    """One request to some clients.

    Attributes:
        phase: ``train``, ``explore``, ...; costs are reported by it.
        round: the round it belongs to, 0 before the first.
        clients: whom to ask, ascending.
        message: what they get.
        expects: what their replies must look like; anything else costs the sender its place.
        slices: each client's own mask, where clients hold different parts of the model: client k is sent the message
            under ``slices[k]`` and answers under it. ``message`` itself has no mask then.
        own: the tensors that client k is sent instead of the message's; who is not in it is sent those. It may read
            them from the archive when they are wanted, so that no more than one model is in memory.
        dense: clients train all weights, whatever the mask; their MACs are counted so.
        plain: replies are not trained weights, though they end a round: they never travel as updates.
    """

    phase: str
    round: int
    clients: tuple[int, ...]
    message: Message
    expects: Expected
    slices: Mapping[int, Mask] | None = None
    own: Mapping[int, Tensors] = field(default_factory=dict)
    dense: bool = False
    plain: bool = False

    def tensors(self, client: int) -> Tensors:
        """Return the tensors that a client is sent, before its slice."""
        return self.own.get(client, self.message.tensors)


class Replies:
    """The replies to one ask, as a stream of (client, checked message) in the order of ``ask.clients``.

    Clients that failed are simply absent; who and why stands in the run's records.
    """

    def __init__(self, ask: Ask, stream: Iterable[tuple[int, Message]]) -> None:
        self.ask = ask
        self._stream = stream

    def __iter__(self) -> Iterator[tuple[int, Message]]:
        """Iterate once."""
        return iter(self._stream)


@dataclass
class Client:
    """What a method sees of one client while it responds.

    Attributes:
        id: 0..K-1; ``SERVER`` where the server works on the model itself.
        setting: as on the server.
        model: the resident model; ``load`` and ``tensors`` move weights in and out.
        data: the client's own training rows.
        training: the round's local training.
        memory: tensors that this client keeps between rounds; saved with the run.
        initial: theta_0, the weights that the federation began with; both sides make them from the seed.
        fit: the local loop; ``loop.fit``, or one that trains several clients at once.
        measured: rows so far, of those processed, of which ``measure`` took gradients of all weights, pruned or not.
    """

    id: int
    setting: Setting
    model: nn.Module
    data: Data
    training: Training
    memory: dict[str, torch.Tensor] = field(default_factory=dict)
    initial: Tensors = field(default_factory=dict)
    fit: Callable[..., Fit] = loop.fit
    measured: int = 0

    def train(
        self, tensors: Tensors, mask: Mask | None, *,
        round_: int, effort: Effort | None = None, hooks: Sequence[Hook] = (),
    ) -> tuple[dict[str, torch.Tensor], Fit]:  # fmt: skip
        """Train from ``tensors`` under ``mask``; return the trained tensors, dense in shape, and what was done.

        Units that the mask leaves dead are cut out first, and a slim model is trained: less to compute, and the same
        weights but for the order of floating-point sums (and the draws of dropout layers that were cut).

        Args:
            tensors: what it begins with; all exchanged tensors.
            mask: what is pruned; None: nothing.
            round_: t.
            effort: epochs, patience and share of rows where they differ from the round's setting.
            hooks: what is done in each step besides. Where one of them is dense, the result is, and nothing is cut.
        """
        dense = any(hook.dense for hook in hooks)
        removal = plan(mask or {}, [] if dense else self.setting.layout.groups)
        hooks = [hook.slim(removal) for hook in hooks] if removal else hooks
        resident.load(self.model, tensors)
        model = shrink(self.model, removal) if removal else self.model
        held = slim_mask(mask, removal) if mask and removal else mask
        done = self.fit(model, self.data, self.training, self.turn(round_), mask=held, effort=effort, hooks=hooks)
        trained = resident.tensors_of(model)
        return masks.apply(widen(trained, removal, tensors), mask) if removal else trained, done

    def measure(
        self, form: Form, tensors: Tensors, mask: Mask | None, *, round_: int, batches: int = 1
    ) -> tuple[dict[str, torch.Tensor], Fit]:
        """Return a statistic of each weight at ``tensors`` under ``mask``, pruned weights included; see ``measure``."""
        resident.load(self.model, masks.apply(tensors, mask))
        found, done = measure(self.model, self.data, self.training, form, self.turn(round_), batches=batches)
        self.measured += done.processed
        return found, done

    def learn(
        self, tensors: Tensors, scores: Tensors, effective: Effective, *, round_: int, penalty: Penalty | None = None
    ) -> tuple[dict[str, torch.Tensor], Fit]:
        """Train scores from which weights are made, in a model of ``tensors``; see ``supermask.learn``."""
        resident.load(self.model, tensors)
        return learn(self.model, self.data, self.training, scores, effective, self.turn(round_), penalty=penalty)

    def turn(self, round_: int) -> Turn:
        """Return what its draws in a round follow from."""
        return Turn(self.setting.seed, round_, self.id)


SERVER = -1
"""The server's number, where it works as a client does; its draws are its own."""

TRAIN = "train"
"""The phase whose replies are the weights of its message, trained; they may travel as updates (``wire.settings``)."""

SCORE = "score"
"""The phase whose replies are a statistic of each weight."""

GUARDED = "guarded"
"""The note of how many weights stay by an allocation's guard alone; records carry it."""

EVALUATE = "evaluate"
"""The phase in which clients score a model on their own rows, those for a test and those for validation."""

SCORES: Mapping[str, type] = {
    "samples": int, "metric": float, "loss": float, "validation_samples": int, "validation": float, "sparsity": float,
}  # fmt: skip
"""Scalars of a reply to ``EVALUATE``: test rows, metric and loss on them; validation rows, and the metric on them;
the share of zeros among the weights of the scored model. Without rows a score is 0."""

REPORT: Mapping[str, type] = {"samples": int, "processed": int, "loss": float}
"""Scalars that every reply carries: n_k, rows processed (for MACs), last epoch's mean training loss."""


def report(done: Fit) -> dict[str, Scalar]:
    """Return the scalars of ``REPORT``."""
    return {"samples": done.samples, "processed": done.processed, "loss": done.loss}


class Method(ABC):
    """Base of all methods: frozen dataclasses whose fields are their options, defaulting to the paper's.

    Attributes:
        recommended: fields of ``Training``, by name, that the method needs where it learns something other than
            weights: scores, signs or thresholds have an optimiser and a rate of their own. They hold wherever a study
            or a suite's variant says nothing else. Methods that learn weights leave it empty, so that they are
            compared under one training.
    """

    recommended: ClassVar[Mapping[str, str | float]] = {}

    @property
    def regrows(self) -> bool:
        """Return whether a pruned weight may come back; masks are nested otherwise."""
        return False

    @property
    def trains_weights(self) -> bool:
        """Return whether the federation learns weights; else masks or signs over weights that stay what they were."""
        return True

    def start(self, setting: Setting, weights: Tensors, archive: Archive) -> State:
        """Return the state before anything was asked."""
        return State(setting, 0, weights, archive=archive)

    @property
    def personal(self) -> bool:
        """Return whether every client ends with a model of its own: runs are then scored on clients' test rows."""
        return False

    @abstractmethod
    def plan(self, state: State) -> Ask | None:
        """Return what to ask next, or None when the run is finished."""

    @abstractmethod
    def respond(self, ask: Ask, client: Client) -> Message:
        """Return a client's reply; ``REPORT``'s scalars included."""

    @abstractmethod
    def absorb(self, state: State, replies: Replies) -> State:
        """Return the state after the replies to ``replies.ask``; they may be none."""

    def check(self, setting: Setting) -> None:  # noqa: B027 -- most methods serve any model
        """Refuse a federation or a model that the method cannot serve; called before anything is asked.

        Raises:
            ModelError: the text says what is missing, and what to do.
        """

    def remarks(self, setting: Setting) -> list[str]:
        """Return what the method does otherwise on this model than its paper says, in a line each; it is recorded."""
        del setting
        return []

    def accepts(self, setting: Setting) -> Expected:
        """Return what a client of this method is ready to receive."""
        return Expected(setting.specs, mask="optional")

    def final(self, state: State) -> State:
        """Return the state whose model is shipped."""
        return state

    def widths(self, state: State) -> Mapping[str, Mask]:
        """Return the narrower models that the shipped one holds, by name; each is scored at the end of a run."""
        del state
        return {}

    @property
    def refines(self) -> bool:
        """Return whether the server computes with the model itself; see ``refine``."""
        return False

    @property
    def wants_public(self) -> bool:
        """Return whether the server trains on public rows (``data.public``)."""
        return False

    def refine(self, state: State, server: Client) -> tuple[State, int]:
        """Return the state after the server's own work, before round 1 and after each, and rows processed for it.

        ``server`` is the server seen as a client: the resident model, its public rows, the clients' training.
        """
        del server
        return state, 0

    def histograms(self, state: State) -> Mapping[str, Mapping[str, list[int]]]:
        """Return what the method measured of each weight, for a drawing: by name and tensor, counts in even bins."""
        del state
        return {}

    def examine(self, state: State) -> Ask:
        """Return the ask by which all clients score the model on rows of their own that they hold out."""
        everyone = tuple(range(state.setting.clients))
        return Ask(EVALUATE, state.round, everyone, Message(state.model(), state.mask), Expected({}, scalars=SCORES))

    def uses(self, message: Message, client: Client) -> Tensors:
        """Return the model that a client scores when it is sent ``examine``'s message; client side."""
        del client
        return message.tensors


def score_ask(state: State, round_: int, clients: Iterable[int], *roles: Role, chosen: Sequence[str] = ()) -> Ask:
    """Return the ask for a statistic of each weight (or of tensors of these roles), at the current model.

    With ``chosen`` it is for these tensors alone, of which each client sends the entries that it chooses, by a mask.
    The replies are not trained weights, so they never travel as updates; their costs stand under ``score``.
    """
    names = chosen or state.setting.layout.names(*(roles or ("weight",)))
    expects = Expected({name: state.setting.specs[name] for name in names}, scalars=REPORT)
    if chosen:
        expects = replace(expects, mask="required", maskable=frozenset(chosen), known=state.mask)
    message = Message(masks.apply(state.weights, state.mask), state.mask)
    return Ask(SCORE, round_, tuple(sorted(clients)), message, expects)


def mean_of(replies: Replies) -> dict[str, torch.Tensor]:
    """Return the mean of the replies' tensors by rows; empty where nobody answered."""
    mean = WeightedMean()
    for _, message in replies:
        mean.add(message.tensors, int(message.scalars["samples"]))
    return mean.mean()


def train_ask(state: State, round_: int, mask: Mask | None, *, votes: Iterable[str] | None = None) -> Ask:
    """Return the ask of an ordinary training round: weights down, weights up.

    Args:
        state: the server's state.
        round_: t.
        mask: what the cohort trains under; sent along, and not sent back.
        votes: names of the tensors that clients send a mask of their own for, None if they keep this one.
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
    return Ask(TRAIN, round_, state.setting.cohort(round_), message, expects)


def train_reply(ask: Ask, client: Client) -> Message:
    """Return the reply of an ordinary training round: trained under the mask that was sent."""
    weights, done = client.train(ask.message.tensors, ask.message.mask, round_=ask.round)
    return Message(weights, ask.message.mask, report(done))


def merge(state: State, ask: Ask, mean: Tensors, aggregator: Aggregator) -> State:
    """Return the state after one aggregator step; buffers (running statistics) take the plain mean."""
    if not mean:
        return replace(state, round=ask.round, mask=ask.message.mask)
    buffers = set(state.setting.layout.names("buffer"))
    trained = {name: tensor for name, tensor in mean.items() if name not in buffers}
    stepped, memory = aggregator.step(state.weights, trained, mask=ask.message.mask, memory=state.memory)
    weights = {name: mean[name] if name in buffers else stepped[name] for name in mean}
    return replace(state, round=ask.round, weights=weights, mask=ask.message.mask, memory=memory)
