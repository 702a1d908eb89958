"""Criteria from statistics that clients, or the server, measure before each mask."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from secateur.contract.ask import SCORE, Ask
from secateur.contract.client import Client, report
from secateur.contract.reducer import Reduced
from secateur.contract.reduction import Mean, Reduction
from secateur.contract.state import State
from secateur.errors import check
from secateur.methods.kit.criteria import Criterion
from secateur.methods.kit.merging import Merge, reduction
from secateur.methods.kit.rounds import score_ask
from secateur.pruning.criteria import Form, Gradients
from secateur.pruning.mask import Mask, Tensors
from secateur.wire.message import Message, Scalar

_STATISTIC = "statistic"


class Statistic(Criterion):
    """Base of criteria with one statistic of each weight, which clients measure at the current model before each mask.

    The server uses the clients' reduced statistics; if clients make the masks, each uses its own statistic. Your own
    criterion writes ``observe`` and ``score``.
    """

    @abstractmethod
    def observe(
        self, client: Client, weights: Tensors, mask: Mask | None, round_: int
    ) -> tuple[dict[str, torch.Tensor], Mapping[str, Scalar]]:
        """Return a statistic of each trainable tensor, in its shape, at ``weights`` under ``mask``, and the scalars.

        The scalars are those of ``contract.client.report``: ``samples``, ``processed`` and ``loss``.
        """

    @abstractmethod
    def score(self, w: torch.Tensor, statistic: torch.Tensor) -> torch.Tensor:
        """Return the scores of one tensor, from its weights and their statistic, all of one shape."""

    @property
    def everybody(self) -> bool:
        """Return whether all clients are asked; if not, the cohort of the next round is."""
        return False

    @property
    def least(self) -> float:
        """Return the least value that a statistic can have; a reply with a smaller one is refused. By default any."""
        return -math.inf

    @property
    def reduction(self) -> Reduction:
        """Return the reduction of the clients' statistics to tensors by name; by default their mean by rows."""
        return Mean()

    def scores(self, weights: Tensors, statistics: Iterable[Tensors], *, seed: int) -> dict[str, torch.Tensor]:
        """Return a score for each entry that has a statistic."""
        del seed
        (measured,) = statistics
        return {name: self.score(weights[name], tensor) for name, tensor in measured.items()}

    def ask(self, state: State, *, due: bool) -> Ask | None:
        """Return the ask for the statistic at the current model, once for each mask."""
        if not due or state.notes.get(SCORE) == state.round:
            return None
        asked = range(state.setting.clients) if self.everybody else state.setting.cohort(state.round + 1)
        reduce = {_STATISTIC: self.reduction}
        return score_ask(state, state.round, asked, "weight", "bias", "norm", reduce=reduce, least=self.least)

    def respond(self, ask: Ask, client: Client) -> Message:
        """Measure the statistic."""
        statistic, scalars = self.observe(client, ask.message.tensors, ask.message.mask, ask.round)
        return Message(statistic, None, dict(scalars))

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Keep the statistic for this round's mask; without any answer there is none, and the mask does not change."""
        return self.keep(state, reduced[_STATISTIC])

    def keep(self, state: State, statistic: Tensors) -> State:
        """Return the state with the statistic of its round instead of the one before."""
        state.archive.pop(_at(state), None)
        state = replace(state, notes={**state.notes, SCORE: state.round})
        if statistic:
            state.archive[_at(state)] = statistic
        return state

    def statistics(self, state: State, cohort: tuple[int, ...] | None) -> Iterable[Tensors] | None:
        """Return the last statistic."""
        del cohort
        return [state.archive[_at(state)]] if _at(state) in state.archive else None

    def own(self, client: Client, weights: Tensors, mask: Mask | None, round_: int) -> tuple[Tensors | None, int]:
        """Measure the client's own statistic."""
        statistic, scalars = self.observe(client, weights, mask, round_)
        return statistic, int(scalars["processed"])

    @property
    def by_training(self) -> int | None:
        """Return None: the statistic is not a result of training alone."""
        return None


def _at(state: State) -> str:
    return f"{_STATISTIC}/{state.notes.get(SCORE)}"


