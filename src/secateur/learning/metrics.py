"""Scores of predictions: what each is called, which way is better, and how it is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

BINS = 15
"""Bins of the expected calibration error."""


@dataclass(frozen=True)
class Metric:
    """A score: its name in records, whether higher is better, and its range.

    Attributes:
        name: as in records and summaries, such as ``accuracy``.
        higher: whether more of it is better.
        least, most: its range; None where it has no end.
        label: as in tables, such as ``MAE``; empty: the name.
        words: as in sentences, such as ``mean absolute error``; empty: the label.
    """

    name: str
    higher: bool = True
    least: float | None = 0.0
    most: float | None = 1.0
    label: str = ""
    words: str = ""

    @property
    def shown(self) -> str:
        """Return what a table calls it."""
        return self.label or self.name

    @property
    def worded(self) -> str:
        """Return what a sentence calls it."""
        return self.words or self.shown

    @property
    def share(self) -> bool:
        """Return whether it lies in [0, 1], and is shown as a percentage."""
        return (self.least, self.most) == (0.0, 1.0)

    @property
    def sign(self) -> int:
        """Return 1 where higher is better, -1 where lower is."""
        return 1 if self.higher else -1

    @property
    def bounds(self) -> tuple[float, float]:
        """Return its range, ends infinite where it has none."""
        return -math.inf if self.least is None else self.least, math.inf if self.most is None else self.most

    def text(self, value: float) -> str:
        """Return a value for a sentence: ``91.3 %`` of a share, ``0.42`` of anything else."""
        return f"{100 * value:.1f} %" if self.share else f"{value:.2f}"


ACCURACY = Metric("accuracy")
AUROC = Metric("auroc", label="AUROC", words="area under the ROC curve")
ECE = Metric("ece", higher=False, label="ECE", words="expected calibration error")
MAE = Metric("mae", higher=False, most=None, label="MAE", words="mean absolute error")
R2 = Metric("r2", least=None, label="R²", words="coefficient of determination")


def metric_of(row: Mapping[str, Any]) -> Metric:
    """Return by which score the runs of a record or a summary's ``final`` are compared.

    Those of runs before there were several scores do not say so: they have one of two.
    """
    if "metric" in row:
        return Metric(**row["metric"])
    return next((metric for metric in (ACCURACY, MAE) if metric.name in row), ACCURACY)


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the share of rows whose largest output is that of their class.

    Args:
        outputs: shape (rows, classes).
        targets: class indices, shape (rows,).
    """
    return int((outputs.argmax(1) == targets).sum()) / len(targets)


def auroc(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the area under the ROC curve: of class 1 against 0, or of each class against all others, in the mean.

    The area is the chance that a random row of the class has a higher probability of it than a random row of another;
    equal probabilities count half. Of two classes there is one area. Classes that no row or every row has are left out;
    NaN where none is left.

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
    """Return R² = 1 - sum (y - f)² / sum (y - mean y)²; NaN where all targets are equal. Shapes (rows,)."""
    y = targets.double()
    spread = (y - y.mean()).square().sum()
    return float(1 - (y - outputs.double()).square().sum() / spread) if spread > 0 else math.nan
