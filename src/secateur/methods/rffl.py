"""RFFL: clients earn a reputation by what they send, and are sent as much of the aggregate as it is worth.

    send     Delta_k, scaled down to norm Gamma if it is longer
    merge    a = sum_k r_k Delta_k over the reputable clients R;  r_k <- alpha r_k + (1 - alpha) cos(Delta_k, a), 0
             outside of R, divided by their sum; from the eleventh round on who has r_k < 1/(3 |R|) leaves R for good
    reward   client k gets the q_k = (r_k / max r)^s share of the largest |a| of each tensor
    train    w_k <- w_k + Delta_k + reward: each client has a model of its own

Paper symbol -> option: Gamma: norm; alpha: alpha; beta, times |R|: threshold.

Reference: Xu and Lyu, "A Reputation Mechanism Is All You Need: Collaborative Fairness and Adversarial Robustness in
Federated Learning", arXiv 2011.10464. *Read*: the published code's loop (XinyiYS; parties, server, rewards).
Departures: reputations begin alike; in the code the first aggregate is weighted by claimed rows and r begins at 0. s is
ours, for no reputation at all (0: FedAvg, as the code's own switch). A client's rewards of rounds in which it is not
asked are lost, and if it has lost its model it begins again from theta_0. Running statistics stay at the client. If the
reputations add up to nothing, they stay. What is shipped is theta_0 plus all aggregates, which no client holds.
Reproduced in part: fairness on digits, and that free-riders leave (tests/methods/test_rffl.py); the paper's tables were
not run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from secateur.contract.ask import REPORT, TRAIN, Ask
from secateur.contract.client import Client, report
from secateur.contract.method import Method
from secateur.contract.reducer import Reduced
from secateur.contract.reduction import Keep
from secateur.contract.state import Archive, Setting, State
from secateur.contract.suspects import Sifted
from secateur.contract.weighted import Accumulator
from secateur.errors import check
from secateur.methods.kit.personal import LazyTensors
from secateur.methods.kit.rounds import MEAN, merged, train_ask, train_reply
from secateur.pruning.allocation import lowest
from secateur.pruning.mask import Mask, Tensors
from secateur.wire.message import Expected, Message

_AGGREGATE, _STANDING, _REPUTATION, _REPUTABLE = "aggregate", "standing", "reputation", "reputable"
_FIRST_REMOVAL = 11


@dataclass(frozen=True)
class RFFL(Method):
    """Weighs clients by their reputation, and rewards them by it.

    Attributes:
        strength: s, the exponent of a reputation in the share that is sent; 0 is FedAvg, without reputations.
        norm: Gamma, the longest update that counts.
        alpha: the weight of a reputation's past.
        threshold: the least reputation, times the number of reputable clients; below it a client is removed.
    """

    strength: float = 1.0
    norm: float = 0.5
    alpha: float = 0.95
    threshold: float = 1 / 3

    def __post_init__(self) -> None:
        check(self.strength >= 0, name="strength", value=self.strength, must="be 0 or more")
        check(self.norm > 0, name="norm", value=self.norm, must="be above 0")
        check(0 <= self.alpha <= 1, name="alpha", value=self.alpha, must="be in [0, 1]")
        check(0 <= self.threshold < 1, name="threshold", value=self.threshold, must="be in [0, 1)")

    @property
    def personal(self) -> bool:
        """Return whether each client has its own model; not if ``strength`` is 0."""
        return self.strength > 0

    def remarks(self, setting: Setting) -> list[str]:
        """Return a warning if some clients rest in a round."""
        if not self.strength or setting.participation == 1:
            return []
        return ["rffl rewards every client in every round: with participation < 1 a client loses the others' rewards"]

    def start(self, setting: Setting, weights: Tensors, archive: Archive) -> State:
        """Return the first state: equal reputations."""
        alike = torch.full((setting.clients,), 1 / setting.clients, dtype=torch.float64)
        standing = {_REPUTATION: alike, _REPUTABLE: torch.ones(setting.clients, dtype=torch.bool)}
        return State(setting, 0, weights, memory={_STANDING: standing} if self.strength else {}, archive=archive)

    def accepts(self, setting: Setting) -> Expected:
        """Accept the model, or the part of an aggregate that is a client's reward."""
        return Expected(setting.specs, mask="optional", optional=True)

    def plan(self, state: State) -> Ask | None:
        """Send each client of the next cohort its reward, and ask for its update."""
        round_, setting = state.round + 1, state.setting
        if round_ > setting.rounds:
            return None
        if not self.strength:
            return train_ask(state, round_, None)
        expects = Expected({name: setting.specs[name] for name in _shared(setting)}, scalars=REPORT)
        cohort = setting.cohort(round_)
        reduce = {MEAN: Standing(norm=self.norm, alpha=self.alpha, threshold=self.threshold)}
        return self._rewards(state, Ask(TRAIN, round_, cohort, Message({}), expects, reduce, dense=True, plain=True))

    def respond(self, ask: Ask, client: Client) -> Message:
        """Add the reward, train, and send what training changed."""
        if not self.strength:
            return train_reply(ask, client)
        before = _rewarded(ask.message.tensors, client)
        trained, done = client.train(before, None, round_=ask.round)
        update = {name: trained[name] - before[name] for name in _shared(client.setting)}
        update = scaled(update, shortening(update, self.norm))
        client.memory |= trained | {name: before[name] + change for name, change in update.items()}
        return Message(update, None, report(done))

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Keep the aggregate and the reputations."""
        if not self.strength:
            return merged(state, reduced)
        found = dict(reduced[MEAN])
        if not found:
            return replace(state, round=reduced.ask.round)
        standing = {name: found.pop(name) for name in (_REPUTATION, _REPUTABLE)}
        weights = {name: w + found[name] if name in found else w for name, w in state.weights.items()}
        memory = {**state.memory, _STANDING: standing, _AGGREGATE: found}
        return replace(state, round=reduced.ask.round, weights=weights, memory=memory)

    def examine(self, state: State) -> Ask:
        """Return the ask by which each client scores its own model, with its last reward."""
        ask = super().examine(state)
        return self._rewards(state, replace(ask, message=Message({}))) if self.strength else ask

    def uses(self, message: Message, client: Client) -> Tensors:
        """Return the client's own model with its reward."""
        return _rewarded(message.tensors, client) if self.strength else message.tensors

    def _rewards(self, state: State, ask: Ask) -> Ask:
        """Return an ask that carries each client's reward; nothing before the first aggregate."""
        aggregate = state.memory.get(_AGGREGATE)
        if aggregate is None:
            return ask
        shares = state.memory[_STANDING][_REPUTATION].clamp(min=0.0)
        shares = (shares / shares.max().clamp(min=1e-300)) ** self.strength
        slices = LazyTensors(ask.clients, lambda client: largest(aggregate, float(shares[client])))
        return replace(ask, message=replace(ask.message, tensors=aggregate), slices=slices)


