"""The wire settings of a study: how trained weights are sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from secateur.errors import ConfigError, check
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
        packing: ``planes``: values are split into planes of bytes, and those that shrink are packed; ``none``: values
            are sent as they are, so that their size does not depend on them.
        count: how the bytes of replies are known. ``encoded``: every reply is written, and its bytes are counted.
            ``computed``: a simulation's replies are not written; their sizes follow from names, shapes and the mask
            that both sides hold, and are exactly those that would have been written (replies with masks of their own
            are written all the same). ``sampled``: a simulation writes
            the replies of some clients of a round, and the others are taken to have their mean size.
        sample: share of a round's clients whose replies are written; ``sampled`` only. There is at least one.

    Reference: error feedback: Seide et al., Interspeech 2014; Karimireddy et al., arXiv 1901.09847; at both ends:
    Tang et al. (DoubleSqueeze), arXiv 1905.05957. Top-k with memory: Stich et al., arXiv 1809.07599.
    """

    values: Values = "fp32"
    replies: Literal["weights", "updates", "topk"] = "weights"
    topk: float = 0.05
    feedback: bool = True
    packing: Literal["planes", "none"] = "planes"
    count: Literal["encoded", "computed", "sampled"] = "encoded"
    sample: float = 0.1

    def __post_init__(self) -> None:
        check(0 < self.topk <= 1, name="wire.topk", value=self.topk, must="be in (0, 1]")
        check(0 < self.sample <= 1, name="wire.sample", value=self.sample, must="be in (0, 1]")
        exact = self.values == "fp32" and self.replies != "topk"
        if self.count != "encoded" and not exact:
            raise ConfigError(
                f"wire.count = {self.count}: what is rounded, or sent in part, must be written to be known; "
                "set wire.values=fp32 and wire.replies=weights or updates, or wire.count=encoded"
            )
        if self.count == "computed" and self.packing != "none":
            raise ConfigError("wire.count = computed: packed sizes depend on the values; set wire.packing=none")

    @property
    def has_residual(self) -> bool:
        """Return whether replies have a residual: they are rounded, or not all of the update."""
        return self.values != "fp32" or self.replies == "topk"
