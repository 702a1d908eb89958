"""PruneFL: every few rounds the cohort sends squared gradients of all weights, and the server makes a new mask.

    score    D_j = mean_k g_kj^2    every F rounds, for pruned weights too: what the loss can win by a weight
    protect  of each tensor all but the delta_t share of what it keeps, largest |w| first;  delta_t = delta 2^(-t/h)
    fill     the rest of the budget by D_j over all tensors, largest first
    round    FedAvg under the mask; a weight that comes in starts at 0

Paper symbol -> option: budget: sparsity; F: every; delta: delta; h: half_life; batches for g: batches.

Reference: Jiang et al., "Model Pruning Enables Efficient Federated Learning on Edge Devices", arXiv 1909.12326.
*Read*: jiangyuang/PruneFL (control/algorithm.py, bases/fl/simulation/adaptive.py, configs/cifar10.py).
*Reconstruction*: the first stage.
Departures: the density is an input. In the paper it follows from D_j over the seconds that a weight of its layer was
measured to cost, which no other machine repeats; here all weights cost the same. The first mask is made by the same
rule from theta_0 and the first cohort's gradients, each tensor keeping the density, where the paper lets one client
prune on its own. g is measured apart, at the merged model, and its squares are averaged by rows; the code squares the
sum of a round's training gradients and adds the rounds up.
Not reproduced: the paper's figures are times on its own devices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from secateur.contract.ask import SCORE, Ask
from secateur.contract.client import Client, report
from secateur.contract.method import Method
from secateur.contract.reducer import Reduced
from secateur.contract.state import State
from secateur.errors import check
from secateur.methods.kit.rounds import MEAN, merged, score_ask, train_ask, train_reply
from secateur.pruning import mask as masks
from secateur.pruning.allocation import by_count, highest, pruned_count, shared
from secateur.wire.message import Message


@dataclass(frozen=True)
class PruneFL(Method):
    """Adaptive pruning by squared gradients.

    Attributes:
        sparsity: the fraction of weights removed.
        every: F, the number of rounds between reconfigurations; 0: only the first mask.
        delta: the share of a tensor's kept weights that other weights may replace at the start.
        half_life: h, the number of rounds in which that share halves.
        batches: the number of batches over which a client's squared gradient is averaged.
    """

    sparsity: float = 0.7
    every: int = 50
    delta: float = 0.3
    half_life: float = 10_000.0
    batches: int = 5

    def __post_init__(self) -> None:
        check(0 <= self.sparsity < 1, name="sparsity", value=self.sparsity, must="be in [0, 1)")
        check(0 <= self.delta <= 1, name="delta", value=self.delta, must="be in [0, 1]")

    @property
    def regrows(self) -> bool:
        """Return True: pruned weights may come back."""
        return True

    def plan(self, state: State) -> Ask | None:
        """Ask the next cohort for its gradients if a reconfiguration is due, then to train."""
        done = state.round
        if done >= state.setting.rounds:
            return None
        due = done == 0 or (self.every and done % self.every == 0)
        if self.sparsity and due and state.notes.get(SCORE) != done:
            return score_ask(state, done, state.setting.cohort(done + 1), least=0.0)
        return train_ask(state, done + 1, state.mask)

    def respond(self, ask: Ask, client: Client) -> Message:
        """Return squared gradients, or train under the mask."""
        sent, mask = ask.message.tensors, ask.message.mask
        if ask.phase == SCORE:
            squares, done = client.gradient_statistic("square", sent, mask, round_=ask.round, batches=self.batches)
            return Message({n: squares[n] for n in client.setting.layout.names("weight")}, None, report(done))
        return train_reply(ask, client)

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Make a new mask, or merge."""
        if reduced.ask.phase != SCORE:
            return merged(state, reduced)
        state, importance = replace(state, notes={**state.notes, SCORE: state.round}), reduced[MEAN]
        if not importance:
            return state
        mask = self.choose(state, importance)
        return replace(state, mask=mask, weights=masks.apply(state.weights, mask))

    def choose(self, state: State, importance: masks.Tensors) -> dict[str, torch.Tensor]:
        """Return the mask: weights protected by magnitude, and others by importance up to the budget.

        ``importance`` holds the mean squared gradient of each weight, by name.
        """
        sizes = {name: worth.numel() for name, worth in importance.items()}
        total = sum(sizes.values())
        budget = total - pruned_count(self.sparsity, total)
        share = self.delta * 2 ** (-state.round / self.half_life)
        held = {n: int(m.sum()) for n, m in state.mask.items()} if state.mask else shared(budget, sizes, sizes)
        safe = {name: count - int(share * count) for name, count in held.items()}
        kept = by_count({name: state.weights[name].abs() for name in importance}, safe)
        rest = {name: torch.where(kept[name], -torch.inf, worth) for name, worth in importance.items()}
        new = highest(rest, budget - sum(safe.values()))
        return {name: kept[name] | new[name] for name in kept}
