"""FedDIP: dynamic pruning with error feedback on clients, and a server that raises the sparsity step by step.

    start   a random mask with ERK densities at s_0
    train   gradients at w * M, steps on dense w; the dense result goes up
    prune   every R rounds keep the N - floor(s_t N) largest |w|;  s_t = s_p + (s_0 - s_p) (1 - t/T)^3

Paper symbol -> option: s_p: sparsity; s_0: initial; R: every.

Reference: Long et al., "FedDIP: Federated Learning with Extreme Dynamic Pruning and Incremental Regularization",
arXiv 2309.06805; feedback: Lin et al., arXiv 2006.07253. *Read*: the published code.
Departures: the regularisation that grows in steps is left out (training.weight_decay is constant); what goes down is
the pruned model, so a client's dense weights start from zeros; biases and normalisation are protected.
Not reproduced: the paper's figures with 1000 rounds; we did not run that setting.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from secateur.aggregation import Mean
from secateur.errors import check
from secateur.method import Archive, Ask, Client, Method, Replies, Setting, State, mean_of, merge, report, train_ask
from secateur.pruning.allocation import ERK, Global
from secateur.pruning.criteria import Random
from secateur.pruning.mask import Tensors
from secateur.wire.message import Message


@dataclass(frozen=True)
class FedDIP(Method):
    """Error feedback within rounds, a cubic ramp across them.

    Attributes:
        sparsity: s_p, fraction of weights removed in the end; 0 is FedAvg.
        initial: s_0, fraction removed at the start.
        every: R, rounds between prunings.
    """

    sparsity: float = 0.9
    initial: float = 0.5
    every: int = 10

    def __post_init__(self) -> None:
        check(0 <= self.sparsity < 1, name="sparsity", value=self.sparsity, must="be in [0, 1)")
        check(0 <= self.initial < 1, name="initial", value=self.initial, must="be in [0, 1)")
        check(self.every >= 1, name="every", value=self.every, must="be 1 or more")

    @property
    def regrows(self) -> bool:
        """Return True: a pruned weight that feedback made large comes back."""
        return True

    def start(self, setting: Setting, weights: Tensors, archive: Archive) -> State:
        """Return theta_0 with a random ERK mask."""
        named = {name: weights[name] for name in setting.layout.names("weight")}
        level = min(self.initial, self.sparsity)
        mask = ERK().keep(Random().scores(named, (), seed=setting.seed), level) if self.sparsity else None
        return State(setting, 0, weights, mask, archive=archive)

    def plan(self, state: State) -> Ask | None:
        """Ask one cohort for each round; dense weights come back."""
        if state.round == state.setting.rounds:
            return None
        ask = train_ask(state, state.round + 1, state.mask)
        return replace(ask, expects=replace(ask.expects, mask="none", known=None, within=False), dense=True)

    def respond(self, ask: Ask, client: Client) -> Message:
        """Train with feedback."""
        weights, done = client.train(ask.message.tensors, ask.message.mask, round_=ask.round, feedback=True)
        return Message(weights, None, report(done))

    def absorb(self, state: State, replies: Replies) -> State:
        """Merge, and prune where it is due."""
        state = merge(state, replies.ask, mean_of(replies), Mean(pruned="zero"))
        rounds = state.setting.rounds
        if not self.sparsity or (state.round % self.every and state.round != rounds):
            return state
        sizes = {name: state.weights[name].abs() for name in state.setting.layout.names("weight")}
        return replace(state, mask=Global().keep(sizes, self.level(state.round, rounds)))

    def level(self, done: int, rounds: int) -> float:
        """Return s_t."""
        return self.sparsity + (min(self.initial, self.sparsity) - self.sparsity) * (1 - done / rounds) ** 3
