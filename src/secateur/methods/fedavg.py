"""FedAvg: dense federated averaging, the baseline of every comparison.

    W <- sum_k (n_k / sum n) w_k

Server momentum is ``aggregator = "server_momentum"`` with ``aggregator.beta``; FedProx is ``training.prox``,
the mu of (mu/2) |w - W|^2, and works with every method.

Reference: McMahan et al., arXiv 1602.05629 (algorithm 1); FedProx: Li et al., arXiv 1812.06127.
Departures: none.
Reproduced: no published figure was targeted; it is the control of every table in docs/results.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from secateur.methods.kit.composition import Composition


@dataclass(frozen=True)
class FedAvg(Composition):
    """A composition with all slots at their defaults, which prunes nothing."""
