"""Composition: a pruning method made of slots, and the round that all such methods share.

criterion x allocation x granularity x schedule x consensus x recovery x aggregator

The round uses only the methods of a slot's base class (``Criterion``, ``Allocation`` ...) and never asks for its type,
so your own slots work as those of the package do.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace

import torch

from secateur.aggregation import Aggregator
from secateur.aggregation.steps import Mean as PlainMean
from secateur.contract.ask import GUARDED, TRAIN, Ask
from secateur.contract.checks import Kept
from secateur.contract.client import Client, report
from secateur.contract.method import Method, check_prunable
from secateur.contract.reducer import Reduced
from secateur.contract.reduction import Reduction
from secateur.contract.state import Archive, Setting, State
from secateur.errors import ConfigError, check_verbs
from secateur.methods.kit.consensus import Consensus, Pooled, Prune
from secateur.methods.kit.criteria import Criterion, Magnitude
from secateur.methods.kit.recovery import FineTune, Recovery
from secateur.methods.kit.rounds import MEAN, merged, train_ask
from secateur.methods.kit.schedule import Never, Schedule
from secateur.methods.kit.trial import ServerTrial
from secateur.pruning import mask as masks
from secateur.pruning.allocation import Allocation, Global, kept_by_guard, pruned_count
from secateur.pruning.granularity import Granularity, Weight
from secateur.pruning.mask import Mask, Tensors
from secateur.wire.message import Message


@dataclass(frozen=True)
class Composition(Method):
    """A federated pruning method made of slots; with the default slots it is dense FedAvg.

    Attributes:
        criterion: scores weights, of which the lowest are pruned first; may ask clients for a statistic.
        allocation: chooses the entries to keep, from the scores and the sparsity.
        granularity: what is removed together (weights, kernels, channels), and from which tensors.
        schedule: when weights are pruned, and to which sparsity.
        consensus: who makes the mask: the server, the clients by a vote, or the server for each cohort.
        recovery: the weights from which training goes on after a pruning.
        aggregator: the server's step, and what it does with its value of a pruned weight.

    Raises:
        ConfigError: a slot lacks a method of its base class; the text names both.

    Guarantees:
        Without pruning (``schedule=Never()`` or sparsity 0) this is FedAvg with the same aggregator, bit for
        bit. Masks are nested, unless the consensus makes one for each cohort.
    """

    criterion: Criterion = field(default_factory=Magnitude)
    allocation: Allocation = field(default_factory=Global)
    granularity: Granularity = field(default_factory=Weight)
    schedule: Schedule = field(default_factory=Never)
    consensus: Consensus = field(default_factory=Pooled)
    recovery: Recovery = field(default_factory=FineTune)
    aggregator: Aggregator = field(default_factory=PlainMean)

    def __post_init__(self) -> None:
        for slot, base in _slots().items():
            check_verbs(type(getattr(self, slot)), base, name=slot)

    def start(self, setting: Setting, weights: Tensors, archive: Archive) -> State:
        """Return the first state, pruned already if the schedule has an event before round 1."""
        return self._after_event(self.recovery.remember(State(setting, 0, weights, archive=archive)))

    def check(self, setting: Setting) -> None:
        """Refuse a model without the units that are to be pruned, and slots that do not fit together.

        Raises:
            ModelError: the model has no such units.
            ConfigError: two slots do not fit together; the text says what to choose.
        """
        prunes, waits = self._prunes(setting), self._asks_clients
        self.aggregator.check(setting, "own" if prunes and self.consensus.ballot else "shared", type(self).__name__)
        if prunes and waits and self.aggregator.refines:
            raise ConfigError(
                f"aggregator {type(self.aggregator).__name__} trains at the server under the mask of the next round, "
                f"and criterion {type(self.criterion).__name__} asks clients before it makes that: use a criterion "
                "that asks clients for nothing, such as magnitude, or another rule, such as median"
            )
        if not prunes:
            return
        name = type(self.consensus).__name__
        if self.consensus.ballot and type(self.consensus).vote is Consensus.vote:
            raise ConfigError(f"consensus {name} has a ballot, and lacks 'vote' of Consensus")
        if MEAN in self.consensus.ballot:
            raise ConfigError(
                f"consensus {name} has a reduction called {MEAN!r} in its ballot, which is the aggregator's"
            )
        check_prunable(self.granularity.prunable(setting.layout))
        if not self.allocation.measures:
            return
        name = type(self.allocation).__name__
        if self.consensus.ballot or self.consensus.regrows or waits:
            raise ConfigError(
                f"allocation {name} looks at the merged model: use consensus = pooled, and a criterion that asks "
                "clients for nothing, such as magnitude"
            )
        if not self.granularity.single:
            raise ConfigError(f"allocation {name} chooses among single weights: use granularity = weight")

    def remarks(self, setting: Setting) -> list[str]:
        """Return a line that says which layers keep all their units, if units are pruned and some do."""
        return setting.layout.stays() if self.granularity.cuts else []

    @property
    def refines(self) -> bool:
        """Return whether the server itself works with the model: for a slot that measures, or for the aggregator."""
        return self._measures or self.aggregator.refines

    def refine(self, state: State, server: Client) -> tuple[State, int]:
        """Measure and prune if the schedule has an event, then let the aggregator train for the next round."""
        state, rows = self._refined(state, server) if self._measures else (state, 0)
        if not self.aggregator.refines or (ask := self.plan(state)) is None or ask.phase != TRAIN:
            return state, rows
        state, more = self.aggregator.refine(state, ask, server)
        return state, rows + more

    @property
    def _measures(self) -> bool:
        """Return whether the server itself measures something before pruning, for the criterion or the allocation."""
        return self.allocation.measures or (self.criterion.refines and not self.consensus.ballot)

    @property
    def _asks_clients(self) -> bool:
        """Return whether the criterion asks clients for a statistic before a mask is made."""
        return self.criterion.by_training != 0 and not self.criterion.refines

    def _refined(self, state: State, server: Client) -> tuple[State, int]:
        """If the schedule has an event, measure what the criterion and the allocation need at the server, and prune."""
        if not self._due(state):
            return state, 0
        allocation, rows = self.allocation, 0
        if self.criterion.refines:
            state, rows = self.criterion.refine(state, server)
        if allocation.measures:
            names, statistics = self.granularity.prunable(state.setting.layout), self.criterion.statistics(state, None)
            scores = self._scores(state.setting, state.weights, statistics or (), state.mask)
            trial = ServerTrial(server, state.model())
            allocation = allocation.measured({n: scores[n] for n in names}, state.model(), trial)
            rows += trial.processed // 3  # a third of a training row's work: forward only
        return replace(self, allocation=allocation)._pruned(state), rows  # noqa: SLF001 -- its own

    def plan(self, state: State) -> Ask | None:
        """Return the ask for the criterion's statistic if one is due, otherwise that of the next training round."""
        setting, round_ = state.setting, state.round + 1
        if (ask := self._statistic_ask(state)) is not None:
            return ask
        if round_ > setting.rounds:
            return None
        mask = self.consensus.mask_for(state, setting.cohort(round_), self._prune(state))
        votes = self.granularity.prunable(setting.layout) if self._votes(setting, round_) else None
        loose = mask is not None and self.consensus.enforced(mask) is None
        masked = votes is not None or (mask is not None and not loose)
        reduce: dict[str, Reduction] = {
            MEAN: self.aggregator.reduction(masked=masked),
            **(self.aggregator.ballot(self.consensus.ballot) if votes else {}),
        }
        ask = train_ask(state, round_, mask, votes=votes, reduce=reduce)
        if votes and (size := self._vote_size(replace(state, round=round_))) is not None:
            # a client that has no statistic votes for the mask that it was sent
            sized = Kept(size, size, same=True)
            ask = replace(ask, expects=replace(ask.expects, checks=(*ask.expects.checks, sized)))
        if not loose:
            return ask
        if votes is None:
            ask = replace(ask, expects=replace(ask.expects, mask="none", known=None, within=False))
        return replace(ask, dense=True)

    def respond(self, ask: Ask, client: Client) -> Message:
        """Answer the criterion's ask, or train under the mask; if clients vote, prune the result and send its mask."""
        if ask.phase != TRAIN:
            reply = self.criterion.respond(ask, client)
            if self.consensus.ballot:  # the client's vote needs its own answer
                client.memory |= {n: t for n, t in reply.tensors.items() if n in client.setting.specs}
            return reply
        mask = self.consensus.enforced(ask.message.mask)
        weights, done = client.train(ask.message.tensors, mask, round_=ask.round)
        if self._votes(client.setting, ask.round):
            statistic, more = self.criterion.own(client, weights, mask, ask.round)
            done = replace(done, processed=done.processed + more)
            mask = self._own_mask(client, weights, statistic, ask)
        return Message(masks.apply(weights, mask), mask, report(done))

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Merge the replies, then prune if the round has an event."""
        if reduced.ask.phase != TRAIN:
            return self._after_event(self.criterion.absorb(state, reduced))
        state = self.recovery.remember(merged(state, reduced, self.aggregator))
        if not self._votes(state.setting, state.round):
            return self._after_event(state)
        level = self._level(state)
        if not level or not reduced.clients:
            return state
        total = sum(state.setting.specs[name].size for name in self.granularity.prunable(state.setting.layout))
        mask = self.consensus.vote(state, reduced, total - pruned_count(level, total))
        return self._recovered(state, masks.intersect(mask, state.mask))

    def final(self, state: State) -> State:
        """Return the state with the mask under which the model is shipped."""
        return replace(state, mask=self.consensus.mask_for(state, None, self._prune(state)))

    def histograms(self, state: State) -> Mapping[str, Mapping[str, list[int]]]:
        """Return the histograms of the criterion."""
        return self.criterion.histograms(state) if self._prunes(state.setting) else {}

    @property
    def regrows(self) -> bool:
        """Return whether the mask is made anew for each cohort."""
        return self.consensus.regrows

    def _prunes(self, setting: Setting) -> bool:
        """Return whether the schedule has any event in the whole run."""
        return any(self.schedule.due(done, setting.rounds) for done in range(setting.rounds + 1))

    def _due(self, state: State) -> bool:
        """Return whether the server makes a mask at the end of this round, for itself or for the next cohort."""
        last = self.consensus.regrows and state.round == state.setting.rounds
        return not last and self.schedule.due(state.round, state.setting.rounds)

    def _votes(self, setting: Setting, round_: int) -> bool:
        """Return whether clients send their own masks in a round; the server and the clients both ask it."""
        return bool(self.consensus.ballot) and self.schedule.due(round_, setting.rounds)

    def _vote_size(self, state: State) -> int | None:
        """Return how many entries the vote of a client keeps at this event; None: it depends on the client."""
        alike = self.schedule.planned and self.allocation.exact and self.granularity.single
        level = self._level(state) if alike else 0.0
        if not level:
            return None
        total = sum(state.setting.specs[name].size for name in self.granularity.prunable(state.setting.layout))
        return total - pruned_count(level, total)

    def _statistic_ask(self, state: State) -> Ask | None:
        due = self._due(state) and not self.consensus.ballot
        return self.criterion.ask(state, due=due) if self._prunes(state.setting) else None

    def _level(self, state: State) -> float:
        """Return the sparsity of this round's event; 0 if there is none."""
        if not self.schedule.due(state.round, state.setting.rounds):
            return 0.0
        held, whole = state.mask or {}, torch.ones((), dtype=torch.bool)
        names = self.granularity.prunable(state.setting.layout)
        seen = {n: held[n] if n in held else whole.expand(state.weights[n].shape) for n in names}
        return self.schedule.level(replace(state, mask=seen)) or 0.0

    def _after_event(self, state: State) -> State:
        """Return the state after this round's pruning, or unchanged if something must be measured first."""
        waits = self._measures or not self._due(state) or self._statistic_ask(state) is not None
        return state if waits else self._pruned(state)

    def _pruned(self, state: State) -> State:
        """Return the state after an event at the server; unchanged without an event or without the statistic."""
        level = self._level(state)
        if not level or self.criterion.statistics(state, None) is None:
            return state
        mask = self.consensus.mask_after(state, self._prune(state, level))
        if (unguarded := self.allocation.unguarded) is not None and mask and mask is not state.mask:
            alone = replace(self, allocation=unguarded)
            without = self.consensus.mask_after(state, alone._prune(state, level))  # noqa: SLF001 -- its own
            state = replace(state, notes={**state.notes, GUARDED: kept_by_guard(mask, without or {})})
        return self._recovered(state, mask)

    def _recovered(self, state: State, mask: Mask | None) -> State:
        """Return the state from which training goes on after an event with this new ``mask``."""
        new = mask is not state.mask
        state = self.recovery.recover(replace(state, mask=mask))
        if not new or self.aggregator.pruned != "zero":
            return state
        return replace(state, weights=masks.apply(state.weights, mask))

    def _own_mask(self, client: Client, weights: Tensors, statistic: Tensors | None, ask: Ask) -> Mask:
        """Return a client's vote: the mask made from its own weights or its own statistic.

        A client that never measured the statistic, or lost it, votes for the mask that it was sent.
        """
        held = ask.message.mask
        level = 0.0 if statistic is None else self._level(State(client.setting, ask.round, weights, held))
        mask = self._mask(client.setting, weights, [statistic or {}], level, held=held)
        names = self.granularity.prunable(client.setting.layout)
        return mask or {name: torch.ones_like(weights[name], dtype=torch.bool) for name in names}

    def _prune(self, state: State, level: float | None = None) -> Prune:
        """Return the function that makes a mask at the server, at a given sparsity or at that of this round."""

        def prune(cohort: tuple[int, ...] | None, *, anew: bool = False) -> Mask | None:
            sparsity = self._level(state) if level is None else level
            statistics = self.criterion.statistics(state, cohort) if sparsity else None
            if statistics is None:
                return state.mask
            return self._mask(state.setting, state.weights, statistics, sparsity, held=None if anew else state.mask)

        return prune

    def _mask(
        self, setting: Setting, weights: Tensors, statistics: Iterable[Tensors], level: float, *, held: Mask | None
    ) -> Mask | None:
        """Return the mask of sparsity ``level`` within ``held``; ``held`` itself if the level is 0."""
        if level <= 0:
            return held
        scores = self._scores(setting, weights, statistics, held)
        allocation = self.allocation.on(setting.layout)
        mask = self.granularity.mask(scores, setting.layout, allocation=allocation, sparsity=level)
        return masks.intersect(mask, held)

    def _scores(
        self, setting: Setting, weights: Tensors, statistics: Iterable[Tensors], held: Mask | None
    ) -> dict[str, torch.Tensor]:
        """Return the criterion's scores, with -inf for entries that are pruned already."""
        scores = self.criterion.scores(weights, statistics, seed=setting.seed)
        return scores | {n: torch.where(m, scores[n], -torch.inf) for n, m in (held or {}).items()}


@functools.cache
def _slots() -> dict[str, type]:
    """Return the base of each slot's values, by the slot's name."""
    hints = typing.get_type_hints(Composition)
    return {slot.name: hints[slot.name] for slot in fields(Composition)}
