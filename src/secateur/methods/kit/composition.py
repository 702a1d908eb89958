"""Composition: a method as one frozen dataclass of slots; the round that all of them share stands here once.

criterion x allocation x granularity x schedule x consensus x aggregator
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from secateur.aggregation.steps import Aggregator, Mean, WeightedMean
from secateur.contract.method import (
    GUARDED,
    SCORE,
    Archive,
    Ask,
    Client,
    Method,
    Replies,
    Setting,
    State,
    mean_of,
    merge,
    report,
    score_ask,
    train_ask,
)
from secateur.errors import ConfigError
from secateur.learning.loop import Fit
from secateur.methods.kit import exploration
from secateur.methods.kit.rate_distortion import curves
from secateur.pruning import mask as masks
from secateur.pruning.allocation import Allocation, Global, RateDistortion, on, pruned_count, spared
from secateur.pruning.consensus import Consensus, Majority, Participants, Pooled
from secateur.pruning.criteria import Criterion, Exploration, Gradients, Magnitude, Measured
from secateur.pruning.granularity import Granularity, Weight
from secateur.pruning.mask import Mask, Tensors
from secateur.pruning.schedule import Geometric, Never, PQIndex, Schedule
from secateur.wire.message import Message

_REWIND, _MEASURED = "rewind", "measured"


@dataclass(frozen=True)
class Composition(Method):
    """A federated pruning method made of slots; the defaults are dense FedAvg.

    Attributes:
        criterion: what scores low is pruned first, and the statistic it needs from clients.
        allocation: scores and sparsity -> what is kept.
        granularity: what is removed together, and which tensors take part.
        schedule: round -> sparsity.
        consensus: who makes the mask: the server, each client with a vote, or the server for each cohort.
        aggregator: the merge, and what becomes of the server's value of a pruned weight.

    Guarantees:
        Without pruning (``schedule=Never()`` or sparsity 0) this is FedAvg with the same aggregator, bit for
        bit. Masks are nested, except with ``Participants``, whose mask is made anew for each cohort.
    """

    criterion: Criterion = field(default_factory=Magnitude)
    allocation: Allocation = field(default_factory=Global)
    granularity: Granularity = field(default_factory=Weight)
    schedule: Schedule = field(default_factory=Never)
    consensus: Consensus = field(default_factory=Pooled)
    aggregator: Aggregator = field(default_factory=Mean)

    def start(self, setting: Setting, weights: Tensors, archive: Archive) -> State:
        """Return the first state; a schedule with an event before round 1 prunes here."""
        state = self._remembered(State(setting, 0, weights, archive=archive))
        return state if self._cohort_wise or self._statistic(setting) else self._prune_merged(state, 0)

    def check(self, setting: Setting) -> None:
        """Refuse a model without the units that are to be pruned, and slots that do not go together."""
        if isinstance(self.schedule, Never):
            return
        self.granularity.prunable(setting.layout)
        server = isinstance(self.consensus, Pooled) and self.criterion.statistic is None
        for slot, needs in (("schedule", PQIndex), ("allocation", RateDistortion)):
            if isinstance(getattr(self, slot), needs) and not server:
                name = type(getattr(self, slot)).__name__
                raise ConfigError(
                    f"{slot} {name} looks at the merged model: use consensus = pooled, and a criterion that asks "
                    "clients for nothing, such as magnitude"
                )
        if isinstance(self.allocation, RateDistortion) and not isinstance(self.granularity, Weight):
            raise ConfigError("allocation RateDistortion chooses among single weights: use granularity = weight")

    @property
    def refines(self) -> bool:
        """Return whether the server measures something itself: what pruning does to the model, or its flow."""
        return self._distorts or self._flows

    def refine(self, state: State, server: Client) -> tuple[State, int]:
        """Measure distortions, or what needs no data, where the schedule has an event, and prune."""
        if self._flows and self._lacks_measure(state):
            flow, done = self._measure(server, state.model(), state.mask, state.round)
            return self._measured(state, flow), done.processed
        allocation = self.allocation
        due = self.schedule.level(state.round, state.setting.rounds) is not None
        if not isinstance(allocation, RateDistortion) or not due:
            return state, 0
        scores = self._scores(state.setting, state.weights, (), state.mask)
        names = self.granularity.prunable(state.setting.layout)
        distorted, inputs = curves(
            server, state.model(), scores, names, levels=allocation.levels, proxies=allocation.proxies
        )
        measured = replace(self, allocation=allocation.by(distorted))
        return measured._prune_merged(state, state.round), inputs // 3  # noqa: SLF001 -- its own; a third: forward only

    def plan(self, state: State) -> Ask | None:
        """Ask explorers first where the criterion needs them, then one cohort for each round."""
        explores = self._explores(state.setting)
        ask = exploration.ask(explores, state) if explores else None
        if ask is not None:
            return ask
        round_ = state.round + 1
        if self._lacks_measure(state):
            statistic = self._statistic(state.setting)
            whole = isinstance(statistic, Gradients) and statistic.clients == "all"
            asked = range(state.setting.clients) if whole else state.setting.cohort(round_)
            return score_ask(state, state.round, asked, "weight", "bias", "norm")
        if round_ > state.setting.rounds:
            return None
        mask = state.mask
        if isinstance(self.consensus, Participants):
            mask = self._cohort_mask(state, None if self.consensus.static else state.setting.cohort(round_))
        ask = train_ask(state, round_, mask, votes=self._voted(state.setting, round_))
        if isinstance(self.consensus, Participants) and not self.consensus.enforce:
            ask = replace(ask, expects=replace(ask.expects, mask="none", known=None, within=False), dense=True)
        return ask

    def respond(self, ask: Ask, client: Client) -> Message:
        """Explore, or train under the mask; with a vote, prune the result and send the own mask."""
        explores = self._explores(client.setting)
        if ask.phase == exploration.PHASE and explores:
            reply = exploration.respond(explores, ask, client)
            if self.consensus.where == "clients":  # the server will not hold what this client's vote is made of
                client.memory |= {n: t for n, t in reply.tensors.items() if n in client.setting.specs}
            return reply
        mask = ask.message.mask
        if ask.phase == SCORE:
            found, done = self._measure(client, ask.message.tensors, mask, ask.round)
            return Message(found, None, report(done))
        if isinstance(self.consensus, Participants) and not self.consensus.enforce:
            mask = None
        weights, done = client.train(ask.message.tensors, mask, round_=ask.round)
        if self._voted(client.setting, ask.round) is not None:
            statistic: Tensors = client.memory
            if isinstance(self._statistic(client.setting), Gradients):
                statistic, more = self._measure(client, weights, mask, ask.round)
                done = replace(done, processed=done.processed + more.processed)
            mask = self._own_mask(client, weights, statistic, ask)
        return Message(masks.apply(weights, mask), mask, report(done))

    def absorb(self, state: State, replies: Replies) -> State:
        """Merge the stream, then prune where this round has an event."""
        ask = replies.ask
        explores = self._explores(state.setting)
        if ask.phase == exploration.PHASE and explores:
            return exploration.absorb(explores, state, replies)
        if ask.phase == SCORE:
            return self._measured(state, mean_of(replies))
        mean = WeightedMean(coverage=self.aggregator.coverage)
        votes: dict[str, torch.Tensor] = {}
        voters = 0
        voting = self._voted(state.setting, ask.round) is not None
        for _, message in replies:
            mean.add(message.tensors, int(message.scalars["samples"]), message.mask)
            voters += 1
            for name, kept in (message.mask or {}).items() if voting else ():
                votes[name] = votes[name] + kept if name in votes else kept.int()
        state = self._remembered(merge(state, ask, mean.mean(), self.aggregator))
        if voting and voters:
            return self._prune_by_vote(state, votes, voters)
        measured = isinstance(self._statistic(state.setting), Gradients)
        return state if self._cohort_wise or voting or measured else self._prune_merged(state, ask.round)

    def final(self, state: State) -> State:
        """With cohort-wise masks, ship under the mask of all explorers' statistics."""
        return replace(state, mask=self._cohort_mask(state, None)) if self._cohort_wise else state

    def histograms(self, state: State) -> Mapping[str, Mapping[str, list[int]]]:
        """Return how the guidance of the explorers is spread over [0, 1], in 40 bins."""
        explores = self._explores(state.setting)
        if not explores or not exploration.known(explores, state):
            return {}
        scores = self.criterion.scores(state.weights, self._statistics(state, None), seed=state.setting.seed)
        names = state.setting.layout.names("weight")
        return {"guidance": {n: torch.histc(scores[n].double(), 40, 0, 1).int().tolist() for n in names if n in scores}}

    @property
    def regrows(self) -> bool:
        """Return True where the mask is made anew for each cohort."""
        return self._cohort_wise

    @property
    def _cohort_wise(self) -> bool:
        return isinstance(self.consensus, Participants)

    def _statistic(self, setting: Setting) -> Exploration | Gradients | None:
        """Return what clients measure; nothing where the schedule removes nothing in all rounds."""
        prunes = any(self.schedule.level(done, setting.rounds) for done in range(setting.rounds + 1))
        return self.criterion.statistic if prunes else None

    @property
    def _distorts(self) -> bool:
        return isinstance(self.allocation, RateDistortion) and not isinstance(self.schedule, Never)

    @property
    def _flows(self) -> bool:
        """Return whether the statistic needs no data and is of the merged model: then no client need be asked."""
        flows = isinstance(self.criterion, Measured) and self.criterion.form == "flow"
        return flows and self.consensus.where != "clients" and not isinstance(self.schedule, Never)

    def _explores(self, setting: Setting) -> Exploration | None:
        statistic = self._statistic(setting)
        return statistic if isinstance(statistic, Exploration) else None

    def _lacks_measure(self, state: State) -> bool:
        """Return whether a mask is to be made now whose gradients were not measured yet."""
        if not isinstance(self._statistic(state.setting), Gradients) or self.consensus.where == "clients":
            return False
        if self._cohort_wise and state.round == state.setting.rounds:
            return False
        return bool(self.schedule.level(state.round, state.setting.rounds)) and state.notes.get(SCORE) != state.round

    def _measure(self, client: Client, weights: Tensors, mask: Mask | None, round_: int) -> tuple[Tensors, Fit]:
        criterion = self.criterion
        if not isinstance(criterion, Measured):
            raise TypeError(f"criterion {type(criterion).__name__} measures nothing")
        batches = criterion.measure.batches
        found, done = client.measure(criterion.form, weights, mask, round_=round_, batches=batches)
        return {n: found[n] for n in client.setting.layout.trainable}, done

    def _measured(self, state: State, found: Tensors) -> State:
        """Keep a statistic (clients' mean by rows, or the server's) for this round's mask; prune if the server does."""
        notes = {**state.notes, SCORE: state.round}
        if not found:
            return replace(state, notes=notes)
        state = replace(state, notes=notes, memory={**state.memory, _MEASURED: found})
        if self._cohort_wise:
            return state
        state = self._prune_merged(state, state.round)
        return replace(state, memory={name: held for name, held in state.memory.items() if name != _MEASURED})

    def _voted(self, setting: Setting, round_: int) -> list[str] | None:
        """Return the tensors that clients send masks for in this round, None where they do not vote."""
        if self.consensus.where != "clients" or not self.schedule.level(round_, setting.rounds):
            return None
        return self.granularity.prunable(setting.layout)

    def _own_mask(self, client: Client, weights: Tensors, statistic: Tensors, ask: Ask) -> Mask:
        """Return a client's vote, made of its own weights or of its own statistic.

        A client that never measured the statistic, or lost it, votes to keep what it was sent.
        """
        names = self.granularity.prunable(client.setting.layout)
        level = self.schedule.level(ask.round, client.setting.rounds) or 0.0
        if self._statistic(client.setting) is not None and not statistic:
            level = 0.0
        mask = self._mask(client.setting, weights, [statistic], level, held=ask.message.mask)
        return mask or {name: torch.ones_like(weights[name], dtype=torch.bool) for name in names}

    def _mask(
        self, setting: Setting, weights: Tensors, statistics: Iterable[Tensors], level: float, *, held: Mask | None
    ) -> Mask | None:
        """Return the mask at ``level``, within ``held``; level 0 leaves what is held."""
        if level <= 0:
            return held
        scores = self._scores(setting, weights, statistics, held)
        allocation = on(self.allocation, setting.layout)
        mask = self.granularity.mask(scores, setting.layout, allocation=allocation, sparsity=level)
        return masks.intersect(mask, held)

    def _scores(
        self, setting: Setting, weights: Tensors, statistics: Iterable[Tensors], held: Mask | None
    ) -> dict[str, torch.Tensor]:
        """Return the criterion's scores; what is pruned already is lower than everything."""
        scores = self.criterion.scores(weights, statistics, seed=setting.seed)
        return scores | {n: torch.where(m, scores[n], -torch.inf) for n, m in (held or {}).items()}

    def _statistics(self, state: State, cohort: tuple[int, ...] | None) -> Iterable[Tensors]:
        explores = self._explores(state.setting)
        if explores:
            return exploration.deviations(explores, state, cohort)
        return [state.memory[_MEASURED]] if _MEASURED in state.memory else ()

    def _cohort_mask(self, state: State, cohort: tuple[int, ...] | None) -> Mask | None:
        level = self.schedule.level(state.round, state.setting.rounds)
        statistic = self._statistic(state.setting)
        unheard = isinstance(statistic, Exploration) and not exploration.known(statistic, state)
        if level is None or unheard or (isinstance(statistic, Gradients) and _MEASURED not in state.memory):
            return state.mask
        return self._mask(state.setting, state.weights, self._statistics(state, cohort), level, held=None)

    def _prune_merged(self, state: State, done: int) -> State:
        level = self.schedule.level(done, state.setting.rounds)
        if level is None or self._distorts:  # the server prunes when it has measured
            return state
        if isinstance(self.schedule, PQIndex):
            level = self._adapted(self.schedule, state)
        mask = self._pooled_mask(state, level)
        if mask and isinstance(self.allocation, Global) and self.allocation.guard:
            plain = replace(self, allocation=Global(guard=False))._pooled_mask(state, level)  # noqa: SLF001 -- its own
            state = replace(state, notes={**state.notes, GUARDED: spared(mask, plain or {})})
        return self._settle(state, mask)

    def _pooled_mask(self, state: State, level: float) -> Mask | None:
        return self._mask(state.setting, state.weights, self._statistics(state, None), level, held=state.mask)

    def _adapted(self, schedule: PQIndex, state: State) -> float:
        """Return the sparsity that the weights themselves suggest, up to the schedule's limit."""
        names, held = self.granularity.prunable(state.setting.layout), state.mask or {}
        left = torch.cat([state.weights[n][held[n]] if n in held else state.weights[n].reshape(-1) for n in names])
        total = sum(state.weights[n].numel() for n in names)
        return min(schedule.most, 1 - left.numel() * (1 - schedule.goes(left)) / total)

    def _prune_by_vote(self, state: State, votes: Tensors, voters: int) -> State:
        consensus = self.consensus
        if not isinstance(consensus, Majority):
            raise TypeError(f"consensus {type(consensus).__name__} lets clients make masks but has no vote")
        total = sum(v.numel() for v in votes.values())
        level = self.schedule.level(state.round, state.setting.rounds) or 0.0
        magnitude = {name: state.weights[name].abs() for name in votes}
        mask = consensus.vote(votes, voters, magnitude, total - pruned_count(level, total))
        return self._settle(state, masks.intersect(mask, state.mask))

    def _settle(self, state: State, mask: Mask | None) -> State:
        """Return the state under a new mask; with rewinding, from the weights remembered, and without momentum."""
        weights, memory = state.weights, state.memory
        if _REWIND in memory:
            weights, memory = memory[_REWIND], {_REWIND: memory[_REWIND]}
        weights = masks.apply(weights, mask) if self.aggregator.pruned == "zero" else weights
        return replace(state, weights=weights, mask=mask, memory=memory)

    def _remembered(self, state: State) -> State:
        """Keep the weights of the round to which survivors are rewound."""
        if not isinstance(self.schedule, Geometric) or state.round != self.schedule.rewind:
            return state
        return replace(state, memory={**state.memory, _REWIND: state.weights})
