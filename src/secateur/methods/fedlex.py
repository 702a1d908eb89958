"""FedLEx: loss exploration -> a guidance matrix that scales what each client changes; nothing is pruned.

    explore    D_k = (theta_0 - theta_k)^2           explorers, each from its own copy of theta_0, once
    guidance   G = mean_{k in S_t} minmax(D_k)       per tensor; S_t: the explorers in the round's cohort, else all
    round      w_k <- W + G (w_k - W);  then the aggregator's step

Symbol -> option: E_exp explore.epochs; C_exp explore.fraction; strength 1 is G as written, 0 is without guidance.

Reference: Internò et al., "Federated Loss Exploration for Improved Convergence on Non-IID Data", IJCNN 2024,
DOI 10.1109/IJCNN60899.2024.10651455. *Reconstruction*: from the abstract, a figure and the published code's intent.
Departures: G scales the update, as in the figure. The published code scales the gradient, which Adam cancels: its step
does not change when a coordinate's gradient is multiplied by a constant. Min-max stands before the mean, as in the
figure and unlike the code. G travels in full precision with every request and doubles what goes down; it is counted.
Not reproduced: no published figure is known to us.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from secateur import exploration
from secateur.aggregation import Aggregator, ServerMomentum, WeightedMean
from secateur.errors import check
from secateur.method import Ask, Client, Method, Replies, Setting, State, mean_of, merge, report, train_ask
from secateur.pruning.criteria import Exploration
from secateur.pruning.mask import Tensors
from secateur.wire.message import Expected, Message

_G = "guidance/"


@dataclass(frozen=True)
class FedLEx(Method):
    """Guided updates.

    Attributes:
        explore: who explores, and how long.
        strength: s in 1 - s (1 - G), what an update is multiplied by; 0 is the aggregator alone.
        aggregator: the merge.
    """

    explore: Exploration = field(default=Exploration(epochs=150, patience=40, fraction=1.0))
    strength: float = 1.0
    aggregator: Aggregator = field(default=ServerMomentum(beta=0.9))

    def __post_init__(self) -> None:
        check(0 <= self.strength <= 1, name="strength", value=self.strength, must="be in [0, 1]")

    def accepts(self, setting: Setting) -> Expected:
        """Return the weights, and the guidance of some."""
        guided = {_G + name: spec for name, spec in setting.specs.items()}
        return Expected({**setting.specs, **guided}, optional=True, template=setting.specs)

    def plan(self, state: State) -> Ask | None:
        """Ask explorers first, then one cohort for each round, with its guidance."""
        ask = exploration.ask(self.explore, state) if self.strength else None
        if ask is not None or state.round == state.setting.rounds:
            return ask
        ask = train_ask(state, state.round + 1, None)
        guided = {_G + name: g for name, g in self.guidance(state, ask.clients).items()}
        return replace(ask, message=replace(ask.message, tensors={**ask.message.tensors, **guided}))

    def respond(self, ask: Ask, client: Client) -> Message:
        """Explore, or train and scale what came of it."""
        if ask.phase == exploration.PHASE:
            return exploration.respond(self.explore, ask, client)
        sent = {name: t for name, t in ask.message.tensors.items() if not name.startswith(_G)}
        weights, done = client.train(sent, None, round_=ask.round)
        for name in weights:
            if _G + name in ask.message.tensors:
                weights[name] = sent[name] + ask.message.tensors[_G + name] * (weights[name] - sent[name])
        return Message(weights, None, report(done))

    def absorb(self, state: State, replies: Replies) -> State:
        """Keep the deviations, or merge."""
        if replies.ask.phase == exploration.PHASE:
            return exploration.absorb(self.explore, state, replies)
        return merge(state, replies.ask, mean_of(replies), self.aggregator)

    def guidance(self, state: State, cohort: tuple[int, ...]) -> Tensors:
        """Return what updates are multiplied by; nothing where nobody explored."""
        mean = WeightedMean()
        for deviation in exploration.deviations(self.explore, state, cohort) if self.strength else ():
            spans = {n: (d - d.min()) / (d.max() - d.min()).clamp(min=1e-38) for n, d in deviation.items()}
            mean.add(spans, 1.0)
        return {n: 1 - self.strength * (1 - g) for n, g in mean.mean().items()}
