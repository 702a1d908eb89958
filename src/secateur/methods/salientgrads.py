"""SalientGrads (SSFL): a mask is made from all clients' gradients before round 1, then FedAvg trains under it.

    score   s_k = |g_k * theta_0|    g_k: gradient of client k's loss over a few batches at theta_0 (SNIP)
    mask    M = the N - floor(s N) largest of mean_k s_k, all tensors together; fixed
    round   FedAvg under M

Paper symbol -> option: sparsity of the mask: sparsity; minibatches for a score: batches.

Reference: Ohib et al., "SSFL", arXiv 2405.09037 (SalientGrads, 2023); SNIP: Lee et al., arXiv 1810.02340.
*Read*: riohib/SalientGrads, fedml_api/standalone/sailentgrads (snip.py, client.py, sailentgrads_api.py); the paper was
not available.
Departures: the best weight of each output unit stays where there is room for 20 a unit (allocation.guard); N -
floor(s N) weights stay, there floor((1 - s) N).
Not reproduced: 88.29 % against 86.04 % dense (CIFAR-10, ResNet-18, 50 %) is claimed; we did not run that setting.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from secateur.contract.ask import GUARDED, SCORE, Ask
from secateur.contract.client import Client, report
from secateur.contract.method import Method
from secateur.contract.reducer import Reduced
from secateur.contract.reduction import Mean
from secateur.contract.state import State
from secateur.errors import check
from secateur.methods.kit.rounds import MEAN, merged, score_ask, train_ask, train_reply
from secateur.pruning.allocation import Allocation, Global, kept_by_guard
from secateur.wire.message import Message


@dataclass(frozen=True)
class SalientGrads(Method):
    """Makes one global mask from the SNIP scores of every client.

    Attributes:
        sparsity: the fraction of weights removed.
        batches: the number of batches for a client's scores.
        allocation: chooses the weights to keep, by the mean scores.
    """

    sparsity: float = 0.5
    batches: int = 1
    allocation: Allocation = field(default=Global())

    def __post_init__(self) -> None:
        check(0 <= self.sparsity < 1, name="sparsity", value=self.sparsity, must="be in [0, 1)")

    def plan(self, state: State) -> Ask | None:
        """Ask every client for its scores once, then one cohort for each round."""
        if self.sparsity and SCORE not in state.notes:
            everyone = range(state.setting.clients)
            return score_ask(state, 0, everyone, reduce={MEAN: Mean(by="clients")}, least=0.0)
        return train_ask(state, state.round + 1, state.mask) if state.round < state.setting.rounds else None

    def respond(self, ask: Ask, client: Client) -> Message:
        """Score, or train under the mask."""
        sent, mask = ask.message.tensors, ask.message.mask
        if ask.phase == SCORE:
            gradients, done = client.gradient_statistic("gradient", sent, mask, round_=0, batches=self.batches)
            names = client.setting.layout.names("weight")
            return Message({n: (gradients[n] * sent[n]).abs() for n in names}, None, report(done))
        return train_reply(ask, client)

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Make the mask from the mean scores, or merge."""
        if reduced.ask.phase != SCORE:
            return merged(state, reduced)
        scores = reduced[MEAN]
        mask = self.allocation.on(state.setting.layout).keep(scores, self.sparsity) if scores else None
        notes = {**state.notes, SCORE: True}
        if mask and (unguarded := self.allocation.unguarded) is not None:
            notes[GUARDED] = kept_by_guard(mask, unguarded.keep(scores, self.sparsity))
        return replace(state, mask=mask, notes=notes)
