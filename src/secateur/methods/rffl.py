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

from dataclasses import dataclass, replace

import torch

from secateur.contract.ask import REPORT, Ask
from secateur.contract.client import Client, report
from secateur.contract.method import Method
from secateur.contract.reducer import Reduced
from secateur.contract.state import Archive, Setting, State
from secateur.errors import check
from secateur.methods.kit.personal import LazyTensors
from secateur.methods.kit.reputation import (
    REPUTABLE,
    REPUTATION,
    STANDING,
    Standing,
    largest,
    scaled,
    shortening,
)
from secateur.methods.kit.rounds import MEAN, merged, plain_ask, train_ask, train_reply
from secateur.pruning.mask import Tensors
from secateur.wire.message import Expected, Message

_AGGREGATE = "aggregate"


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
        standing = {REPUTATION: alike, REPUTABLE: torch.ones(setting.clients, dtype=torch.bool)}
        return State(setting, 0, weights, memory={STANDING: standing} if self.strength else {}, archive=archive)

    def accepts(self, setting: Setting) -> Expected:
        """Accept the model, or the part of an aggregate that is a client's reward."""
        return Expected(setting.specs, mask="optional", optional=True)

    def plan(self, state: State) -> Ask | None:
        """Send each client of the next cohort its reward, and ask for its update."""
        round_, setting = state.round + 1, state.setting
        if not self.strength:
            return train_ask(state, round_, None) if round_ <= setting.rounds else None
        expects = Expected({name: setting.specs[name] for name in _shared(setting)}, scalars=REPORT)
        reduce = {MEAN: Standing(norm=self.norm, alpha=self.alpha, threshold=self.threshold)}
        ask = plain_ask(state, Message({}), expects, reduce, dense=True)
        return ask and self._rewards(state, ask)

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
        standing = {name: found.pop(name) for name in (REPUTATION, REPUTABLE)}
        weights = {name: w + found[name] if name in found else w for name, w in state.weights.items()}
        memory = {**state.memory, STANDING: standing, _AGGREGATE: found}
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
        shares = state.memory[STANDING][REPUTATION].clamp(min=0.0)
        shares = (shares / shares.max().clamp(min=1e-300)) ** self.strength
        slices = LazyTensors(ask.clients, lambda client: largest(aggregate, float(shares[client])))
        return replace(ask, message=replace(ask.message, tensors=aggregate), slices=slices)


def _shared(setting: Setting) -> list[str]:
    """Return the names of the tensors that clients learn together."""
    return [name for name in setting.specs if name not in setting.layout.names("buffer")]


def _rewarded(reward: Tensors, client: Client) -> dict[str, torch.Tensor]:
    """Return a client's own model with a reward added."""
    own = {name: client.memory.get(name, first) for name, first in client.initial.items()}
    return {name: w + reward[name] if name in reward else w for name, w in own.items()}
