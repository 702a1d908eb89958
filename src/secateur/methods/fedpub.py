"""FED-PUB: each client multiplies its weights by a private soft mask, and averages with clients of similar models.

    mask     client i runs w m_i, m_i of its own, ones at first, never sent
    train    w and m_i together, by the loss + l_1 |m_i|_1 + l_2 |w - w_received|_2 by tensors, without l_2 at first
    embed    h_i = mean over B random inputs, the same for all, of what enters the last layer of what is scored
    merge    w_i <- sum_j a_ij w_j,  a_ij = exp(tau cos(h_i, h_j)) / sum_k exp(tau cos(h_i, h_k)), over the cohort
    score    w_i m_i without entries of |m_i| < l_1

Paper symbol -> option: lambda_1: l1; lambda_2: prox; tau: tau; nodes of the random graph: proxies.

Reference: Baek et al., "Personalized Subgraph Federated Learning", arXiv 2206.10206. *Read*: the published code,
JinheonBaek/FED-PUB (fedpub/client.py, fedpub/server.py, layers.py, nets.py), in which neither term of the loss has a
gradient; here both have one. It trains with Adam 0.01 and weight decay 1e-6, tau 10 or, by its commands, 3.
Departures: inputs are random rows of the data's kind, where the paper has a random graph of 5 x 100 nodes; any model
with a linear layer at its end is served; features are taken behind the last activation, there before it. A client that
is asked for the first time gets the mean of all, and one that has lost its mask begins again with ones.
Not reproduced: about 81.5 % on Cora is recalled, not read; with terms that work other figures are to be expected.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from secateur.contract.ask import Ask
from secateur.contract.client import Client, report
from secateur.contract.method import Method
from secateur.contract.reducer import Reduced
from secateur.contract.reduction import Keep, Mean
from secateur.contract.state import Setting, State
from secateur.errors import check
from secateur.learning import resident
from secateur.learning.loop import Fit
from secateur.methods.kit.personal import LazyTensors, load_own, store_own
from secateur.methods.kit.rounds import MEAN, merged, train_ask
from secateur.methods.kit.similarity import EMBEDDING, embedding, embedding_of, mixing_shares, mixtures, weights_of
from secateur.methods.kit.similarity import last_layer_width as width
from secateur.pruning.mask import Tensors
from secateur.wire.message import Message, Spec

_SOFT, _MODEL = "soft.", "model"


@dataclass(frozen=True)
class FedPUB(Method):
    """Trains private soft masks, and averages weights over clients by the similarity of their models.

    Attributes:
        l1: lambda_1, the weight of |m|_1 in the loss, and the |m| below which an entry is pruned; 0: no masks.
        prox: lambda_2, the weight in the loss of the distance from the received weights.
        tau: how strongly the average favours similar clients; 0 is FedAvg's mean.
        proxies: B, the number of random inputs on which models are compared.
    """

    l1: float = 1e-3
    prox: float = 1e-3
    tau: float = 10.0
    proxies: int = 64

    def __post_init__(self) -> None:
        for name in ("l1", "prox", "tau"):
            check(getattr(self, name) >= 0, name=name, value=getattr(self, name), must="be 0 or more")
        check(self.proxies >= 1, name="proxies", value=self.proxies, must="be at least 1")

    @property
    def regrows(self) -> bool:
        """Return True: an entry of a soft mask may grow again."""
        return True

    @property
    def personal(self) -> bool:
        """Return whether clients end with their own models."""
        return bool(self.l1 or self.tau)

    def check(self, setting: Setting) -> None:
        """Refuse a model that does not end in a linear layer.

        Raises:
            ModelError: the text names the last layer.
        """
        super().check(setting)
        if self.tau:
            width(setting)

    def plan(self, state: State) -> Ask | None:
        """Send each client of the next cohort its own mean."""
        round_, setting = state.round + 1, state.setting
        if round_ > setting.rounds:
            return None
        ask = train_ask(state, round_, None)
        if not self.tau:
            return ask
        features = Spec((width(setting),), torch.float32)
        expects = replace(ask.expects, tensors={**setting.specs, EMBEDDING: features})
        reduce = {MEAN: Mean(of=weights_of), "weights": Keep(weights_of), EMBEDDING: Keep(embedding_of)}
        return replace(ask, expects=expects, reduce=reduce, own=self.models(state, ask.clients))

    def respond(self, ask: Ask, client: Client) -> Message:
        """Train weights and the private mask; send the weights and the embedding."""
        weights, done = (
            self.trained(ask, client)
            if self.l1 or self.prox
            else client.train(ask.message.tensors, None, round_=ask.round)
        )
        if not self.tau:
            return Message(weights, None, report(done))
        features = embedding(self.uses(Message(weights), client), client, self.proxies)
        done = replace(done, processed=done.processed + self.proxies // 3)  # a third: forward only
        return Message({**weights, EMBEDDING: features}, None, report(done))

    def trained(self, ask: Ask, client: Client) -> tuple[dict[str, torch.Tensor], Fit]:
        """Train weights and the private mask; keep the mask in the client's memory."""
        sent, new = ask.message.tensors, bool(self.l1) and not client.memory
        weights = {n: sent[n] for n in client.setting.layout.trainable}
        scores = {**weights, **{_SOFT + n: m for n, m in self.mask(client).items()}}
        penalty = partial(self.penalty_of, sent={} if new else weights)
        learnt, done = client.learn(sent, scores, masked, round_=ask.round, penalty=penalty)
        client.memory |= {n: t for n, t in learnt.items() if n.startswith(_SOFT)}
        return {**resident.tensors_of(client.model), **{n: learnt[n] for n in weights}}, done

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Merge the shipped model, and a mean for each client by similarity."""
        if not self.tau:
            return merged(state, reduced)
        embeddings = {k: kept[EMBEDDING] for k, kept in reduced[EMBEDDING].items()}
        store_own(state, _MODEL, mixtures(reduced["weights"], mixing_shares(embeddings, self.tau)))
        return merged(state, reduced)

    def examine(self, state: State) -> Ask:
        """Return the ask by which each client scores its own mean."""
        ask = super().examine(state)
        return replace(ask, own=self.models(state, ask.clients)) if self.tau else ask

    def uses(self, message: Message, client: Client) -> Tensors:
        """Return the model under the client's soft mask, without entries below l1."""
        if not self.l1:
            return message.tensors
        firm = {_SOFT + n: torch.where(m.abs() < self.l1, 0.0, m) for n, m in self.mask(client).items()}
        return {**message.tensors, **masked({**message.tensors, **firm})}

    def models(self, state: State, clients: tuple[int, ...]) -> LazyTensors:
        """Return each client's own mean; for a client that never answered, the mean of all."""
        return LazyTensors(clients, lambda client: load_own(state, _MODEL, client) or state.weights)

    def mask(self, client: Client) -> dict[str, torch.Tensor]:
        """Return m_i, by name; empty if l1 is 0."""
        names = client.setting.layout.names("weight") if self.l1 else []
        return {n: client.memory.get(_SOFT + n, torch.ones_like(client.initial[n])) for n in names}

    def penalty_of(self, scores: Tensors, sent: Tensors) -> torch.Tensor:
        """Return l_1 |m|_1 + l_2 |w - w_received|_2, tensor by tensor."""
        total = self.l1 * sum((m.abs().sum() for n, m in scores.items() if n.startswith(_SOFT)), torch.zeros(()))
        return total + self.prox * sum(
            (torch.linalg.vector_norm(scores[n] - t) for n, t in sent.items()), torch.zeros(())
        )


def masked(scores: Tensors) -> dict[str, torch.Tensor]:
    """Return w m for weights that have a soft mask, and the other tensors unchanged."""
    named = {n: t for n, t in scores.items() if not n.startswith(_SOFT)}
    return {n: t * scores[_SOFT + n] if _SOFT + n in scores else t for n, t in named.items()}
