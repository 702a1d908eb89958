"""FedCompress: each weight of a tensor takes one of C values, which clients and the server learn with the weights.

    client   loss + beta sum_i (w_i - mu_near(i))^2, for each tensor, while each mu follows the mean of what is near it;
             then each w becomes its nearest mu.  Sent: C values and a number below C for each weight; also the
             quality of its features, the exponential of the entropy of their singular values
    merge    w <- mean by rows
    distil   the server trains w on random inputs towards the outputs that it has for them, with the same term; then
             each w becomes its nearest mu
    adapt    C doubles when the mean quality did not rise for P rounds, up to C_max

Paper symbol -> option: C_min: clusters; C_max: most; beta: beta; window: patience.

Reference: Tsouvalas et al., "Communication-Efficient Federated Learning through Adaptive Weight Clustering and
Server-Side Distillation", arXiv 2401.14211. *Reconstruction* from the abstract and summaries.
*Read* afterwards: FederatedML/FedCompress, src/server.py, client.py, compress.py and utils.py.
Departures: inputs of the distillation are noise, where the paper has data from elsewhere. That code begins with 8
clusters and adds one at a time up to 20, by validation accuracy and quality smoothed over a window; its quality is one,
of all clients' features with rows of length 1; it clusters convolutions alone, and without a beta. Biases,
normalisation and running statistics travel as they are.
Not reproduced: 4.5 times less traffic at nearly the same accuracy is claimed, on the paper's data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from secateur.contract.ask import REPORT, Ask
from secateur.contract.client import Client, report
from secateur.contract.method import Method
from secateur.contract.reducer import Reduced
from secateur.contract.reduction import Mean, Scalars
from secateur.contract.state import Setting, State
from secateur.errors import check
from secateur.learning import resident
from secateur.learning.optimiser import Training
from secateur.learning.supermask import learn
from secateur.methods.kit.clustered import dequantised_model, shapes, specs, start
from secateur.methods.kit.rounds import MEAN, merged, plain_ask, train_ask, variances
from secateur.methods.kit.similarity import distillation_data, effective_rank, last_layer_inputs, random_inputs
from secateur.pruning.clustering import clustering_penalty, codebooks, dequantised, quantised, width, without_codebooks
from secateur.pruning.mask import Tensors
from secateur.wire.message import Expected, Message

_MU, _CLUSTERS, _BEST, _STALE = "codebooks", "clusters", "quality", "stale"
_ROWS = 256  # of a client, for the quality of its features


@dataclass(frozen=True)
class FedCompress(Method):
    """Trains weights that take few values, and sends them as indices.

    Attributes:
        clusters: C at the start; 0 is FedAvg.
        most: C_max; if it is less than ``clusters``, C never changes.
        beta: the weight of the distance to the nearest centroid in the loss.
        patience: P, the number of rounds without a better quality after which C doubles.
        proxies: the number of random inputs on which the server distils; 0: it does not.
        epochs: the number of epochs of the distillation.
        server_lr: the learning rate (Adam) of the distillation.
    """

    clusters: int = 32
    most: int = 128
    beta: float = 0.1
    patience: int = 3
    proxies: int = 512
    epochs: int = 1
    server_lr: float = 1e-4

    def __post_init__(self) -> None:
        check(0 <= self.clusters <= 256, name="clusters", value=self.clusters, must="be 0 to 256")
        check(0 <= self.most <= 256, name="most", value=self.most, must="be 0 to 256")
        check(self.beta >= 0, name="beta", value=self.beta, must="be 0 or more")
        check(self.server_lr > 0, name="server_lr", value=self.server_lr, must="be above 0")
        for name in ("patience", "epochs"):
            check(getattr(self, name) >= 1, name=name, value=getattr(self, name), must="be at least 1")
        check(self.proxies >= 0, name="proxies", value=self.proxies, must="be 0 or more")

    @property
    def room(self) -> int:
        """Return the number of entries of a codebook, the most that C can become."""
        return max(self.clusters, self.most)

    @property
    def refines(self) -> bool:
        """Return whether weights are clustered; the server clusters them before round 1."""
        return self.clusters > 0

    def accepts(self, setting: Setting) -> Expected:
        """Accept the whole model, or a clustered one."""
        tensors = {**setting.specs, **specs(setting, self.room, self.room)}
        return replace(super().accepts(setting), tensors=tensors, template=setting.specs, optional=True)

    def plan(self, state: State) -> Ask | None:
        """Send the clustered model to the next cohort."""
        if not self.clusters:
            return train_ask(state, state.round + 1, None) if state.round < state.setting.rounds else None
        count = self.count(state)
        widest = max(size for spec in state.setting.specs.values() for size in (1, *spec.shape))
        ranges = {_BEST: (0.0, 2.0 * widest)}  # an effective rank is at most the width, and rounding aside
        tensors = specs(state.setting, count, self.room)
        expects = Expected(tensors, scalars={**REPORT, _BEST: float}, ranges=ranges, checks=variances(state.setting))
        message = Message(quantised(state.weights, state.memory[_MU], width(count)), None, {_CLUSTERS: count})
        reduce = {MEAN: Mean(of=dequantised_model), _BEST: Scalars(_BEST)}
        return plain_ask(state, message, expects, reduce)

    def respond(self, ask: Ask, client: Client) -> Message:
        """Train weights and centroids; send each weight as the index of its nearest centroid."""
        if not self.clusters:
            weights, done = client.train(ask.message.tensors, None, round_=ask.round)
            return Message(weights, None, report(done))
        sent, count = dequantised(ask.message.tensors, shapes(client.setting)), int(ask.message.scalars[_CLUSTERS])
        scores, penalty = start(sent, count, client.setting), partial(clustering_penalty, beta=self.beta)
        learnt, done = client.learn(sent, scores, without_codebooks, round_=ask.round, penalty=penalty)
        weights = {**resident.tensors_of(client.model), **without_codebooks(learnt)}
        features = last_layer_inputs(weights, client, client.data.batch(slice(0, _ROWS))[0])
        done = replace(done, processed=done.processed + len(features) // 3)  # a third: forward only
        tensors = quantised(weights, codebooks(weights, learnt, self.room), width(count))
        return Message(tensors, None, {**report(done), _BEST: effective_rank(features)})

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Merge; double C if the quality of features has not risen for P rounds."""
        state = merged(state, reduced)
        rank, best = reduced.get(_BEST), float(state.notes.get(_BEST, 0.0))
        if rank is None:
            return state
        notes = dict(state.notes)
        stale = 0 if rank > best else int(notes.get(_STALE, 0)) + 1
        notes |= {_BEST: max(rank, best), _STALE: stale % self.patience}
        if stale == self.patience:
            notes[_CLUSTERS] = min(2 * self.count(state), self.room)
        return replace(state, notes=notes)

    def refine(self, state: State, server: Client) -> tuple[State, int]:
        """Distil, except before round 1, then cluster the weights."""
        weights, rows = dict(state.weights), self.proxies * self.epochs if state.round else 0
        learnt: Tensors = start(weights, self.count(state), server.setting)
        if rows:
            how = Training(self.epochs, server.training.batch_size, "adam", self.server_lr)
            data = distillation_data(weights, server, random_inputs(server, self.proxies))
            learnt, _ = learn(
                server.model, data, how, learnt, without_codebooks,
                server.turn(state.round), penalty=partial(clustering_penalty, beta=self.beta),
            )  # fmt: skip
            weights |= without_codebooks(learnt)
        books = codebooks(weights, learnt, self.room)
        weights = dequantised(quantised(weights, books, width(self.room)), shapes(state.setting))
        return replace(state, weights=weights, memory={**state.memory, _MU: books}), rows

    def count(self, state: State) -> int:
        """Return C, the current number of clusters."""
        return int(state.notes.get(_CLUSTERS, self.clusters))
