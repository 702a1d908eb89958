"""FRL: weights are random signs that never move; clients rank the edges of each layer, and the server sums ranks.

    weights  sign(theta_0) sqrt(2/fan-in) sqrt(0.5/(1 - S))
    client   scores are the first scores, U(-b, b) with b = 1/sqrt(fan-in), sorted and assigned by the global ranking;
             each step runs the edges whose |s| is among the top 1 - S of their layer, and moves s by the gradient there
             (straight through |s|); what goes back is the rank r_k(e) of each edge by s in its layer
    server   R(e) = sum_k r_k(e), a vote for each client; the new ranking sorts R, ties by index
    model    the top 1 - S edges of each layer by assigned |s|, which are both ends of the ranking, as signed constants

Paper symbol -> option: k, the share of edges in the subnetwork, is 1 - sparsity; the scores' optimiser: training.*
(Adam at 0.001 is ours, for rounds of one epoch; published: SGD at 0.4, falling by 0.999 a round, momentum 0.9, weight
decay 1e-4, in 5 epochs of batches of 8. On 10,000 held-out training rows of Fashion-MNIST, 30 rounds of one epoch of
batches of 64, S = 0.9: 66.1 % against 56.3 %, means of four late rounds of one seed).

Reference: Mozaffari et al., "Every Vote Counts: Ranking-Based Training of Federated Learning to Resist Poisoning
Attacks", arXiv 2110.04350. *Read*: the published code (SPIN-UMass/FRL, utils.py, models/, FL_train.py, args.py), which
ranks s and selects by |s|.
Departures: the published weights are sqrt(2/fan-in) at its k = 0.5; the factor sqrt(0.5/(1 - S)) is ours: it is 1
there, and at every other density it leaves a layer's signal as strong. A rank travels in whole bytes (two below 65,536
edges, three below 16.7 million), not in log2 n bits; biases and normalisation stay as they were made; the signs are
those of theta_0; the rate does not fall within a round.
Not reproduced: 85.3 % (CIFAR-10, Conv8, 1,000 clients) is claimed; we did not run that setting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from secateur.contract.ask import REPORT, Ask
from secateur.contract.client import Client, report
from secateur.contract.method import Method
from secateur.contract.reducer import Reduced
from secateur.contract.reduction import Sum
from secateur.contract.reply import Reply, Sent
from secateur.contract.state import Archive, Setting, State
from secateur.errors import check
from secateur.learning.supermask import signed_constants, straight_through
from secateur.methods.kit.rounds import plain_ask
from secateur.pruning.allocation import lowest
from secateur.pruning.mask import Mask, Tensors
from secateur.pruning.ranking import packed, planes, ranked, unpacked
from secateur.streams import stream
from secateur.wire.message import Expected, Message, Spec

_RANK = "rank"


@dataclass(frozen=True)
class FRL(Method):
    """Learns rankings of edges, and votes on them.

    Attributes:
        sparsity: the fraction of each layer's edges that is left out of the subnetwork.
    """

    sparsity: float = 0.5

    recommended: ClassVar[Mapping[str, str | float]] = {"optimiser": "adam", "lr": 0.001}

    def __post_init__(self) -> None:
        check(0 <= self.sparsity < 1, name="sparsity", value=self.sparsity, must="be in [0, 1)")

    @property
    def regrows(self) -> bool:
        """Return True: every round makes a new ranking."""
        return True

    @property
    def trains_weights(self) -> bool:
        """Return False: rankings are learnt."""
        return False

    @property
    def gain(self) -> float:
        """Return the magnitude of the frozen weights, times the root of the fan-in."""
        return math.sqrt(1 / (1 - self.sparsity))

    def start(self, setting: Setting, weights: Tensors, archive: Archive) -> State:
        """Return the first state: signed constants, ranked by the first scores."""
        names = setting.layout.names("weight")
        ranks = {name: ranked(initial_scores(setting, name)) for name in names}
        state = State(setting, 0, signed_constants(weights, names, self.gain), archive=archive)
        return self._with_ranks(state, 0, ranks)

    def accepts(self, setting: Setting) -> Expected:
        """Accept the whole model, or a ranking."""
        specs = {**setting.specs, **_planes(setting)}
        return replace(super().accepts(setting), tensors=specs, template=setting.specs, optional=True)

    def plan(self, state: State) -> Ask | None:
        """Send the ranking to the next cohort."""
        ranks = (Permutations(tuple(_shapes(state.setting).items())),)
        message = Message(packed(state.memory[_RANK]))
        expects = Expected(_planes(state.setting), scalars=REPORT, checks=ranks)
        return plain_ask(state, message, expects, {"votes": Sum(ranking)}, dense=True)

    def respond(self, ask: Ask, client: Client) -> Message:
        """Learn scores; return their ranks."""
        ranks = unpacked(ask.message.tensors, _shapes(client.setting))
        weights = signed_constants(client.initial, list(ranks), self.gain)

        def effective(scores: Tensors) -> dict[str, torch.Tensor]:
            sizes = {n: s.abs() for n, s in scores.items()}
            return {n: weights[n] * straight_through(self.chosen(s).float(), s) for n, s in sizes.items()}

        learnt, done = client.learn(weights, scores_by_rank(client.setting, ranks), effective, round_=ask.round)
        return Message(packed({n: ranked(s) for n, s in learnt.items()}), None, report(done))

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Sort the summed ranks into the next ranking."""
        ranks = {n: ranked(votes) for n, votes in reduced["votes"].items()} or dict(state.memory[_RANK])
        return self._with_ranks(state, reduced.ask.round, ranks)

    def chosen(self, scores: torch.Tensor) -> torch.Tensor:
        """Return flags of the top 1 - S scores of a layer, at least one."""
        gone = min(int(self.sparsity * scores.numel() + 1e-6), scores.numel() - 1)
        return ~lowest(scores.reshape(-1), gone).reshape(scores.shape)

    def _with_ranks(self, state: State, round_: int, ranks: Tensors) -> State:
        mask = {name: self.chosen(scores.abs()) for name, scores in scores_by_rank(state.setting, ranks).items()}
        return replace(state, round=round_, mask=mask, memory={**state.memory, _RANK: ranks})


