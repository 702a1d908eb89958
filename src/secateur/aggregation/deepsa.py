"""DeepSA: a small model learns in each round to tell reliable uploads from corrupted ones, and weighs clients by it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.aggregation import Holding
from secateur.aggregation.median import medians
from secateur.aggregation.robust import Combined, Robust
from secateur.aggregation.updates import Updates
from secateur.contract.state import State

_STEPS, _RIDGE = 25, 1e-2
_SCALE, _ABSENT, _FAR = 10.0, 0.01, math.log(100.0)


@dataclass(frozen=True)
class Deepsa(Robust):
    """The mean of the updates that are more probably reliable than corrupted, each weighed by that probability.

    Of each upload two numbers are seen: |log(|Delta_k| / median norm)|, and its cosine with the coordinate median. A
    logistic model is fitted to those of the round, as reliable, and to those that the same uploads would have if they
    were negated, ten times or a hundredth as long, or drowned in noise of their own length. Who is more probably
    corrupted is left out, and under suspicion; without anybody else the model stays. An update counts up to the median
    norm. It reads the replies three times, in blocks, and sorts each coordinate.

    Attributes:
        then: the server's step.

    Reference: Ma et al., "Federated Learning with Unreliable Clients: Performance Analysis and Mechanism Design", arXiv
    2105.06256. *Reconstruction* from the abstract: there a deep network at the server judges uploads; what it sees, and
    how it is trained, was *not read*. Its optimum of local iterations at a fixed effort is ``training.epochs`` in a
    comparison.
    """

    serves: ClassVar[frozenset[Holding]] = frozenset({"shared", "own"})

    def why(self, holding: Holding) -> str:
        """Return why parts of the model cannot be judged so."""
        del holding
        return "parts of different size differ in norm and direction by their size"

    def combine(self, updates: Updates, state: State) -> Combined:
        """Return the mean weighed by reliability."""
        del state
        norms, likeness = updates.products.norms, _likeness(updates)
        ratios = norms / norms.quantile(0.5).clamp(min=1e-300)
        reliable = reliability(ratios, likeness)
        keep = reliable >= 0.5
        why = {
            client: f"reliable with probability {float(share):.2g}"
            for client, share, kept in zip(updates.clients, reliable, keep.tolist(), strict=True)
            if not kept
        }
        weights = reliable * keep
        return updates.weighed(weights / ratios.clamp(min=1.0), weights), keep if bool(keep.any()) else None, why


def reliability(ratios: torch.Tensor, likeness: torch.Tensor) -> torch.Tensor:
    """Return the probability that each upload is reliable, by a model fitted to these and to their corruptions.

    Args:
        ratios: each upload's norm divided by the median, float64.
        likeness: its cosine with the coordinate median.
    """
    noisy = 1 / math.sqrt(2)
    honest = _features(ratios, likeness)
    corrupted = [
        _features(ratios, -likeness),
        _features(ratios * _SCALE, likeness),
        _features(ratios * _ABSENT, likeness),
        _features(ratios / noisy, likeness * noisy),
    ]
    rows = torch.cat([honest, *corrupted])
    labels = torch.cat([torch.ones(len(honest)), torch.zeros(len(rows) - len(honest))]).double()
    shares = torch.where(labels > 0, 0.5 / len(honest), 0.5 / (len(rows) - len(honest)))  # both kinds count alike
    return torch.sigmoid(honest @ _fitted(rows, labels, shares))


def _features(ratios: torch.Tensor, likeness: torch.Tensor) -> torch.Tensor:
    """Return the rows (1, |log ratio|, cosine); the logarithm counts up to that of a hundred."""
    far = ratios.clamp(min=1e-300).log().abs().clamp(max=_FAR)
    return torch.stack([torch.ones_like(ratios), far, likeness], dim=1)


def _fitted(rows: torch.Tensor, labels: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Return the coefficients of a ridge logistic regression, by Newton's steps from 0."""
    found = torch.zeros(rows.shape[1], dtype=torch.float64)
    ridge = _RIDGE * torch.eye(rows.shape[1], dtype=torch.float64)
    for _ in range(_STEPS):
        guess = torch.sigmoid(rows @ found)
        slope = rows.T @ (shares * (guess - labels)) + ridge @ found
        curve = (rows * (shares * guess * (1 - guess))[:, None]).T @ rows + ridge
        found = found - torch.linalg.solve(curve, slope)
    return found


def _likeness(updates: Updates) -> torch.Tensor:
    """Return the cosine of each update with the coordinate median, over what its client holds."""
    inner, theirs, middles = (torch.zeros(len(updates.clients), dtype=torch.float64) for _ in range(3))
    for block in updates.blocks():
        middle, values = medians(block).double(), block.values.double()
        inner += values @ middle
        theirs += values.square().sum(dim=1)
        middles += block.flags @ middle.square()
    return inner / (theirs * middles).sqrt().clamp(min=1e-300)
