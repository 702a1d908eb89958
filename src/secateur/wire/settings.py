"""How trained weights travel: a setting of the study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from secateur.errors import check
from secateur.wire.values import Values


@dataclass(frozen=True)
class Wire:
    """How trained weights travel.

    Attributes:
        values: ``fp32`` (lossless), ``fp16`` and ``bf16`` (rounded to nearest), ``int8`` (a scale for each tensor,
            stochastic rounding).
        replies: what a client sends back of its training: ``weights``; ``updates``, the differences to what it was
            sent; ``topk``, the largest of these alone.
        topk: share of the weights it trained whose updates a client sends; ``topk`` only.
        feedback: what rounding or ``topk`` left out is kept by the sender and added to what it sends next.

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
    def leaves_out(self) -> bool:
        """Return whether a reply is less than what it was made of."""
        return self.values != "fp32" or self.replies == "topk"
