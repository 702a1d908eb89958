"""FedDST: clients prune and regrow their masks after training, and the server prunes their union to the budget.

    start    of each tensor of theta_0 the ERK count of largest |w|
    adjust   in rounds 2, 2 + R, 2 + 2R ..., after the last local epoch: of each tensor drop the a_t share of smallest
             |w|, grow as many of largest |g| among those that were pruned, at 0;  a_t = a/2 (1 + cos(pi t/T_end)) after
             t rounds
    merge    w <- sum_k n_k M_k w_k / sum_k n_k M_k, per weight;  M <- union of M_k
    budget   of each tensor the ERK count of largest |w| stays

Paper symbol -> option: S: sparsity; R_adj: every; alpha: alpha; T_end: until, as a share of the rounds; batches for g:
batches.

Reference: Bibikar et al., "Federated Dynamic Sparse Training", arXiv 2112.09824.
*Read*: bibikar/feddst (dst.py, models.py, README); S, alpha and R_adj are those of its command for CIFAR-10. The
paper's text was not read.
Departures: ERK is RigL's, where the code scales sparsities instead of densities and is nearly uniform; biases and
normalisation are protected; g is of a batch that is drawn anew. Slips that are not repeated: clients drawn twice; a_t
that decides only whether to adjust, while a stays the share; growth that may choose, and reset, kept weights.
Not reproduced: 68.3 % at 80 % sparsity (CIFAR-10, ResNet-18) stands in FedRTS; we did not run that setting.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from secateur.contract.ask import Ask
from secateur.contract.checks import KeptByTensor
from secateur.contract.client import Client, report
from secateur.contract.method import Method
from secateur.contract.reducer import Reduced
from secateur.contract.reduction import Mean, Sum, masks_of
from secateur.contract.state import Archive, Setting, State
from secateur.errors import check
from secateur.methods.kit.rounds import MEAN, merged, train_ask, train_reply
from secateur.pruning import mask as masks
from secateur.pruning.allocation import ERK
from secateur.pruning.mask import Tensors
from secateur.pruning.regrowth import cosine, swap
from secateur.wire.message import Message

_COUNTED = {MEAN: Mean(holders=masks_of), "voters": Sum(masks_of)}


@dataclass(frozen=True)
class FedDST(Method):
    """Dynamic sparse training on clients, with the union of masks pruned to a budget.

    Attributes:
        sparsity: the fraction of weights removed.
        every: R, the number of rounds between adjustments; 0: never, the first mask stays.
        alpha: the share of a tensor's kept weights that the first adjustment replaces.
        until: T_end as a share of the rounds, after which masks stay.
        batches: the number of batches over which the gradient for regrowth is averaged.
    """

    sparsity: float = 0.8
    every: int = 15
    alpha: float = 0.01
    until: float = 0.5
    batches: int = 1

    def __post_init__(self) -> None:
        check(0 <= self.sparsity < 1, name="sparsity", value=self.sparsity, must="be in [0, 1)")
        for name in ("alpha", "until"):
            check(0 <= getattr(self, name) <= 1, name=name, value=getattr(self, name), must="be in [0, 1]")

    @property
    def regrows(self) -> bool:
        """Return True: pruned weights may come back."""
        return True

    def start(self, setting: Setting, weights: Tensors, archive: Archive) -> State:
        """Return the first state: theta_0 under the ERK mask by magnitude."""
        sizes = {name: weights[name].abs() for name in setting.layout.names("weight")}
        mask = ERK().keep(sizes, self.sparsity) if self.sparsity else None
        return State(setting, 0, masks.apply(weights, mask), mask, archive=archive)

    def plan(self, state: State) -> Ask | None:
        """Ask the next cohort to train; in a round of adjustment, also for the clients' own masks."""
        round_ = state.round + 1
        if round_ > state.setting.rounds:
            return None
        votes = state.setting.layout.names("weight") if self.share(state.setting, round_) else None
        ask = train_ask(state, round_, state.mask, votes=votes, reduce=_COUNTED if votes else None)
        same = (KeptByTensor(),) if votes else ()
        return replace(ask, expects=replace(ask.expects, within=False, checks=(*ask.expects.checks, *same)))

    def respond(self, ask: Ask, client: Client) -> Message:
        """Train; in a round of adjustment, adjust the mask of the trained weights."""
        mask, share = ask.message.mask, self.share(client.setting, ask.round)
        if mask is None or not share:
            return train_reply(ask, client)
        weights, done = client.train(ask.message.tensors, mask, round_=ask.round)
        gradients, more = client.gradient_statistic("gradient", weights, mask, round_=ask.round, batches=self.batches)
        mask = swap(mask, weights, gradients, share)
        return Message(
            masks.apply(weights, mask), mask, report(replace(done, processed=done.processed + more.processed))
        )

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Merge; after an adjustment average over the clients that kept a weight, and prune the union to the budget."""
        state, voters = merged(state, reduced), reduced.get("voters")
        if not voters:
            return state
        sizes = {name: torch.where(kept > 0, state.weights[name].abs(), -1.0) for name, kept in voters.items()}
        mask = ERK().keep(sizes, self.sparsity)
        return replace(state, mask=mask, weights=masks.apply(state.weights, mask))

    def share(self, setting: Setting, round_: int) -> float:
        """Return a_t, the share of a tensor's kept weights that a round's adjustment replaces; 0: no adjustment."""
        due = self.sparsity and self.every and (round_ - 2) % self.every == 0
        return cosine(self.alpha, round_ - 1, self.until * setting.rounds) if due else 0.0