@dataclass(frozen=True)
class Measured(Statistic):
    """Base of criteria with a statistic of gradients; the server uses the mean over clients.

    Attributes:
        measure: the number of batches, and which clients are asked.
        merge: what becomes of the clients' statistics; see ``methods.kit.merging``.
    """

    measure: Gradients = field(default_factory=Gradients)
    merge: Merge = "mean"

    @property
    def reduction(self) -> Reduction:
        """Return the reduction by ``merge``."""
        return reduction(self.merge)

    @property
    def least(self) -> float:
        """Return 0 for what cannot be negative."""
        return 0.0 if self.form in {"square", "saliency", "flow"} else -math.inf

    @property
    @abstractmethod
    def form(self) -> Form:
        """Return which statistic clients measure; see ``secateur.learning.gradients``."""

    @property
    def everybody(self) -> bool:
        """Return whether all clients are asked."""
        return self.measure.clients == "all"

    def observe(
        self, client: Client, weights: Tensors, mask: Mask | None, round_: int
    ) -> tuple[dict[str, torch.Tensor], Mapping[str, Scalar]]:
        """Measure the statistic over some batches."""
        statistic, done = client.gradient_statistic(
            self.form, weights, mask, round_=round_, batches=self.measure.batches
        )
        return {n: statistic[n] for n in client.setting.layout.trainable}, report(done)


@dataclass(frozen=True)
class SNIP(Measured):
    """Connection sensitivity |w g|: the change of the loss, to first order, when a weight is removed.

    Attributes:
        measure, merge: see ``Measured``.
        each: take the absolute value before the mean over clients, mean_k |w g_k|; else after it, |w mean_k g_k|.

    Reference: Lee et al., arXiv 1810.02340; averaged over clients it is SalientGrads, arXiv 2304.07488.
    """

    each: bool = False

    @property
    def form(self) -> Form:
        """Return ``saliency`` if each client takes the absolute value, otherwise ``gradient``."""
        return "saliency" if self.each else "gradient"

    def score(self, w: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Return |w g|."""
        return mean if self.each else (w * mean).abs()


@dataclass(frozen=True)
class Taylor(Measured):
    """First-order Taylor importance (w g)^2, with g the mean over clients; a unit's score is the mean over its weights.

    Reference: Molchanov et al., arXiv 1906.10771.
    """

    @property
    def form(self) -> Form:
        """Return gradients."""
        return "gradient"

    def score(self, w: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Return (w g)^2."""
        return (w * mean).square()


@dataclass(frozen=True)
class Fisher(Measured):
    """The loss's change to second order by the diagonal of the empirical Fisher matrix: w^2 F / 2, F the mean of g^2.

    g is the mean gradient of a batch; squares are taken of each batch, before the mean over clients.

    Reference: Theis et al., arXiv 1801.05787; after Optimal Brain Damage, LeCun et al., NeurIPS 1989.
    """

    @property
    def form(self) -> Form:
        """Return squared gradients."""
        return "square"

    def score(self, w: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Return w^2 F / 2."""
        return w.square() * mean / 2


@dataclass(frozen=True)
class Grasp(Measured):
    """GraSP, gradient signal preservation: w (H g), low for weights whose removal hardly lowers the gradient's norm.

    Each client measures H_k g_k, and the server averages; the loss has no temperature. Scores may be negative.

    Reference: Wang et al., arXiv 2002.07376, whose score -w (H g) is highest for what goes first.
    """

    @property
    def form(self) -> Form:
        """Return the Hessian's product with the gradient."""
        return "curvature"

    def score(self, w: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Return w (H g)."""
        return w * mean


@dataclass(frozen=True)
class Synflow(Measured):
    """SynFlow, synaptic flow: |w| dR/d|w|, R the sum of outputs for an input of ones through |w|; needs no data.

    The server measures it once for each pruning event; if clients vote, each measures it on its own model. Scores are
    divided by the largest, which keeps their order. One event prunes in one shot; a schedule with many events is the
    iterative form.

    Reference: Tanaka et al., arXiv 2006.05467; *read*: ganguli-lab/Synaptic-Flow (Pruners/pruners.py, prune.py), where
    float64 is commented out: deep networks overflow there.
    """

    def __post_init__(self) -> None:
        check(self.merge == "mean", name="criterion.merge", value=self.merge, must="be mean: no client is asked")

    @property
    def form(self) -> Form:
        """Return the flow through each weight."""
        return "flow"

    def score(self, w: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Return the flow itself."""
        del w
        return mean

    @property
    def refines(self) -> bool:
        """Return True: no client's data are needed."""
        return True

    def ask(self, state: State, *, due: bool) -> Ask | None:
        """Return None: the server measures the flow."""
        del state, due
        return None

    def refine(self, state: State, server: Client) -> tuple[State, int]:
        """Measure the flow of the merged model."""
        statistic, scalars = self.observe(server, state.model(), state.mask, state.round)
        return self.keep(state, statistic), int(scalars["processed"])
