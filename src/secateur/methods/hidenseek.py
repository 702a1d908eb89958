"""HideNseek: a mask is made before training, without data; then clients learn only the signs of the kept weights.

    prune    R = |theta_0 dL/d theta_0|, L the sum of outputs for an input of ones through |theta_0|; the d share of
             largest R stays, all weights together
    client   s = sigma |theta_0|, sigma the global signs; each step runs weights |theta_0| sign(s) and moves s by the
             gradient there (straight through); sign(s) goes back
    server   sigma = sign(sum_k n_k sign(s_k)), a tie keeps the old sign

Paper symbol -> option: d, the density, is 1 - sparsity.

Reference: Vallapuram et al., "HideNseek: Federated Lottery Ticket via Server-side Pruning and Sign Supermask",
arXiv 2206.04385. *Reconstruction* from the abstract: its body was *not read*, and no code was found.
Departures: the best weight of each output unit stays where there is room for 20 a unit (the guard of ``Global``).
Signs travel as numbers that pack to less than two bits. No personal part. Frozen weights keep the size of theta_0 at
every density, as the abstract multiplies signs by the unpruned weights. Where the scores start is ours: at
sigma |theta_0| in each round, so that a sign flips only if a round moves its score by |theta_0|. Adam moves a score by
about its rate in a step: 0.01 carries it over most of |theta_0| within one epoch of some twenty steps, 0.001 does not.
Not reproduced: up to 40.6 % better accuracy and 39.7 % less traffic are claimed; we did not run those settings. Whether
the paper's own fails at high sparsity is *not shown*: here one shot of the saliency leaves 43, 0.45 and 0.13 % of the
first of three layers (784-128-128-10) at 50, 90 and 95 %, the last by the guard's one weight a unit. SynFlow (arXiv
2006.05467) prunes in iterations so that no layer collapses; "one-shot" in the abstract may mean one shot of the
saliency or one pruning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from secateur.contract.ask import REPORT, Ask
from secateur.contract.checks import Signs
from secateur.contract.client import Client, report
from secateur.contract.method import Method
from secateur.contract.reducer import Reduced
from secateur.contract.reduction import Mean
from secateur.contract.state import Archive, Setting, State
from secateur.errors import check
from secateur.learning.supermask import straight_through
from secateur.methods.kit.rounds import MEAN, plain_ask
from secateur.pruning import mask as masks
from secateur.pruning.allocation import Global
from secateur.pruning.mask import Tensors
from secateur.wire.message import Expected, Message

_SIGN = "sign"


@dataclass(frozen=True)
class HideNseek(Method):
    """Learns signs of weights under a data-free mask.

    Attributes:
        sparsity: the fraction of weights removed before training.
    """

    sparsity: float = 0.5

    recommended: ClassVar[Mapping[str, str | float]] = {"optimiser": "adam", "lr": 0.01}

    def __post_init__(self) -> None:
        check(0 <= self.sparsity < 1, name="sparsity", value=self.sparsity, must="be in [0, 1)")

    @property
    def trains_weights(self) -> bool:
        """Return False: signs are learnt."""
        return False

    def start(self, setting: Setting, weights: Tensors, archive: Archive) -> State:
        """Return the first state: theta_0 and its signs."""
        signs = {name: _sign(weights[name]) for name in setting.layout.names("weight")}
        return State(setting, 0, weights, memory={_SIGN: signs}, archive=archive)

    def accepts(self, setting: Setting) -> Expected:
        """Accept the whole model, or signs alone."""
        return replace(super().accepts(setting), optional=True)

    @property
    def refines(self) -> bool:
        """Return True: the server makes the mask."""
        return True

    def refine(self, state: State, server: Client) -> tuple[State, int]:
        """Make the mask before round 1, by a saliency that needs no data."""
        if state.mask is not None:
            return state, 0
        flows, done = server.gradient_statistic("flow", state.weights, None, round_=0)
        scores = {name: flows[name] for name in state.memory[_SIGN]}
        mask = Global().on(state.setting.layout).keep(scores, self.sparsity)
        return replace(state, mask=mask, weights=masks.apply(state.weights, mask)), done.processed

    def plan(self, state: State) -> Ask | None:
        """Ask the next cohort for signs."""
        message = Message(masks.apply(state.memory[_SIGN], state.mask), state.mask)
        specs = {name: state.setting.specs[name] for name in message.tensors}
        signs = (Signs(frozenset(specs)),)
        expects = Expected(specs, mask="same", known=state.mask, scalars=REPORT, checks=signs)
        return plain_ask(state, message, expects, {MEAN: Mean()})

    def respond(self, ask: Ask, client: Client) -> Message:
        """Return the trained signs."""
        sent, mask = ask.message.tensors, ask.message.mask
        sizes = {name: masks.apply({name: client.initial[name].abs()}, mask)[name] for name in sent}
        scores = {name: sign * sizes[name] for name, sign in sent.items()}

        def effective(scores: Tensors) -> dict[str, torch.Tensor]:
            return {n: sizes[n] * straight_through(_sign(s), s) for n, s in scores.items()}

        learnt, done = client.learn(client.initial, scores, effective, round_=ask.round)
        return Message(masks.apply({name: _sign(s) for name, s in learnt.items()}, mask), mask, report(done))

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Set each sign to the clients' weighted vote."""
        mean, signs = reduced[MEAN], state.memory[_SIGN]
        signs = {n: torch.where(mean[n] == 0, s, _sign(mean[n])) for n, s in signs.items()} if mean else signs
        weights = {**state.weights, **{n: state.weights[n].abs() * s for n, s in signs.items()}}
        weights = masks.apply(weights, state.mask)
        return replace(state, round=reduced.ask.round, weights=weights, memory={**state.memory, _SIGN: signs})


def _sign(tensor: torch.Tensor) -> torch.Tensor:
    return torch.where(tensor < 0, -1.0, 1.0)
