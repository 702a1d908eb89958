"""Scores of predictions: their names, which direction is better, and how they are computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

BINS = 15
"""The number of bins of the expected calibration error."""


@dataclass(frozen=True)
class Metric:
    """A score: its names, whether higher is better, and its range.

    Attributes:
        name: its name in records and summaries, such as ``accuracy``.
        higher: whether a higher value is better.
        least, most: the ends of its range; None: no limit.
        label: its name in tables, such as ``MAE``; empty: ``name``.
        words: its name in sentences, such as ``mean absolute error``; empty: the label.
    """

    name: str
    higher: bool = True
    least: float | None = 0.0
    most: float | None = 1.0
    label: str = ""
    words: str = ""

    @property
    def shown(self) -> str:
        """Return its name in a table."""
        return self.label or self.name

    @property
    def worded(self) -> str:
        """Return its name in a sentence."""
        return self.words or self.shown

    @property
    def share(self) -> bool:
        """Return whether it lies in [0, 1], and is shown as a percentage."""
        return (self.least, self.most) == (0.0, 1.0)

    @property
    def sign(self) -> int:
        """Return 1 if higher is better, -1 if lower is."""
        return 1 if self.higher else -1

    @property
    def bounds(self) -> tuple[float, float]:
        """Return the ends of its range; they may be infinite."""
        return -math.inf if self.least is None else self.least, math.inf if self.most is None else self.most

    def text(self, value: float) -> str:
        """Return a value as text: ``91.3 %`` for a share, ``0.42`` for any other score."""
        return f"{100 * value:.1f} %" if self.share else f"{value:.2f}"


ACCURACY = Metric("accuracy")
AUROC = Metric("auroc", label="AUROC", words="area under the ROC curve")
ECE = Metric("ece", higher=False, label="ECE", words="expected calibration error")
MAE = Metric("mae", higher=False, most=None, label="MAE", words="mean absolute error")
R2 = Metric("r2", least=None, label="R²", words="coefficient of determination")


def in_unit(metric: Metric, unit: str) -> Metric:
    """Return a score whose names in tables and sentences say its unit; itself if that is unknown.

    >>> in_unit(MAE, "years").label
    'MAE in years'
    """
    return replace(metric, label=f"{metric.shown} in {unit}", words=f"{metric.worded} in {unit}") if unit else metric


def metric_of(row: Mapping[str, Any]) -> Metric:
    """Return the score by which runs are compared, from a record or a summary's ``final``.

    Runs of versions with a single score do not name it: it is accuracy or the mean absolute error.
    """
    if "metric" in row:
        return Metric(**row["metric"])
    return next((metric for metric in (ACCURACY, MAE) if metric.name in row), ACCURACY)


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the share of rows whose largest output belongs to their class.

    Args:
        outputs: shape (rows, classes).
        targets: class indices, shape (rows,).
    """
    return int((outputs.argmax(1) == targets).sum()) / len(targets)


def auroc(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the area under the ROC curve: for two classes of class 1, for more the mean over classes against the rest.

    The area is the chance that a random row of the class gets a higher probability of it than a random row of another
    class; equal probabilities count half. A class that no row or every row has is left out; NaN if none is left.

    Args:
        outputs: logits, shape (rows, classes).
        targets: class indices, shape (rows,).

    Reference: Fawcett, "An introduction to ROC analysis", 2006; Mann and Whitney, 1947.
    """
    shares, classes = outputs.double().softmax(1).T.contiguous().cpu().numpy(), targets.cpu().numpy()
    first = 1 if len(shares) == 2 else 0
    areas = [_area(shares[k], classes == k) for k in range(first, len(shares))]
    defined = [area for area in areas if not math.isnan(area)]
    return sum(defined) / len(defined) if defined else math.nan


def _area(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the share of pairs in which the positive row has the higher score, equal scores counting half."""
    ours, others = scores[positive], np.sort(scores[~positive])  # several times faster than torch's sort on a CPU
    if not len(ours) or not len(others):
        return math.nan
    won = sum(int(np.searchsorted(others, ours, side).sum()) for side in ("left", "right")) / 2
    return won / (len(ours) * len(others))


def calibration_error(outputs: torch.Tensor, targets: torch.Tensor, bins: int = BINS) -> float:
    """Return sum_b n_b / n |accuracy_b - confidence_b| over bins (i/B, (i+1)/B] of the largest probability.

    Args:
        outputs: logits, shape (rows, classes).
        targets: class indices, shape (rows,).
        bins: B.

    Reference: Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599, equation 3.
    """
    confidence, chosen = outputs.double().softmax(1).max(1)
    bin_ = (confidence * bins).ceil().long().clamp(1, bins) - 1
    apart = torch.zeros(bins, dtype=torch.float64)
    apart.index_add_(0, bin_, (chosen == targets).double() - confidence)
    return float(apart.abs().sum() / len(targets))


def absolute_error(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the mean of |output - target|; shapes (rows,)."""
    return float((outputs.double() - targets.double()).abs().mean())


def determination(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Return R² = 1 - sum (y - f)² / sum (y - mean y)²; NaN if all targets are equal. Shapes (rows,)."""
    y = targets.double()
    spread = (y - y.mean()).square().sum()
    return float(1 - (y - outputs.double()).square().sum() / spread) if spread > 0 else math.nan
