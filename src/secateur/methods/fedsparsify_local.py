"""FedSparsify-Local: clients prune their own models to s_t, and the server keeps what the majority kept.

    client  m_k = the N - floor(s_t N) largest |w_k|, within M;  sends m_k * w_k
    server  v = sum_k m_k;  M = [v > K/2];  w <- M * sum_k (n_k / sum n) w_k

Reference: Stripelis et al., "Federated Progressive Sparsification", arXiv 2204.12430.
*Read*: dstripelis/FedSparsify, utils/model_merge.py.
Departures: a strict majority instead of the published code's v >= floor(K/2) (``consensus.rule = "half"``, with at
least one vote, which that code does not ask of a single client); ties go to the larger mean magnitude within the
schedule's budget; else as ``fedsparsify``.
Reproduced in part: as ``fedsparsify``; the vote changes accuracy by less than the spread (docs/results.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from secateur.methods.fedsparsify import FedSparsify
from secateur.methods.kit.consensus import Consensus, Majority


@dataclass(frozen=True)
class FedSparsifyLocal(FedSparsify):
    """FedSparsify with the majority vote as its consensus."""

    consensus: Consensus = field(default=Majority(rule="majority"))
