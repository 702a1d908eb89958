"""FedTiny: clients choose among candidate masks by their loss, then the mask is adjusted block by block.

    select   C masks of theta_0 of one density, the largest |w| of each tensor, as many as ERK keeps or near; for each,
             clients send batch norm statistics of their rows, and under the mean of these their loss;
             c* = argmin_c sum_k n_k L_kc
    adjust   after every F rounds until T_end, in one block of layers, from the outputs on: clients send the a_t largest
             |g| among pruned weights of each tensor; of their mean the a_t largest grow, the a_t smallest |w| go;
             a_t = a/2 (1 + cos(pi t/T_end)) of what the tensor keeps

Paper symbol -> option: C: candidates; F (Delta T): every; T_end: until, as a share of the rounds; alpha: alpha.

Reference: Huang et al., "Distributed Pruning Towards Tiny Neural Networks in Federated Learning", arXiv 2212.01977.
*Read*: abstract; FedPruning/FedPruning, its authors' group's: api/distributed/fedtiny and api/standalone/fedtiny as of
e301307, the last to select, and fedtinyclean, api/pruning since. *Reconstruction*: the pool.
Departures: candidates share theta_0's weights in different ways between layers (``selection``): in the code they are
fresh draws of the weights, untrained too, under one mask; the paper's server trains first. Losses are averaged by rows.
Gradients are asked of the next cohort at the merged model, as costs of their own; the code adjusts all layers at once,
and alpha is 0.2 there. Without batch norm the loss alone tells candidates apart. It is *not shown* that
the choice is better than chance.
Not reproduced: 85.2 % at density 0.01 (CIFAR-10, ResNet-18) is claimed; we did not run that setting.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from secateur.contract.ask import SCORE, Ask
from secateur.contract.client import Client, report
from secateur.contract.method import Method
from secateur.contract.reducer import Reduced
from secateur.contract.state import Setting, State
from secateur.errors import check
from secateur.methods.kit import mask_selection as selection
from secateur.methods.kit.rounds import MEAN, merged, score_ask, train_ask, train_reply
from secateur.pruning import mask as masks
from secateur.pruning.regrowth import block, cosine, largest_gradients, quota, swap
from secateur.wire.message import Message


@dataclass(frozen=True)
class FedTiny(Method):
    """Lets clients choose the mask, and adjusts it in blocks of layers.

    Attributes:
        sparsity: the fraction of weights removed; 0 is FedAvg.
        candidates: C, the number of masks that the first cohort scores.
        every: Delta T, the number of rounds between adjustments; 0: never.
        until: T_end as a share of the rounds, after which the mask stays.
        alpha: the share of a tensor's kept weights that the first adjustment replaces.
        blocks: the number of blocks into which the layers are divided.
    """

    sparsity: float = 0.9
    candidates: int = 4
    every: int = 10
    until: float = 0.6
    alpha: float = 0.3
    blocks: int = 5

    def __post_init__(self) -> None:
        check(0 <= self.sparsity < 1, name="sparsity", value=self.sparsity, must="be in [0, 1)")
        check(0 <= self.alpha <= 1, name="alpha", value=self.alpha, must="be in [0, 1]")
        for name in ("candidates", "blocks"):
            check(getattr(self, name) >= 1, name=name, value=getattr(self, name), must="be at least 1")

    @property
    def regrows(self) -> bool:
        """Return True: pruned weights may come back."""
        return True

    def remarks(self, setting: Setting) -> list[str]:
        """Return a remark if the model has no batch norm, whose statistics candidates need."""
        if not self.sparsity or self.candidates == 1 or setting.layout.names("buffer"):
            return []
        return ["the model has no batch norm: candidates are told apart by their loss alone"]

    def plan(self, state: State) -> Ask | None:
        """Ask the first cohort to score the candidates, then train; if a block is due, ask for its gradients first."""
        done, setting = state.round, state.setting
        if self.sparsity and state.mask is None:
            return selection.ask(state, self.sparsity, self.candidates)
        if done >= setting.rounds:
            return None
        names = self.due(setting, done)
        if not names or state.notes.get(SCORE) == done:
            return train_ask(state, done + 1, state.mask)
        share, held = self.share(setting, done), state.mask or {}
        grown = {name: quota(held[name], share) for name in names}
        return score_ask(state, done, setting.cohort(done + 1), chosen=names, kept=grown)

    def respond(self, ask: Ask, client: Client) -> Message:
        """Score a candidate, return the largest gradients of pruned weights, or train."""
        if ask.phase != SCORE:
            return selection.respond(ask, client) if ask.phase == selection.PHASE else train_reply(ask, client)
        sent, mask = ask.message.tensors, ask.message.mask or {}
        gradients, done = client.gradient_statistic("gradient", sent, mask, round_=ask.round)
        part = {name: mask[name] for name in self.due(client.setting, ask.round)}
        top = largest_gradients(part, gradients, self.share(client.setting, ask.round))
        return Message(masks.apply({name: gradients[name] for name in part}, top), top, report(done))

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Keep the score of a candidate, adjust a block, or merge."""
        if reduced.ask.phase == selection.PHASE:
            return selection.absorb(state, reduced, self.sparsity, self.candidates)
        if reduced.ask.phase != SCORE:
            return merged(state, reduced)
        slopes = reduced[MEAN]
        held, share = dict(state.mask or {}), self.share(state.setting, state.round)
        mask = held | swap({n: held[n] for n in slopes}, state.weights, slopes, share)
        notes = {**state.notes, SCORE: state.round}
        return replace(state, notes=notes, mask=mask, weights=masks.apply(state.weights, mask))

    def due(self, setting: Setting, done: int) -> list[str]:
        """Return the names of the tensors that are adjusted after ``done`` rounds; empty if none is due."""
        if not (self.sparsity and self.every and done) or done % self.every or not self.share(setting, done):
            return []
        return block(setting.layout.names("weight"), self.blocks, done // self.every - 1)

    def share(self, setting: Setting, done: int) -> float:
        """Return a_t, the share of a tensor's kept weights that an adjustment after ``done`` rounds replaces."""
        return cosine(self.alpha, done, self.until * setting.rounds)
