"""Complement Sparsification: clients are sent a sparse model, and send back only the weights that it lacks.

    first   FedAvg: dense both ways; then M
    down    w = W * M;  M keeps the n - floor(s n) largest |W| of each tensor of n weights
    train   dense, from w
    up      c_k = w_k * (1 - M)
    merge   W <- w + g mean_k c_k;  M anew

Paper symbol -> option: server sparsity: sparsity; aggregation ratio g: ratio.

Reference: Jiang and Borcea, "Complement Sparsification", AAAI 2023. *Read*: the published code,
XJ8/complement-sparsification-FL (fem_sim.py, flip_prune.py). It trains with Adam 0.01, batch 64 and 5 epochs (FEMNIST)
or 1: set training.optimiser and training.lr to run it as it was published.
Departures: in the code the server trains on rows of 5 % of the users for an epoch to make M, and throws these weights
away; here M is by magnitude alone. Biases and normalisation travel both ways and take the plain mean.
Not reproduced: FEMNIST was not run. It depends on the optimiser: the weights that are sent never move, and those that
come back stay only where they outgrow a kept weight. Adam moves every weight by about its rate a step; plain SGD at 0.1
moves few that far.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from secateur.contract.ask import Ask
from secateur.contract.checks import Complement
from secateur.contract.client import Client, report
from secateur.contract.method import Method
from secateur.contract.reducer import Reduced
from secateur.contract.reduction import Mean
from secateur.contract.reply import Reply, Sent
from secateur.contract.state import State
from secateur.errors import check
from secateur.methods.kit.rounds import MEAN, stepped, train_ask
from secateur.pruning import mask as masks
from secateur.pruning.allocation import Allocation, Uniform
from secateur.pruning.mask import Mask, Tensors
from secateur.wire.message import Message


@dataclass(frozen=True)
class ComplementSparsification(Method):
    """Sends a sparse model down and gets its complement back.

    Attributes:
        sparsity: the fraction of weights that the server removes, which is also the share that clients send back.
        ratio: g, the factor of the merged complement.
        allocation: chooses the weights to send, by their magnitudes.
    """

    sparsity: float = 0.5
    ratio: float = 1.5
    allocation: Allocation = field(default=Uniform())

    def __post_init__(self) -> None:
        check(0 <= self.sparsity < 1, name="sparsity", value=self.sparsity, must="be in [0, 1)")

    @property
    def regrows(self) -> bool:
        """Return True: the mask is made anew in each round."""
        return True

    def plan(self, state: State) -> Ask | None:
        """Ask the next cohort for the weights that the mask lacks."""
        if state.round == state.setting.rounds:
            return None
        votes = None if state.mask is None else state.setting.layout.names("weight")
        ask = train_ask(state, state.round + 1, state.mask, votes=votes, reduce={MEAN: Mean(of=complement)})
        rest = (Complement(),) if votes else ()
        return replace(ask, expects=replace(ask.expects, within=False, checks=(*ask.expects.checks, *rest)), dense=True)

    def respond(self, ask: Ask, client: Client) -> Message:
        """Train all weights; return those that the mask lacks."""
        weights, done = client.train(ask.message.tensors, None, round_=ask.round)
        rest = _complement(ask.message.mask)
        return Message(masks.apply(weights, rest), rest, report(done))

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Add the mean complement to the weights that were sent, and prune anew."""
        mean, sent = dict(reduced[MEAN]), reduced.ask.message
        for name in sent.mask or {}:
            if name in mean:
                mean[name] = sent.tensors[name] + self.ratio * mean[name]
        after = stepped(state, reduced.ask, mean)
        return self._prune(after) if mean and self.sparsity else after

    def _prune(self, state: State) -> State:
        sizes = {name: state.weights[name].abs() for name in state.setting.layout.names("weight")}
        mask = self.allocation.keep(sizes, self.sparsity)
        return replace(state, mask=mask, weights=masks.apply(state.weights, mask))


def complement(reply: Reply, sent: Sent) -> Tensors:
    """Return the reply's values of the weights that its client was not sent, 0 elsewhere."""
    return masks.apply(reply.tensors, _complement(sent.mask))


def _complement(mask: Mask | None) -> Mask | None:
    return None if mask is None else {name: ~kept for name, kept in mask.items()}