@dataclass(frozen=True)
class Standing(Keep):
    """The aggregate of updates by reputation, the new reputations, and under suspicion who is removed for their sake.

    Attributes:
        norm, alpha, threshold: see ``RFFL``.
    """

    norm: float = field(kw_only=True)
    alpha: float = field(kw_only=True)
    threshold: float = field(kw_only=True)

    def finish(self, accumulator: Accumulator, state: State) -> Sifted:  # type: ignore[override]
        """Return the aggregate by name, ``reputation`` and ``reputable``; nothing without replies."""
        kept = super().finish(accumulator, state)
        if not kept:
            return Sifted({})
        before, members = state.memory[_STANDING][_REPUTATION], state.memory[_STANDING][_REPUTABLE]
        factors = {client: shortening(kept[client], self.norm) for client in kept}
        total: dict[str, torch.Tensor] = {}
        for client, factor in factors.items():
            for name, change in kept[client].items():
                part = change.double() * factor * before[client]
                total[name] = total[name] + part if name in total else part
        likeness = {client: cosine(kept[client], total) for client in kept}
        after = reputations(before, likeness, members, self.alpha)
        out: dict[int, str] = {}
        if state.round + 1 >= _FIRST_REMOVAL:
            least = self.threshold / max(1, int(members.sum()))
            low = [client for client in likeness if bool(members[client]) and float(after[client]) < least]
            out = {who: f"rffl: its reputation fell to {float(after[who]):.3g}, below {least:.3g}" for who in low}
            members = members.clone()
            members[low] = False
            after = normalised(torch.where(members, after, torch.zeros(()).double()), after)
        aggregate = {name: part.float() for name, part in total.items()}
        return Sifted({**aggregate, _REPUTATION: after, _REPUTABLE: members}, out)


def reputations(
    before: torch.Tensor, likeness: Mapping[int, float], members: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Return the reputations after a round, which add up to 1.

    Args:
        before: r, shape (clients,).
        likeness: the cosine of each client of the round with the aggregate.
        members: who is reputable; others have none.
        alpha: the weight of the past.
    """
    after = before.clone()
    for client, one in likeness.items():
        after[client] = alpha * before[client] + (1 - alpha) * one
    return normalised(torch.where(members, after, torch.zeros(()).double()), before)


def normalised(reputation: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Return reputations divided by their sum; those of before if that is not above 0."""
    total = float(reputation.sum())
    return reputation / total if total > 0 else before


def cosine(one: Tensors, other: Tensors) -> float:
    """Return the cosine of two updates; 0 if one of them is 0."""
    inner = sum(float((change.double() * other[name].double()).sum()) for name, change in one.items())
    lengths = _length(one) * _length(other)
    return inner / lengths if lengths > 0 else 0.0


def shortening(update: Tensors, norm: float) -> float:
    """Return the factor by which an update is made as long as ``norm``; 1 if it is no longer."""
    length = _length(update)
    return norm / length if length > norm else 1.0


def scaled(update: Tensors, factor: float) -> dict[str, torch.Tensor]:
    """Return an update times a factor."""
    return {name: change * factor for name, change in update.items()}


def largest(update: Tensors, share: float) -> Mask:
    """Return the mask of the ceil(share n) largest of each tensor's n entries, by magnitude.

    >>> largest({"w": torch.tensor([0.1, -3.0, 2.0])}, 0.5)["w"].tolist()
    [False, True, True]
    """
    found = {}
    for name, change in update.items():
        gone = change.numel() - math.ceil(share * change.numel() - 1e-9)
        found[name] = ~lowest(change.abs().reshape(-1), gone).reshape(change.shape)
    return found


def _length(update: Tensors) -> float:
    return math.sqrt(sum(float(change.double().square().sum()) for change in update.values()))


def _shared(setting: Setting) -> list[str]:
    """Return the names of the tensors that clients learn together."""
    return [name for name in setting.specs if name not in setting.layout.names("buffer")]


def _rewarded(reward: Tensors, client: Client) -> dict[str, torch.Tensor]:
    """Return a client's own model with a reward added."""
    own = {name: client.memory.get(name, first) for name, first in client.initial.items()}
    return {name: w + reward[name] if name in reward else w for name, w in own.items()}
