"""FedPM: weights are random signs that never move; clients learn the probability that each weight is used.

    weights  sign(theta_0) e/sqrt(fan-in)
    client   s = logit(p); each step draws m ~ Bernoulli(sigmoid(s)), runs the network of weights w m, and moves s by
             the gradient at m, with dm/dp taken for p; in the end one m is drawn and sent: at most a bit a weight
    server   p = (sum_k v_k + l - 1)/(K + 2 l - 2), v_k = 0.99 where client k kept a weight, else 0.01: the mode of a
             Beta posterior that begins anew in each round; before the first, p = sigmoid(N(0, 1))
    model    w where p >= 1/2, 0 elsewhere

Paper symbol -> option: lambda_0: prior; the scores' optimiser: training.* (Adam at 0.1, as published).

Reference: Isik et al., "Sparse Random Networks for Communication-Efficient Federated Learning", arXiv 2209.15328.
*Read*: the published code (BerivanIsik/sparse-random-networks, src/fedssm: client, server, models, utils/random).
Departures: the model that is scored keeps what is likelier kept than not, where the paper draws a mask; biases and
normalisation stay as they were made, where the published code masks random biases too; Adam begins anew in each round.
The signs are those of theta_0, which both sides make from the seed.
Not reproduced: the paper's CIFAR-10 figures; we did not run its settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from secateur.contract.ask import REPORT, Ask
from secateur.contract.checks import Range
from secateur.contract.client import Client, report
from secateur.contract.method import Method
from secateur.contract.reducer import Reduced
from secateur.contract.reduction import Sum, masks_of
from secateur.contract.state import Archive, Setting, State
from secateur.errors import check
from secateur.learning.supermask import signed_constants, straight_through
from secateur.methods.kit.rounds import plain_ask
from secateur.pruning.mask import Tensors
from secateur.streams import stream
from secateur.wire.message import Expected, Message

_CHANCE = "chance"
_LEAST = 0.01


_KEPT = {"kept": Sum(masks_of)}


@dataclass(frozen=True)
class FedPM(Method):
    """Learns probabilistic masks over random weights.

    Attributes:
        prior: lambda_0 of the Beta posterior; 1 makes p the share of clients that kept a weight.
    """

    prior: float = 1.0

    recommended: ClassVar[Mapping[str, str | float]] = {"optimiser": "adam", "lr": 0.1}

    def __post_init__(self) -> None:
        check(self.prior >= 1, name="prior", value=self.prior, must="be at least 1")

    @property
    def regrows(self) -> bool:
        """Return True: every round makes a new mask."""
        return True

    @property
    def trains_weights(self) -> bool:
        """Return False: masks are learnt."""
        return False

    def start(self, setting: Setting, weights: Tensors, archive: Archive) -> State:
        """Return the first state: signed constants, each kept with the probability of a normal score."""
        names = setting.layout.names("weight")
        shapes = {name: setting.specs[name].shape for name in names}
        scores = {n: torch.randn(shape, generator=stream(setting.seed, "scores", n)) for n, shape in shapes.items()}
        chance = {name: torch.sigmoid(score) for name, score in scores.items()}
        state = State(setting, 0, signed_constants(weights, names, math.e), memory={_CHANCE: chance}, archive=archive)
        return self._with_chances(state, 0)

    def accepts(self, setting: Setting) -> Expected:
        """Accept the whole model, or probabilities alone."""
        return replace(super().accepts(setting), optional=True)

    def plan(self, state: State) -> Ask | None:
        """Send the probabilities to the next cohort."""
        chance = state.memory[_CHANCE]
        specs = {name: state.setting.specs[name] for name in chance}
        empty = (Range(frozenset(specs), 0.0, 0.0),)  # the mask says it all
        expects = Expected(specs, mask="required", maskable=frozenset(specs), scalars=REPORT, checks=empty)
        return plain_ask(state, Message(chance), expects, {"kept": Sum(masks_of)}, dense=True)

    def respond(self, ask: Ask, client: Client) -> Message:
        """Learn scores; return one drawn mask over tensors of zeros, which cost no bytes."""
        scores = {n: torch.logit(p.clamp(_LEAST, 1 - _LEAST)) for n, p in ask.message.tensors.items()}
        weights = signed_constants(client.initial, list(scores), math.e)
        draw = stream(client.setting.seed, "bernoulli", ask.round, client.id)

        def effective(scores: Tensors) -> dict[str, torch.Tensor]:
            chances = {n: torch.sigmoid(s) for n, s in scores.items()}
            drawn = {n: (torch.rand(p.shape, generator=draw) < p).float() for n, p in chances.items()}
            return {n: weights[n] * straight_through(drawn[n], p.square() / 2) for n, p in chances.items()}

        learnt, done = client.learn(weights, scores, effective, round_=ask.round)
        kept = {n: torch.rand(s.shape, generator=draw) < torch.sigmoid(s) for n, s in learnt.items()}
        return Message({n: torch.zeros_like(s) for n, s in learnt.items()}, kept, report(done))

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Make the probabilities from how many clients kept each weight."""
        clients = len(reduced.clients)
        if clients:
            votes = {n: _LEAST * clients + (1 - 2 * _LEAST) * k.float() for n, k in reduced["kept"].items()}
            chance = {n: (v + self.prior - 1) / (clients + 2 * self.prior - 2) for n, v in votes.items()}
            state = replace(state, memory={**state.memory, _CHANCE: chance})
        return self._with_chances(state, reduced.ask.round)

    def _with_chances(self, state: State, round_: int) -> State:
        return replace(state, round=round_, mask={n: p >= 0.5 for n, p in state.memory[_CHANCE].items()})
