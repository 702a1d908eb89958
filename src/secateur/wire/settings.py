"""The wire settings of a study: how trained weights are sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from secateur.errors import check
from secateur.wire.values import Values


@dataclass(frozen=True)
class Wire:
    """How trained weights are sent.

    Attributes:
        values: ``fp32`` (lossless), ``fp16`` and ``bf16`` (rounded to nearest), ``int8`` (a scale for each tensor,
            stochastic rounding).
        replies: what a client sends after its training: ``weights``; ``updates``, the differences to the weights that
            it received; ``topk``, the largest of the differences.
        topk: share of its trained weights whose updates a client sends; ``topk`` only.
        feedback: error feedback: a sender adds the residual of rounding or ``topk`` to its next message.

    Reference: error feedback: Seide et al., Interspeech 2014; Karimireddy et al., arXiv 1901.09847; at both ends:
    Tang et al. (DoubleSqueeze), arXiv 1905.05957. Top-k with memory: Stich et al., arXiv 1809.07599.
    """

    values: Values = "fp32"
    replies: Literal["weights", "updates", "topk"] = "weights"
    topk: float = 0.05
    feedback: bool = True

    def __post_init__(self) -> None:
        check(0 < self.topk <= 1, name="wire.topk", value=self.topk, must="be in (0, 1]")

    @property
    def has_residual(self) -> bool:
        """Return whether replies have a residual: they are rounded, or not all of the update."""
        return self.values != "fp32" or self.replies == "topk"
