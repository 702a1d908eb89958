"""FedDIP: clients train with error feedback and growing regularisation, and the server prunes in steps.

    start   a random mask with ERK densities at s_0
    train   gradients at w * M, steps on dense w; the dense result goes up
    pull    lambda_t sum_l |w_l * M_l|_2 over tensors l, added to the loss;  lambda_t = 0 in the first twentieth of the
            rounds, 5e-4 in the second, and in equal steps on towards lambda_max
    prune   after rounds 1, 1 + R, 1 + 2R ... keep the N - floor(s_t N) largest |w| of all that were kept (after round
            1: of all);  s_t = s_p + (s_0 - s_p) (1 - t/T)^3,  t = 0 after round 1;  after the last round s_p

Paper symbol -> option: s_p: sparsity; s_0: initial; R: every; lambda_max: regularisation.

Reference: Long et al., "FedDIP: Federated Learning with Extreme Dynamic Pruning and Incremental Regularization",
arXiv 2309.06805; feedback: Lin et al., arXiv 2006.07253.
*Read*: EricLoong/feddip (fl_server.py, client.py, functions_new.py, exp_args.py), whose steps of lambda end one short
of lambda_max. R is of its command for CIFAR-10. The paper's text was not read.
Departures: clients share the first random mask, in the code each draws its own; the last round prunes to s_p, whatever
R; biases and normalisation are protected. Its runs add ``training.weight_decay = 5e-4`` and ``training.decay = 0.998``.
Not reproduced: the paper's figures with 1000 rounds; we did not run that setting.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from secateur.contract.ask import Ask
from secateur.contract.client import Client, report
from secateur.contract.method import Method
from secateur.contract.reducer import Reduced
from secateur.contract.state import Archive, Setting, State
from secateur.errors import check
from secateur.methods.kit.criteria import Random
from secateur.methods.kit.hooks import Fading, Feedback
from secateur.methods.kit.rounds import merged, train_ask
from secateur.pruning import mask as masks
from secateur.pruning.allocation import ERK, Global
from secateur.pruning.mask import Tensors
from secateur.wire.message import Message

_STEPS, _FIRST = 20, 5e-4


@dataclass(frozen=True)
class FedDIP(Method):
    """Trains with error feedback within rounds, and prunes on a cubic ramp over rounds.

    Attributes:
        sparsity: s_p, the fraction of weights removed in the end; 0 is FedAvg.
        initial: s_0, the fraction removed at the start.
        every: R, the number of rounds between prunings.
        regularisation: lambda_max, the final strength of the regularisation; 0: none.
    """

    sparsity: float = 0.9
    initial: float = 0.5
    every: int = 5
    regularisation: float = 1e-3

    def __post_init__(self) -> None:
        check(0 <= self.sparsity < 1, name="sparsity", value=self.sparsity, must="be in [0, 1)")
        check(0 <= self.initial < 1, name="initial", value=self.initial, must="be in [0, 1)")
        check(self.every >= 1, name="every", value=self.every, must="be 1 or more")
        value = self.regularisation
        check(value >= 0, name="regularisation", value=value, must="be 0 or more")

    @property
    def regrows(self) -> bool:
        """Return True: after round 1 pruned weights may come back, if feedback made them large."""
        return True

    def start(self, setting: Setting, weights: Tensors, archive: Archive) -> State:
        """Return the first state: theta_0 with a random ERK mask."""
        named = {name: weights[name] for name in setting.layout.names("weight")}
        level = min(self.initial, self.sparsity)
        mask = ERK().keep(Random().scores(named, (), seed=setting.seed), level) if self.sparsity else None
        return State(setting, 0, weights, mask, archive=archive)

    def plan(self, state: State) -> Ask | None:
        """Ask the next cohort to train under the mask and to return dense weights."""
        if state.round == state.setting.rounds:
            return None
        ask = train_ask(state, state.round + 1, state.mask)
        return replace(ask, expects=replace(ask.expects, mask="none", known=None, within=False), dense=True)

    def respond(self, ask: Ask, client: Client) -> Message:
        """Train with error feedback and the regularisation."""
        mask, strength = ask.message.mask, self.strength(ask.round - 1, client.setting.rounds)
        hooks = [Feedback(), *([Fading(mask, strength)] if mask and strength else [])]
        weights, done = client.train(ask.message.tensors, mask, round_=ask.round, hooks=hooks)
        return Message(weights, None, report(done))

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Merge, and prune if the round is due."""
        state = merged(state, reduced)
        done, rounds = state.round, state.setting.rounds
        if not self.sparsity:
            return state
        if done > 1:  # pruned weights are set to 0 before magnitudes are compared
            state = replace(state, weights=masks.apply(state.weights, state.mask))
        if (done - 1) % self.every and done != rounds:
            return state
        sizes = {name: state.weights[name].abs() for name in state.setting.layout.names("weight")}
        level = self.sparsity if done == rounds else self.level(done - 1, rounds)
        mask = Global(guard=False).keep(sizes, level)
        return replace(state, mask=mask, weights=masks.apply(state.weights, mask))

    def level(self, done: int, rounds: int) -> float:
        """Return s_t, the sparsity after t = ``done`` rounds on the ramp."""
        return self.sparsity + (min(self.initial, self.sparsity) - self.sparsity) * (1 - done / rounds) ** 3

    def strength(self, done: int, rounds: int) -> float:
        """Return lambda_t; with fewer than 20 rounds it has its last value from the start, as in the published code."""
        length = rounds // _STEPS
        step = min(done // length, _STEPS - 1) if length else _STEPS - 1
        if not self.regularisation or not step:
            return 0.0
        return _FIRST + (self.regularisation - _FIRST) / (_STEPS - 1) * (step - 1)
