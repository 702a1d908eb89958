"""Sub-FedAvg (unstructured): each client prunes its own mask while it trains, and weights are averaged where kept.

    train    from w under the client's mask m_k; masks a, after the first epoch, and b, after the last, are m_k without
             the weights of each tensor below the p quantile of the |w_k| that m_k keeps
    prune    m_k <- b if a and b differ in more than e of a tensor, in the mean over tensors, w_k under b has an
             accuracy above A at the client, and m_k keeps more than 1 - target
    merge    each weight is the mean over those clients that kept it, by rows; one that nobody kept stays

Paper symbol -> option: target pruning rate: target; r_p: share; epsilon: distance; Acc_th: accuracy.

Reference: Vahidian et al., "Personalized Federated Learning by Structured and Unstructured Pruning under Data
Heterogeneity", arXiv 2105.00562. *Read*: the published code, MMorafah/Sub-FedAvg (client_u.py, unstructured.py,
sub_fedavg_u.py).
Departures: the accuracy that allows pruning is on the client's training rows, in the code on its test rows. With a
single local epoch a is made of the weights that were sent. The last step goes to the target, in the code by at most 5 %
at a time. In the code clients weigh alike in the mean.
Not reproduced: the paper's personal accuracies; we did not run its settings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from secateur.contract.ask import Ask
from secateur.contract.client import Client, report
from secateur.learning.loop import Effort
from secateur.methods.kit.personal import Personal, reached, thinner
from secateur.pruning import mask as masks
from secateur.pruning.mask import Mask, Tensors
from secateur.wire.message import Message


@dataclass(frozen=True)
class SubFedAvg(Personal):
    """Trains personal masks, and averages each weight over the clients that keep it.

    Attributes:
        target, share: see ``Personal``.
        distance: e, the share of a tensor in which masks a and b must differ.
        accuracy: A, the accuracy on the client's training rows above which it prunes.
    """

    distance: float = 1e-4
    accuracy: float = 0.5

    def respond(self, ask: Ask, client: Client) -> Message:
        """Train; prune the client's mask if both conditions hold."""
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
            thin = thinner(weights, mask, share=self.share, target=self.target)
            if (
                self.mask_distance(early, weights, mask) > self.distance
                and self.accuracy_under(weights, thin, client) > self.accuracy
            ):
                mask = thin
        return Message(masks.apply(weights, mask), mask, report(done))

    def mask_distance(self, early: Tensors, late: Tensors, mask: Mask) -> float:
        """Return the share of entries in which the masks that two sets of weights lead to differ, mean over tensors."""
        a, b = (thinner(weights, mask, share=self.share) for weights in (early, late))
        return sum(float((a[name] != b[name]).double().mean()) for name in mask) / len(mask)

    @staticmethod
    def accuracy_under(weights: Tensors, mask: Mask, client: Client) -> float:
        """Return the accuracy of weights under a mask, on the client's training rows."""
        return client.score(masks.apply(weights, mask)).metric
