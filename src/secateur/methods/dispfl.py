"""DisPFL: every client has its own model and mask, and averages with a few other clients drawn in each round.

    start    client i holds a random mask M_i of its own, with ERK densities, and theta_0 under it
    mix      w_i <- (sum_j M_j w_j / sum_j M_j) M_i over i itself and its B neighbours of this round, per weight, where
             it counts from those that have trained it; what has no mask is averaged over all of them
    train    E epochs under M_i
    adjust   of each tensor drop the ceil(a_t k) smallest |w| of its k kept, then grow as many of largest |g| among all
             that are pruned now;  a_t = a/2 (1 + cos(pi (t - 1)/T))

Paper symbol -> option: c: target; neighbours |G_i|: neighbours; alpha_0: alpha.

Reference: Dai et al., "DisPFL: Towards Communication-Efficient Personalized Federated Learning via Decentralized
Sparse Training", arXiv 2206.00187. *Read*: the published code, rong-dai/DisPFL (standalone/DisPFL: client.py,
dispfl_api.py, my_model_trainer.py), whose CIFAR-10 command grows at random instead.
Departures: the server passes models on, so that a client gets one mixture and sends one model, where peers would
exchange B models each way; it is what our bytes count. A dropped weight is 0 at once, also for scoring; in the code
neighbours average it once more. In the code every client trains in every round; here clients outside the cohort rest,
and neighbours use their last model. There is no global model: the mean of the cohort's models, over those who trained
a weight, is shipped.
Not reproduced: 85.1 % at 50 % sparsity (CIFAR-10, ResNet-18) stands in SSFL; we did not run that setting.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from secateur.aggregation.weighted import WeightedMean
from secateur.contract.ask import Ask
from secateur.contract.client import Client, report
from secateur.contract.method import Method
from secateur.contract.reducer import Reduced
from secateur.contract.reduction import Keep, Mean, masks_of
from secateur.contract.reply import Reply, Sent
from secateur.contract.state import Archive, Setting, State
from secateur.errors import check
from secateur.methods.kit.personal import LazyTensors, load_own, store_own
from secateur.methods.kit.rounds import MEAN, merged, train_ask, train_reply
from secateur.methods.kit.submodels import own_masks, slice_ask
from secateur.pruning import mask as masks
from secateur.pruning.allocation import ERK
from secateur.pruning.mask import Mask, Tensors
from secateur.pruning.regrowth import adjusted, cosine
from secateur.streams import stream
from secateur.wire.message import Message

_FIRST = "theta"


@dataclass(frozen=True)
class DisPFL(Method):
    """Personal sparse models that are mixed with those of neighbours.

    Attributes:
        target: the fraction of its weights that each client prunes; 0 is FedAvg.
        neighbours: B, the number of neighbours, drawn anew for each client and round.
        alpha: the share of a tensor's kept weights that the first adjustment replaces.
    """

    target: float = 0.5
    neighbours: int = 10
    alpha: float = 0.5

    def __post_init__(self) -> None:
        check(0 <= self.target < 1, name="target", value=self.target, must="be in [0, 1)")
        check(self.neighbours >= 0, name="neighbours", value=self.neighbours, must="be 0 or more")
        check(0 <= self.alpha <= 1, name="alpha", value=self.alpha, must="be in [0, 1]")

    @property
    def regrows(self) -> bool:
        """Return True: pruned weights may come back."""
        return True

    @property
    def personal(self) -> bool:
        """Return whether each client has its own model; not if ``target`` is 0."""
        return self.target > 0

    def remarks(self, setting: Setting) -> list[str]:
        """Return a warning if some clients rest in a round."""
        if not self.target or setting.participation == 1:
            return []
        return ["dispfl trains every client in every round: with participation < 1 most neighbours are old, or theta_0"]

    def start(self, setting: Setting, weights: Tensors, archive: Archive) -> State:
        """Return the first state, with theta_0 in the archive for clients that were not asked yet."""
        archive[_FIRST] = weights
        return State(setting, 0, weights, archive=archive)

    def plan(self, state: State) -> Ask | None:
        """Send each client of the next cohort its mixture."""
        round_, setting = state.round + 1, state.setting
        if round_ > setting.rounds or not self.target:
            return train_ask(state, round_, None) if round_ <= setting.rounds else None
        cohort, names = setting.cohort(round_), frozenset(setting.layout.names("weight"))
        ask = slice_ask(state, round_, LazyTensors(cohort, lambda i: self.mask(state, i)))
        expects = own_masks(ask, names, same=True)
        reduce = {MEAN: Mean(holders=trained_of, fallback="state"), "weights": Keep(), "mask": Keep(masks_of)}
        own = LazyTensors(cohort, lambda i: self.mixture(state, i, round_))
        return replace(ask, own=own, expects=expects, reduce=reduce)

    def respond(self, ask: Ask, client: Client) -> Message:
        """Train under the client's mask, then adjust the mask."""
        if ask.message.mask is None:
            return train_reply(ask, client)
        weights, done = client.train(ask.message.tensors, ask.message.mask, round_=ask.round)
        slopes, more = client.gradient_statistic("gradient", weights, ask.message.mask, round_=ask.round)
        mask = adjusted(ask.message.mask, weights, slopes, cosine(self.alpha, ask.round - 1, client.setting.rounds))
        done = replace(done, processed=done.processed + more.processed)
        return Message(masks.apply(weights, mask), mask, report(done))

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Store each client's model and mask, and merge."""
        if not self.target:
            return merged(state, reduced)
        for kind in ("weights", "mask"):
            store_own(state, kind, reduced[kind].items())
        return merged(state, reduced)

    def examine(self, state: State) -> Ask:
        """Return the ask by which each client scores its own model."""
        ask = super().examine(state)
        if not self.target:
            return ask
        own = LazyTensors(ask.clients, lambda i: self.weights(state, i))
        return replace(
            ask, message=Message({}), slices=LazyTensors(ask.clients, lambda i: self.mask(state, i)), own=own
        )

    def mask(self, state: State, client: int) -> Mask:
        """Return M_i; until the client's first answer it is random."""
        held = load_own(state, "mask", client)
        if held is not None:
            return held
        setting, draw = state.setting, stream(state.setting.seed, "mask", client)
        drawn = {n: torch.rand(setting.specs[n].shape, generator=draw) for n in setting.layout.names("weight")}
        return ERK().keep(drawn, self.target)

    def weights(self, state: State, client: int) -> Tensors:
        """Return w_i; until the client's first answer it is theta_0 under its mask."""
        return load_own(state, "weights", client) or masks.apply(state.archive[_FIRST], self.mask(state, client))

    def mixture(self, state: State, client: int, round_: int) -> Tensors:
        """Return the weights from which a client starts a round, unmasked: the mean over it and its neighbours."""
        draw = stream(state.setting.seed, "neighbours", round_, client)
        drawn = torch.randperm(state.setting.clients, generator=draw)[: self.neighbours + 1].tolist()
        mean = WeightedMean(coverage=True)
        for j in sorted([client, *[k for k in drawn if k != client][: self.neighbours]]):
            held = self.weights(state, j)
            mean.add(held, 1, trained(held, self.mask(state, j)))
        return mean.mean()


def trained(weights: Tensors, mask: Mask) -> dict[str, torch.Tensor]:
    """Return flags of the weights that a client has trained; weights that were just regrown are still 0."""
    return {name: kept & (weights[name] != 0) for name, kept in mask.items()}


def trained_of(reply: Reply, sent: Sent) -> Tensors:
    """Return flags of the weights that the client of a reply has trained."""
    del sent
    return trained(reply.tensors, reply.mask or {})