@dataclass(frozen=True)
class Permutations:
    """Each ranking of a reply holds every rank of its layer once.

    Attributes:
        shapes: of the layers, by name.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def bounded(self) -> frozenset[str]:
        """Return no name: bytes are bounded by themselves."""
        return frozenset()

    def wrong(self, message: Message, known: Mask | None) -> str:
        """Return the first layer whose ranks are no permutation."""
        del known
        for name, ranks in unpacked(message.tensors, dict(self.shapes)).items():
            # ranks beyond the last one are read as the last one, which then comes twice
            if bool((torch.bincount(ranks.reshape(-1), minlength=ranks.numel()) != 1).any()):
                return f"the ranks of {name!r} are no permutation"
        return ""


def ranking(reply: Reply, sent: Sent) -> Tensors:
    """Return the ranks in a reply, int64, by name."""
    return {name: rank.long() for name, rank in unpacked(reply.tensors, _shapes(sent.setting)).items()}


def initial_scores(setting: Setting, name: str) -> torch.Tensor:
    """Return a layer's first scores, uniform in [-1/sqrt(fan-in), 1/sqrt(fan-in))."""
    shape = setting.specs[name].shape
    drawn = torch.rand(shape, generator=stream(setting.seed, "scores", name))
    return (2 * drawn - 1) / math.sqrt(max(1, math.prod(shape[1:])))


def scores_by_rank(setting: Setting, ranks: Tensors) -> dict[str, torch.Tensor]:
    """Return scores for each layer: its first scores in ascending order, assigned to edges by rank."""
    values = {name: np.sort(initial_scores(setting, name), axis=None) for name in ranks}
    return {name: torch.from_numpy(values[name])[rank.long()] for name, rank in ranks.items()}


def _shapes(setting: Setting) -> dict[str, tuple[int, ...]]:
    return {name: setting.specs[name].shape for name in setting.layout.names("weight")}


def _planes(setting: Setting) -> dict[str, Spec]:
    return {name: Spec(shape, torch.uint8) for name, shape in planes(_shapes(setting)).items()}
