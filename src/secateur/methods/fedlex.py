"""FedLEx: loss exploration -> a guidance matrix that scales each client's gradients; nothing is pruned.

    explore    D_k = (theta_0 - theta_k)^2           explorers, each from its own copy of theta_0, once
    guidance   G = minmax(mean_{k in S_t} D_k)       per tensor; S_t: the explorers in the round's cohort, else all
    round      each local step takes the gradient G g;  then the aggregator's step

Symbol -> option: E_exp explore.epochs; C_exp explore.fraction; strength 1 is G as written, 0 is without guidance.

Reference: Internò et al., "Federated Loss Exploration for Improved Convergence on Non-IID Data", IJCNN 2024,
DOI 10.1109/IJCNN60899.2024.10651455. *Read*: the published code, ChristianInterno/FedLEx (GTL_utils.py,
fedlexclient.py, fedlexserver.py), and its figure; not the paper. It trains with Adam 0.0003.
Departures: the code's explorers explore and then return ones, a placeholder, so that its G is minmax((1 - theta_0)^2);
here they return their deviations, as in the figure. The figure takes minmax before the mean and multiplies what
training changed. G travels in full precision with every request and doubles what goes down; it is counted.
Not reproduced: its figures were not run, and it is *not shown* that it helps or harms. With plain SGD G in [0, 1] is a
smaller rate for each weight and no more: a run at a rate that suits FedAvg trains too slowly. Adam divides G out again
but where G g is as small as its epsilon, or 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch

from secateur.aggregation import Aggregator
from secateur.aggregation.steps import ServerMomentum
from secateur.aggregation.weighted import WeightedMean
from secateur.contract.ask import Ask
from secateur.contract.client import Client, report
from secateur.contract.method import Method
from secateur.contract.reducer import Reduced
from secateur.contract.state import Setting, State
from secateur.errors import check
from secateur.learning.resident import tensors_of
from secateur.learning.supermask import straight_through
from secateur.methods.kit import exploration
from secateur.methods.kit.rounds import merged, train_ask, train_reply
from secateur.pruning.criteria import Exploration
from secateur.pruning.mask import Tensors
from secateur.wire.message import Expected, Message

_G = "guidance/"


@dataclass(frozen=True)
class FedLEx(Method):
    """Scales each client's gradients by a guidance matrix.

    Attributes:
        explore: the settings of the exploration.
        strength: s in 1 - s (1 - G), the factor of a gradient; 0 is training without guidance.
        aggregator: the server's step.
    """

    explore: Exploration = field(default=Exploration(epochs=150, patience=40, fraction=1.0))
    strength: float = 1.0
    aggregator: Aggregator = field(default=ServerMomentum(beta=0.9))

    def __post_init__(self) -> None:
        check(0 <= self.strength <= 1, name="strength", value=self.strength, must="be in [0, 1]")

    def accepts(self, setting: Setting) -> Expected:
        """Accept the weights, and optionally their guidance."""
        guided = {_G + name: spec for name, spec in setting.specs.items()}
        return Expected({**setting.specs, **guided}, optional=True, template=setting.specs)

    def plan(self, state: State) -> Ask | None:
        """Ask the explorers first, then one cohort for each round, with its guidance."""
        ask = exploration.ask(self.explore, state) if self.strength else None
        if ask is not None or state.round == state.setting.rounds:
            return ask
        ask = train_ask(state, state.round + 1, None)
        guided = {_G + name: g for name, g in self.guidance(state, ask.clients).items()}
        return replace(ask, message=replace(ask.message, tensors={**ask.message.tensors, **guided}))

    def respond(self, ask: Ask, client: Client) -> Message:
        """Explore, or train with scaled gradients."""
        if ask.phase == exploration.PHASE:
            return exploration.respond(self.explore, ask, client)
        sent = {name: t for name, t in ask.message.tensors.items() if not name.startswith(_G)}
        guidance = {name.removeprefix(_G): g for name, g in ask.message.tensors.items() if name.startswith(_G)}
        if not guidance:
            return train_reply(ask, client)
        learnt, done = client.learn(
            sent, {n: sent[n] for n in client.setting.layout.trainable}, partial(scaled, guidance), round_=ask.round
        )
        return Message({**tensors_of(client.model), **learnt}, None, report(done))

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Keep the deviations, or merge."""
        if reduced.ask.phase == exploration.PHASE:
            return exploration.absorb(self.explore, state, reduced)
        return merged(state, reduced, self.aggregator)

    def guidance(self, state: State, cohort: tuple[int, ...]) -> Tensors:
        """Return the factors of the gradients, by name; empty if there are no deviations."""
        mean = WeightedMean()
        for deviation in exploration.deviations(state, cohort) if self.strength else ():
            mean.add(deviation, 1.0)
        spans = {n: (d - d.min()) / (d.max() - d.min()).clamp(min=1e-38) for n, d in mean.mean().items()}
        return {n: 1 - self.strength * (1 - g) for n, g in spans.items()}


def scaled(guidance: Tensors, weights: Tensors) -> dict[str, torch.Tensor]:
    """Return the weights unchanged, with gradients that are multiplied by the guidance."""
    return {n: straight_through(t.detach(), t * guidance[n]) for n, t in weights.items()}
