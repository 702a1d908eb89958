"""DPF: dynamic pruning with feedback; weights stay dense on both sides, and each round makes a new mask from them.

    mask     m keeps the N - floor(s_t N) largest |w| of the dense weights that were sent; s_t = s (1 - (1 - t/T')^3)
    train    gradients at w * m, steps on dense w (the error feedback); the dense result goes up
    merge    FedAvg of the dense weights; the model is w * m
    rest     from T' = 3/4 of all rounds on the mask is fixed: FedAvg under m

Paper symbol -> option: final sparsity s: sparsity.

Reference: Lin et al., "Dynamic Model Pruning with Feedback", arXiv 2006.07253. Known from its abstract and from what
others write of it: a *reconstruction*, as is its federation.
*Read*: an unofficial code, INCHEON-CHO/Dynamic_Model_Pruning_with_Feedback, pruning/utils.py and pruning/dpf/mnn.py,
whose mask has one weight less, that at the threshold. From there we take that the mask is fixed for the last quarter.
Departures: the mask changes once a round, where the paper changes it every 16 steps; biases and normalisation are
protected; the best weight of each output unit stays where there is room for 20 a unit (the guard of ``Global``).
Error feedback needs dense weights at both ends, so nothing is saved on the wire before masks rest.
Not reproduced: 93.7 % at 90 % (CIFAR-10, ResNet-56, one machine) stands in an unofficial code; we did not run it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from secateur.contract.ask import GUARDED, Ask
from secateur.contract.client import Client, report
from secateur.contract.method import Method
from secateur.contract.reducer import Reduced
from secateur.contract.state import Archive, Setting, State
from secateur.errors import check
from secateur.methods.kit.hooks import Feedback
from secateur.methods.kit.rounds import merged, train_ask, train_reply
from secateur.pruning.allocation import Global, kept_by_guard
from secateur.pruning.mask import Mask, Tensors
from secateur.wire.message import Message


@dataclass(frozen=True)
class DPF(Method):
    """Trains dense weights under a mask that follows their magnitudes.

    Attributes:
        sparsity: s, the fraction of weights removed in the end; 0 is FedAvg.
    """

    sparsity: float = 0.9

    def __post_init__(self) -> None:
        check(0 <= self.sparsity < 1, name="sparsity", value=self.sparsity, must="be in [0, 1)")

    @property
    def regrows(self) -> bool:
        """Return True: a pruned weight that grew comes back."""
        return True

    def start(self, setting: Setting, weights: Tensors, archive: Archive) -> State:
        """Return the first state: theta_0 under a mask of sparsity 0."""
        return State(setting, 0, weights, self.mask(setting, weights, 0), archive=archive)

    def plan(self, state: State) -> Ask | None:
        """Send the dense weights, from which both sides make one mask; at the end send the weights under the mask."""
        if state.round == state.setting.rounds:
            return None
        if state.mask is not None and state.round >= self.rests(state.setting):
            return train_ask(state, state.round + 1, state.mask)
        return replace(train_ask(state, state.round + 1, None), dense=True)

    def respond(self, ask: Ask, client: Client) -> Message:
        """Train with feedback under the mask made from the sent weights; under a fixed mask, train as usual."""
        if ask.message.mask is not None:
            return train_reply(ask, client)
        sent = ask.message.tensors
        mask = self.mask(client.setting, sent, ask.round - 1)
        weights, done = client.train(sent, mask, round_=ask.round, hooks=[Feedback()] if mask is not None else [])
        return Message(weights, None, report(done))

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Merge, and make the next mask."""
        state = merged(state, reduced)
        if reduced.ask.message.mask is not None:
            return state
        setting, weights, done = state.setting, state.weights, state.round
        mask = self.mask(setting, weights, done)
        by_guard = kept_by_guard(mask or {}, self.mask(setting, weights, done, guard=False) or {})
        return replace(state, mask=mask, notes={**state.notes, GUARDED: by_guard})

    @staticmethod
    def rests(setting: Setting) -> int:
        """Return T', the round after which the mask is fixed."""
        return max(1, 3 * setting.rounds // 4)

    def mask(self, setting: Setting, weights: Tensors, done: int, *, guard: bool = True) -> Mask | None:
        """Return the mask made from dense weights after ``done`` rounds; None if the sparsity is 0."""
        if not self.sparsity:
            return None
        level = self.sparsity * (1 - (1 - min(1.0, done / self.rests(setting))) ** 3)
        sizes = {name: weights[name].abs() for name in setting.layout.names("weight")}
        return Global(guard).on(setting.layout).keep(sizes, level)
