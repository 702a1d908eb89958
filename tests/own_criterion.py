"""A criterion of one's own, by a statistic of clients: what a client's training moves least goes first."""

from dataclasses import dataclass

from own_reduction import Largest
from secateur.contract.client import report
from secateur.methods.kit.criteria.measured import Statistic


@dataclass(frozen=True)
class Drift(Statistic):
    """The largest |w_k - w| of all clients, w_k after one training from w."""

    def observe(self, client, weights, mask, round_):
        trained, done = client.train(weights, mask, round_=round_)
        return {n: (trained[n] - weights[n]).abs() for n in client.setting.layout.trainable}, report(done)

    def score(self, w, statistic):
        return statistic

    @property
    def reduction(self):
        return Largest()
