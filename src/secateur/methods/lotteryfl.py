"""LotteryFL: each client looks for its own winning ticket, pruned step by step and rewound to the first weights.

    open     the received model scores above A at the client, and its mask m_k keeps more than 1 - target
    prune    if open, m_k loses the weights of each tensor below the p quantile of the |w| that m_k keeps
    rewind   training then starts from theta_0 under the new m_k, with theta_0's biases; otherwise from what arrived
    merge    each weight is the mean over those clients that kept it, by rows; one that nobody kept stays

Paper symbol -> option: target pruning rate r_target: target; pruning rate r_p: share; accuracy threshold: accuracy.

Reference: Li et al., "LotteryFL", arXiv 2008.03371. *Read*: the published code, charleslipku/LotteryFL (lotteryFL.py,
utils.py, update.py), in which the model is scored before local training, as here; the paper itself was *not read*.
Departures: the accuracy that allows pruning is on the client's training rows; in the code it is on its test rows, and
the best round is reported. The last step stops at the target; in the code it goes beyond. In the code clients weigh
alike in the mean.
Not reproduced: the paper's personal accuracies; we did not run its settings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from secateur.contract.ask import Ask
from secateur.contract.client import Client, report
from secateur.methods.kit.personal import Personal, reached, thinner
from secateur.pruning import mask as masks
from secateur.wire.message import Message


@dataclass(frozen=True)
class LotteryFL(Personal):
    """Trains personal lottery tickets.

    Attributes:
        target, share: see ``Personal``.
        accuracy: A, the accuracy on the client's training rows above which it prunes.
    """

    share: float = 0.2
    accuracy: float = 0.2

    def respond(self, ask: Ask, client: Client) -> Message:
        """Prune and rewind if the received model is accurate enough, then train."""
        start, mask, scored = ask.message.tensors, ask.message.mask, 0
        if mask is not None and not reached(mask, self.target):
            scored = len(client.data) // 3  # a third of a training row's work: forward only
            if client.score(masks.apply(start, mask)).metric > self.accuracy:
                mask, start = thinner(start, mask, share=self.share, target=self.target), client.initial
        weights, done = client.train(start, mask, round_=ask.round)
        return Message(weights, mask, report(replace(done, processed=done.processed + scored)))
