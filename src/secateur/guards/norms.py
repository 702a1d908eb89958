"""Norms: what one client can change in a round is bounded by what the clients of the round before changed.

The update of a client (its reply less what it was sent) is scaled down to a multiple of the median norm, and the rows
by which it counts are cut to a multiple of the median number of rows. What is a thousand times as large as the
median is no update of a client that trained, and is set aside. Nobody is refused for either. What a client measured of
its rows (AutoFLIP's deviations, squares of gradients) is scaled down in the same way; its norm is that of the values
themselves, and is compared within its phase.

    u_k <- u_k min(1, c m / |u_k|)      |u_k|: the root mean square over the coordinates that client k holds
    n_k <- min(n_k, floor(r q))         m, q: the medians of |u_k| and n_k over the last cohort
    u_k <- 0, n_k <- 0                  where |u_k| > f m

The norms that make the next median are at most ``_GROWTH`` m, so a lie enters it at most as a doubled median, and even
a majority cannot raise it faster; where all updates have really grown, the median catches up by doubling. The first
cohort is compared with its own medians.

Reference: norm clipping, Sun et al., arXiv 1911.07963; the median as its bound: as in LASA, arXiv 2409.01435. The root
mean square instead of the norm, so that clients with masks or slices of different size are compared, is ours.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from secateur.contract.ask import Ask
from secateur.contract.guard import Guard, Passage
from secateur.contract.reply import Reply, Sent
from secateur.errors import check

UPDATE, BUFFERS, ROWS, STATISTICS = "update", "buffers", "rows", "statistics"
"""The names of what is measured: norms of the trained tensors' and the buffers' updates, the number of rows, and, with
the phase behind it, the norm of statistics."""

_GROWTH = 2.0


@dataclass(frozen=True)
class Norms(Guard):
    """Bounds what one client can change, by the medians of the last cohort.

    Trained tensors and buffers (running statistics) are measured and scaled apart. Replies of clients without training
    rows are neither measured nor changed.

    Attributes:
        times: c, the largest update of a client as a multiple of the median one.
        rows: r, the most rows by which a client counts as a multiple of the median number.
        far: f, the multiple of the median update beyond which a client counts as if it had not trained.
    """

    compares: ClassVar[bool] = True

    times: float = 2.0
    rows: float = 5.0
    far: float = 1000.0

    def __post_init__(self) -> None:
        check(self.times > 0, name="norms.times", value=self.times, must="be above 0; norms.on = false: no bound")
        check(self.far >= self.times, name="norms.far", value=self.far, must=f"be norms.times ({self.times:g}) or more")
        check(self.rows >= 1, name="norms.rows", value=self.rows, must="be at least 1")

    def wants(self, ask: Ask) -> frozenset[str]:
        """Return the medians of rows, and of updates and statistics where there are any."""
        updates = {UPDATE} if ask.updated else set[str]()
        return frozenset({ROWS, *updates, *({_of(ask.phase)} if ask.statistics else ())})

    def counted(self, rows: Sequence[int]) -> list[int]:
        """Return the rows, at most ``rows`` times the median of those who have any."""
        held = [count for count in rows if count]
        return [self._counted(count, statistics.median(held)) for count in rows] if held else list(rows)

    def arriving(self, reply: Reply, sent: Sent, passage: Passage) -> Reply:
        """Return the reply with its update scaled down and its rows cut, where they are beyond the medians."""
        if not reply.rows:
            return reply
        medians = passage.medians or {}
        aside = False
        facts, bounded, scaled = {ROWS: float(reply.rows)}, dict[str, float](), dict[str, torch.Tensor]()
        for group, names in _groups(reply, sent, passage):
            norm = _norm(reply, sent, names, passage)
            before = medians.get(group, math.inf)
            facts[group] = min(norm, _GROWTH * before)
            median = medians.get(group, 0.0)
            if passage.medians is not None and norm > self.times * median:
                aside = aside or 0 < self.far * median < norm
                bounded[group] = factor = 0.0 if aside else self.times * median / norm
                scaled |= {name: _scaled(reply, sent, name, factor, passage) for name in names}
        rows = reply.rows if passage.medians is None else self._counted(reply.rows, medians.get(ROWS, math.inf))
        rows = 0 if aside else rows
        if rows < reply.rows:
            bounded[ROWS] = float(rows)
        tensors = {**reply.tensors, **scaled} if scaled else reply.tensors
        return replace(reply, rows=rows, tensors=tensors, facts=facts, bounded={**reply.bounded, **bounded})

    def _counted(self, rows: int, median: float) -> int:
        return rows if math.isinf(median) else min(rows, math.floor(self.rows * median))


def _of(phase: str) -> str:
    return f"{STATISTICS} of {phase}"


def _groups(reply: Reply, sent: Sent, passage: Passage) -> Iterator[tuple[str, list[str]]]:
    """Yield the names of the trained tensors, of the buffers and of the statistics, where there are any."""
    buffers = passage.updated & frozenset(sent.setting.layout.names("buffer"))
    measured = passage.statistics & reply.tensors.keys()
    for group, names in ((UPDATE, passage.updated - buffers), (BUFFERS, buffers), (_of(passage.phase), measured)):
        if names:
            yield group, sorted(names)


def _start(sent: Sent, name: str, passage: Passage) -> torch.Tensor | float:
    """Return what a tensor is compared with: an update with what was sent, a statistic with 0."""
    return 0.0 if name in passage.statistics else sent.tensors[name].detach().cpu().double()


def _difference(reply: Reply, sent: Sent, name: str, passage: Passage) -> torch.Tensor:
    """Return a tensor's update in float64, in which no difference of float32 numbers nor its square is infinite."""
    difference = reply.tensors[name].detach().cpu().double() - _start(sent, name, passage)
    kept = (reply.mask or {}).get(name)
    return difference if kept is None else torch.where(kept, difference, 0.0)


def _norm(reply: Reply, sent: Sent, names: Sequence[str], passage: Passage) -> float:
    """Return the root mean square of an update over the coordinates that the client holds."""
    total, count = 0.0, 0
    for name in names:
        # in one order of memory, so that whoever has the reply sums in the same order
        total += float(_difference(reply, sent, name, passage).contiguous().reshape(-1).square().sum())
        kept = (reply.mask or {}).get(name)
        count += reply.tensors[name].numel() if kept is None else int(kept.sum())
    return math.sqrt(total / count) if count else 0.0


def _scaled(reply: Reply, sent: Sent, name: str, factor: float, passage: Passage) -> torch.Tensor:
    """Return a tensor whose update is scaled; what the reply's mask prunes stays 0."""
    start, kept = _start(sent, name, passage), (reply.mask or {}).get(name)
    scaled = (start + factor * _difference(reply, sent, name, passage)).float()
    return scaled if kept is None else torch.where(kept, scaled, 0.0)
