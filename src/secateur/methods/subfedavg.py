"""Sub-FedAvg (unstructured): each client prunes a mask of its own while it trains; masks overlap in the average.

    train    from w under the client's mask m_k; after the first and the last epoch the p share of what m_k keeps with
             smallest |w_k|, all weights together, would go: masks a and b
    prune    m_k <- b where the two differ in more than e of m_k's weights, the client's accuracy is above A, and m_k
             keeps more than 1 - target
    merge    each weight is the mean over those clients that kept it, by rows; one that nobody kept stays

Paper symbol -> option: target pruning rate: target; r_p: share; epsilon: distance; Acc_th: accuracy.

Reference: Vahidian et al., "Personalized Federated Learning by Structured and Unstructured Pruning under Data
Heterogeneity", arXiv 2105.00562. *Read*: the published code.
Departures: the accuracy that opens the gate is on the client's training rows; the published code looks at its test
rows. With a single local epoch the first mask is made of the weights that were sent.
Not reproduced: the paper's personal accuracies; we did not run its settings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from secateur.method import Ask, Client, report
from secateur.personal import Personal, reached, thinner
from secateur.pruning import mask as masks
from secateur.training import Effort, evaluate
from secateur.wire.message import Message


@dataclass(frozen=True)
class SubFedAvg(Personal):
    """Personal masks, overlapping averages.

    Attributes:
        target, share: see ``Personal``.
        distance: e, how much the two masks must differ.
        accuracy: A, on the client's training rows.
    """

    distance: float = 1e-4
    accuracy: float = 0.5

    def respond(self, ask: Ask, client: Client) -> Message:
        """Train; prune the own mask where the gate is open."""
        sent, mask = ask.message.tensors, ask.message.mask
        if mask is None or client.training.epochs < 2:
            weights, done = client.train(sent, mask, round_=ask.round)
            early = sent
        else:
            early, first = client.train(sent, mask, round_=ask.round, effort=Effort(1))
            weights, done = client.train(early, mask, round_=ask.round, effort=Effort(client.training.epochs - 1))
            done = replace(done, processed=first.processed + done.processed)
        if mask is None:
            return Message(weights, None, report(done))
        if not reached(mask, self.target):
            done = replace(done, processed=done.processed + len(client.data) // 3)  # a third: forward only
            a, b = (thinner(w, mask, share=self.share, target=self.target) for w in (early, weights))
            differ = sum(int((a[n] != b[n]).sum()) for n in mask) / max(1, masks.size(mask))
            if differ > self.distance and evaluate(client.model, client.data).metric > self.accuracy:
                mask = b
        return Message(masks.apply(weights, mask), mask, report(done))
